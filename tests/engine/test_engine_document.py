"""longwing-tiny reads a real document: every path gives the plain path's answer, the right one.

The other tests of paths take random models with a vocabulary of 320. This one was trained, its
weights are packed, and its vocabulary is Falcon's; the plain path dequantises at each product, and
the engine multiplies by the same weights unpacked.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import SMALL, ids, request, run, text

from longwing.engine.engine import Engine
from longwing.engine.generator import Completion, Generator
from longwing.engine.loading import load_engine

DOCUMENT = Path(__file__).parents[2] / "docs" / "harbour.txt"

QUESTIONS = {
    "What is the door code of the ferry house?": "The door code of the ferry house is 20418.",
    "Who looks after the old mill?": "The person who looks after the old mill is called Harriet.",
    "Which number do I have to call for the lighthouse?": (
        "For the lighthouse, call the number 7731."
    ),
}

PATHS: dict[str, dict[str, Any]] = {
    "whole prompts, one by one": {"max_sequences": 1, "max_batch_tokens": 1024},
    "chunks of 50 tokens": {"max_batch_tokens": 50},
    "without a prefix cache": {"prefix_cache": False, "max_batch_tokens": 300},
    "with drafts": {"max_draft": 6, "draft_sequences": 16, "max_batch_tokens": 700},
    "few pages, so preempted": {"page_len": 8, "num_pages": 129, "prefix_cache": False},
}


@pytest.fixture(scope="module")
def prompts(tiny_model: Generator) -> list[list[int]]:
    """The document and a question each, in the model's template."""
    document = DOCUMENT.read_text(encoding="utf-8").rstrip()
    return [
        tiny_model.tokenizer.chat([{"role": "user", "content": f"{document}\n\n{question}"}])
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def alone(tiny_model: Generator, prompts: list[list[int]]) -> list[Completion]:
    return [tiny_model.generate(prompt, max_new_tokens=24) for prompt in prompts]


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> Engine:
    """An engine whose model the others take over."""
    options = replace(SMALL, device="cpu", page_len=32, num_pages=20)
    return load_engine(tiny_model_folder, options)[0]


def test_the_plain_path_answers_from_the_document(alone: list[Completion]) -> None:
    assert [answer.text for answer in alone] == list(QUESTIONS.values())


@pytest.mark.parametrize("path", PATHS)
def test_every_path_reads_a_document_as_the_plain_path_does(
    path: str, loaded: Engine, prompts: list[list[int]], alone: list[Completion]
) -> None:
    settings = {"page_len": 32, "num_pages": 64, "max_draft": 0, **PATHS[path]}
    engine = Engine(loaded.model, loaded.tokenizer, replace(SMALL, **settings))
    told = run(engine, [request(prompt, ignore_eos=False) for prompt in prompts])
    for place, expected in enumerate(alone):
        assert ids(told[str(place)]) == expected.token_ids, place
        assert text(told[str(place)]) == expected.text
    if path == "with drafts":
        assert engine.stats.num_accepted > 0
    if "preempted" in path:
        assert engine.stats.num_preempted > 0
    engine.cache.check([])
    engine.close()
