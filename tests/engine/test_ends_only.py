"""Steps whose last block works for each text's last token alone, against those that do it all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of, ids, request, run
from torch import Tensor, nn
from transformers import FalconConfig, LlamaConfig, PretrainedConfig

from adapter_folders import write_random_adapter
from gptq_writer import write_gptq
from longwing.checkpoint.adapter import Adapter
from longwing.engine.adapters import AdapterTable
from longwing.engine.cache import CacheKey
from longwing.engine.generator import load
from longwing.engine.runner import Runner
from longwing.engine.sequence import Sequence as Text
from longwing.engine.sequence import Work
from longwing.layers.lora import attach
from longwing.models import Decoder, load_model, streamed_linear
from longwing.models.prepare import prepare
from longwing.models.streaming import stream_weights
from tiny import ARCHITECTURES, COMMON

# The interpreter multiplies what lies beyond a context too, whatever it is, before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
Folder = Callable[[str], Path]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_LEN = 16
MIXED = [(20, 1), (9, 1), (0, 13), (8, 10), (5, 7)]
"""Tokens in the pages and tokens that come: two texts that go on, two prompts, a third's middle."""


def runner_of(model: Decoder, adapters: AdapterTable | None = None) -> Runner:
    word = str(model.dtype).removeprefix("torch.")
    made = Runner(model, num_pages=40, page_len=PAGE_LEN, kv_dtype=word, adapters=adapters)
    made.graphs = None
    return made


def step_of(
    runner: Runner, lens: Sequence[tuple[int, int]], adapters: Sequence[str] = ("",)
) -> list[Work]:
    """A step of texts that have so many tokens in the pages and bring so many."""
    rotary, batch, free = runner.model.rotary, [], list(range(runner.num_pages))
    for place, (num_read, num_new) in enumerate(lens):
        tokens = [(7 * i + 31 * place) % 320 for i in range(num_read + num_new)]
        key = CacheKey(
            salt="",
            rung=rotary.rungs[0] if rotary else 0,
            adapter=adapters[place % len(adapters)],
        )
        text = Text(id=str(place), prompt_ids=tokens, max_len=320, key=key)
        text.pages = [free.pop() for _ in range(-(-len(tokens) // PAGE_LEN))]
        if num_read:
            runner.forward([Work(text, 0, tokens[:num_read], 0, False)])
        batch.append(Work(text, num_read, tokens[num_read:], 0, place < 4))
    return batch


def both_ways(runner: Runner, batch: Sequence[Work]) -> tuple[Tensor, Tensor]:
    """Each work's last hidden state, (S, D), of a step that gives all and of one for them alone.

    Holds the pages after the one to those after the other.
    """
    before = [(layer.keys_PBKH.clone(), layer.values_PBKH.clone()) for layer in runner.pages]
    whole_TD = runner.forward(batch)
    written = [(layer.keys_PBKH.clone(), layer.values_PBKH.clone()) for layer in runner.pages]
    for layer, (keys, values) in zip(runner.pages, before, strict=True):
        layer.keys_PBKH.copy_(keys)
        layer.values_PBKH.copy_(values)
    ends_SD = runner.forward(batch, ends_only=True)
    for layer, (keys, values) in zip(runner.pages, written, strict=True):
        assert torch.equal(layer.keys_PBKH, keys)
        assert torch.equal(layer.values_PBKH, values)
    last_S = torch.tensor([len(work.token_ids) for work in batch]).cumsum(0) - 1
    return whole_TD[last_S.to(whole_TD.device)], ends_SD


@pytest.mark.parametrize("form", ["plain", "prepared"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ends_have_the_hidden_states_that_they_have_among_all(
    tiny_folder: Folder, name: str, form: str
) -> None:
    model = load_model(tiny_folder(name))
    if form == "prepared":
        prepare(model, "float32")
    runner = runner_of(model)
    whole_SD, ends_SD = both_ways(runner, step_of(runner, MIXED))
    torch.testing.assert_close(ends_SD, whole_SD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["falcon-rw", "falcon-7b", "falcon-40b", "llama3"])
def test_the_other_tokens_never_reach_the_last_mlp(tiny_folder: Folder, name: str) -> None:
    model = load_model(tiny_folder(name))
    runner = runner_of(model)
    batch = step_of(runner, MIXED)
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    runner.forward(batch, ends_only=True)
    assert rows == [32, 5]
    runner.forward(batch[:2], ends_only=True)  # nobody brings more than the one
    assert rows[2:] == [2, 2]


SHAPE: dict[str, Any] = {**COMMON, "hidden_size": 64, "num_attention_heads": 2}
ONE: dict[str, Any] = {**SHAPE, "num_hidden_layers": 1}
STREAMED: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon-7b": lambda: FalconConfig(**ONE, multi_query=True, alibi=False),
    "falcon-40b": lambda: FalconConfig(
        **{**SHAPE, "hidden_size": 128}, num_kv_heads=1, new_decoder_architecture=True, alibi=False
    ),
    "falcon-rw": lambda: FalconConfig(
        **ONE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "llama": lambda: LlamaConfig(**ONE, intermediate_size=128, num_key_value_heads=1),
}
FEW, MANY = [(0, 1), (0, 3)], [(20, 1), (0, 280)]
"""Few enough that a block leaves its sum under the next one's norms; more than are streamed."""
ON_GPU = [MIXED, MANY] if DEVICE == "cuda" else []  # the interpreter takes half a minute


@pytest.mark.parametrize("lens", [FEW, *ON_GPU])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_blocks_do_no_more_for_the_others_either(
    name: str, lens: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    # Folded in bfloat16 alone, which the interpreter cannot multiply; these numbers are small.
    monkeypatch.setattr(streamed_linear, "FOLDABLE", {torch.float16})
    write_gptq(STREAMED[name](), tmp_path, bits=4, group_size=64)
    model = load_model(tmp_path, device=DEVICE, dtype=torch.float16, unpack=False)
    assert stream_weights(model) > 0
    runner = runner_of(model)
    batch = step_of(runner, lens)
    rows: list[int] = []

    def count(_module: nn.Module, _args: object, out_TO: Tensor) -> None:
        rows.append(len(out_TO))

    for block in model.blocks:
        product = block.mlp_out if name == "llama" else block.up
        product.register_forward_hook(count)
    whole_SD, ends_SD = both_ways(runner, batch)
    num_tokens = sum(num_new for _, num_new in lens)
    num_blocks = len(model.blocks)
    assert rows == [num_tokens] * (2 * num_blocks - 1) + [len(lens)]
    error = (ends_SD.double() - whole_SD.double()).norm() / whole_SD.double().norm()
    assert error < 2e-3


def test_texts_under_several_adapters_get_their_own(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("falcon-40b")
    names = ("one", "two")
    found = [write_random_adapter(tmp_path / name, folder, seed=ord(name[0])) for name in names]
    model = load_model(folder)
    table = AdapterTable(names, attach(model, [Adapter.open(path) for path in found]))
    runner = runner_of(model, table)
    for adapters in (("one", "", "two"), ("two",)):
        whole_SD, ends_SD = both_ways(runner, step_of(runner, MIXED, adapters))
        torch.testing.assert_close(ends_SD, whole_SD, rtol=1e-5, atol=1e-5)


def test_engine_asks_for_all_tokens_only_where_someone_wants_them(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_folder("falcon-40b"), max_batch_tokens=24)
    forward, asked = engine.runner.forward, []

    def spy(batch: Sequence[Work], *args: Any, ends_only: bool) -> Tensor:
        asked.append((ends_only, {work.sequence.prompt_len for work in batch}))
        return forward(batch, *args, ends_only=ends_only)

    monkeypatch.setattr(engine.runner, "forward", spy)
    prompts = [[(i * step) % 256 for i in range(40 + step)] for step in (3, 5, 7)]
    requests = [request(prompt, max_new_tokens=5) for prompt in prompts]
    requests[1] = request(prompts[1], max_new_tokens=5, prompt_logprobs=0)
    told = run(engine, requests)
    plain = load(tiny_folder("falcon-40b"), dtype="float32", device="cpu")
    for prompt, events in zip(prompts, told.values(), strict=True):
        tokens = list(prompt)
        for _ in range(5):  # on the path without pages, which has no ends
            tokens.append(int(plain.logits(tokens)[-1].argmax()))
        assert ids(events) == tokens[len(prompt) :]
    wanting = len(prompts[1])
    assert {ends_only for ends_only, _ in asked} == {True, False}
    assert all(ends_only or wanting in lens for ends_only, lens in asked)


def test_ends_of_a_step_without_sequences_are_refused(tiny_folder: Folder) -> None:
    model = load_model(tiny_folder("llama2"))
    with pytest.raises(ValueError, match="from inputs alone"):
        model(torch.tensor([1, 2]), torch.arange(2), ends_only=True)
