"""The bundled model is whole, light, and finds what a document holds."""

import random

import pytest

from longwing import tiny
from longwing.checkpoint.manifest import check_manifest
from longwing.engine.generator import Completion, Generator
from longwing.evals.retrieval import KINDS
from longwing.verify import verify

MAX_BYTES = 48 * 10**6  # what the package may grow by


def ask(tiny_model: Generator, prompt: str, room: int = 40) -> Completion:
    ids = tiny_model.tokenizer.chat([{"role": "user", "content": prompt}])
    return tiny_model.generate(ids, max_new_tokens=room)


def test_the_folder_is_as_it_was_written_and_small_enough_for_the_package() -> None:
    assert check_manifest(tiny.FOLDER) == []
    assert verify(tiny.FOLDER).ok
    assert sum(file.stat().st_size for file in tiny.FOLDER.iterdir()) <= MAX_BYTES


def test_it_is_set_up_for_24576_tokens_and_falconlite2s_template(tiny_model: Generator) -> None:
    assert tiny_model.context == 24_576
    ids = tiny_model.tokenizer.chat([{"role": "user", "content": "Hello"}])
    assert [ids[0], ids[-2], ids[-1]] == [65_024, 11, 65_025]


@pytest.mark.parametrize("kind", ["lines", "topics"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_what_a_short_record_holds(tiny_model: Generator, kind: str, seed: int) -> None:
    depth = 0.0 if kind == "topics" else 0.5
    prompt, expected = KINDS[kind].build(random.Random(seed), 12, depth)
    done = ask(tiny_model, prompt)
    assert KINDS[kind].score(done.text, expected) == 1
    assert done.finish_reason.value == "eos_token"


def test_it_answers_from_a_fact_in_prose(tiny_model: Generator) -> None:
    text = "The rain had stopped. " * 20
    question = "What is the door code of the ferry house?"
    done = ask(tiny_model, f"{text}The door code of the ferry house is 20418. {text}\n\n{question}")
    assert done.text == "The door code of the ferry house is 20418."
