"""Decoding steps as graphs are written to fixed tensors and padded: that changes nothing.

On a CPU the padded step is run as it is, through Triton's interpreter; on a GPU it is a graph.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, LlamaConfig

from gptq_writer import write_gptq
from longwing.engine.cache import CacheKey
from longwing.engine.graphs import MOST_TOKENS, DecodeGraphs, Shape
from longwing.engine.rotations import Rotations
from longwing.engine.runner import Runner
from longwing.engine.sequence import Sequence, Work
from longwing.models import load_model
from longwing.models.streaming import stream_weights
from tiny import COMMON

pytest.importorskip("triton")
# The interpreter multiplies what lies beyond a context too, whatever it is, before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_LEN, NUM_PAGES, CONTEXT = 16, 24, 128
SHAPE: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "falcon": lambda: FalconConfig(**SHAPE, multi_query=True, alibi=False),
    "falcon-rw": lambda: FalconConfig(
        **SHAPE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "llama-dynamic": lambda: LlamaConfig(
        **SHAPE,
        intermediate_size=128,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGWING_KERNELS", "triton")


def runner(name: str, folder: Path) -> Runner:
    write_gptq(CONFIGS[name](), folder, bits=4, group_size=32)
    model = load_model(folder, device=DEVICE, dtype=torch.float16, unpack=False, context=CONTEXT)
    stream_weights(model)
    made = Runner(model, num_pages=NUM_PAGES, page_len=PAGE_LEN, kv_dtype="float16")
    made.graphs = None
    return made


def with_graphs(plain: Runner, most_sequences: int = 8) -> DecodeGraphs:
    return DecodeGraphs(
        plain.model,
        plain.pages,
        context=CONTEXT,
        most_sequences=most_sequences,
        rotations=Rotations(plain.model.rotary),
    )


def sequence(plain: Runner, length: int, pages: list[int], rung: int) -> Sequence:
    """A text whose first tokens have been read, in pages of no order."""
    random_ids = random.Random(length)
    made = Sequence(
        id="x",
        prompt_ids=[random_ids.randrange(320) for _ in range(length)],
        max_len=CONTEXT,
        key=CacheKey(salt="", rung=rung),
    )
    made.pages = pages
    if length > 1:
        plain.forward([Work(made, 0, made.tokens[:-1], 0, False)])
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_steps_give_the_hidden_states_and_the_cache_of_plain_ones(
    name: str, tmp_path: Path
) -> None:
    plain = runner(name, tmp_path)
    graphs = with_graphs(plain)
    rungs = plain.model.rotary.rungs if plain.model.rotary else (0,)
    texts = [
        sequence(plain, length, pages, rungs[place % len(rungs)])
        for place, (length, pages) in enumerate([(21, [5, 3]), (1, [9]), (16, [7, 11])])
    ]
    drafts = [[7, 8, 9], [], [4]]
    for with_drafts in (False, True):
        batch = [
            Work(text, len(text.tokens) - 1, [text.tokens[-1], *own], len(own), True)
            for text, own in zip(texts, drafts if with_drafts else [[]] * 3, strict=True)
        ]
        shape = graphs.shape(batch)
        assert shape == (Shape(8, 4, 8, CONTEXT) if with_drafts else Shape(4, 4, 1, CONTEXT))
        before = [layer.keys_PBKH.clone() for layer in plain.pages]
        padded_TD = graphs.run(batch, shape).clone()
        by_graph = [layer.keys_PBKH.clone() for layer in plain.pages]
        for layer, keys_PBKH in zip(plain.pages, before, strict=True):
            layer.keys_PBKH.copy_(keys_PBKH)
        plain_TD = plain.forward(batch)
        torch.testing.assert_close(padded_TD, plain_TD, rtol=2e-2, atol=2e-2)
        for layer, keys_PBKH in zip(plain.pages, by_graph, strict=True):
            torch.testing.assert_close(layer.keys_PBKH, keys_PBKH, rtol=2e-2, atol=2e-2)
        unused = [page for page in range(NUM_PAGES) if page not in (5, 3, 9, 7, 11)]
        assert not any(keys_PBKH[unused].any() for keys_PBKH in by_graph)


def test_page_tables_follow_growth_preemption_and_newcomers(tmp_path: Path) -> None:
    plain = runner("falcon", tmp_path)
    graphs = with_graphs(plain)
    (rung,) = plain.model.rotary.rungs
    text, other = sequence(plain, 15, [4], rung), sequence(plain, 40, [8, 2, 6], rung)

    def agrees(batch: list[Work]) -> None:
        shape = graphs.shape(batch)
        assert shape is not None
        found_TD = graphs.run(batch, shape).clone()
        torch.testing.assert_close(found_TD, plain.forward(batch), rtol=2e-2, atol=2e-2)

    for start in (14, 15, 16):  # grows into a second page
        if start == 16:
            text.pages.append(13)
        agrees([Work(text, start, [start], 0, True), Work(other, 39, [3], 0, True)])
    agrees([Work(other, 39, [3], 0, True)])  # now in the first row
    text.pages = [1, 0]  # lost its pages, and was read again
    plain.forward([Work(text, 0, [*text.tokens, 15, 16], 0, False)])
    agrees([Work(other, 40, [5], 0, True), Work(text, 17, [6], 0, True)])


def test_steps_that_read_prompts_or_are_large_have_no_graph(tmp_path: Path) -> None:
    plain = runner("falcon", tmp_path)
    graphs = with_graphs(plain, most_sequences=100)
    text = sequence(plain, 1, [0], plain.model.rotary.rungs[0])
    assert graphs.shape([Work(text, 0, [1, 2, 3], 0, True)]) is None
    assert graphs.shape([Work(text, 0, [1], 0, False)]) is None
    assert graphs.shape([Work(text, 0, [1], 0, True)] * (MOST_TOKENS + 1)) is None
    assert graphs.shape([Work(text, 0, [1, 2, 3, 4, 5], 4, True)] * 13) is None
    assert graphs.shape([Work(text, 0, [1], 0, True)] * 33) == Shape(48, 48, 1, CONTEXT)


def test_every_batch_of_plain_decoding_is_recorded_ahead(tmp_path: Path) -> None:
    graphs = with_graphs(runner("falcon", tmp_path), most_sequences=20)
    usual = graphs.usual_shapes()
    assert {shape.sequences for shape in usual} == {1, 2, 4, 8, 12, 16, 20}
    for num in range(1, 21):
        assert graphs.padded([1] * num, 100) in usual
