"""Adapters served beside the model they are for: in one batch, apart in the cache, by name."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SMALL, engine_of, ids, request, run
from transformers import FalconConfig

from adapter_folders import write_random_adapter
from gptq_writer import write_gptq
from longwing.checkpoint.adapter import Adapter
from longwing.engine.adapters import AdapterTable, num_bytes
from longwing.engine.cache import CacheKey
from longwing.engine.folder import ModelFolder
from longwing.engine.generator import load
from longwing.engine.graphs import DecodeGraphs
from longwing.engine.loading import load_engine, pages_that_fit
from longwing.engine.options import EngineOptions, adapter_place
from longwing.engine.request import Request, SamplingParams
from longwing.engine.rotations import Rotations
from longwing.engine.runner import Runner
from longwing.engine.sequence import Sequence, Work
from longwing.engine.wire import request_from_wire, request_to_wire
from longwing.errors import CheckpointError, ConfigError, RequestError
from longwing.layers.lora import attach
from longwing.models import load_model
from longwing.models.streaming import stream_weights
from longwing.plan import kv_bytes_per_token
from tiny import COMMON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Folder = Callable[[str], Path]
NAMES = ("falcon-40b", "llama3")
PROMPTS = [list(range(40)), [3, 1, 4, 1, 5], [9] * 20]


@pytest.fixture(scope="module")
def adapters(
    tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[str, str]]:
    """`adapters(model)`: "one=…", of every linear, and "two=…", of some and of another rank."""
    made: dict[str, tuple[str, str]] = {}

    def folders(name: str) -> tuple[str, str]:
        if name not in made:
            base, parent = tiny_folder(name), tmp_path_factory.mktemp("adapters")
            some = ("query_key_value", "v_proj", "dense_4h_to_h", "down_proj")
            write_random_adapter(parent / "one", base, seed=1)
            write_random_adapter(parent / "two", base, seed=2, rank=3, targets=some)
            made[name] = (f"one={parent / 'one'}", f"two={parent / 'two'}")
        return made[name]

    return folders


@pytest.fixture(scope="module")
def alone(
    tiny_folder: Folder, adapters: Callable[[str], tuple[str, str]]
) -> Callable[[str], dict[tuple[str, int], list[int]]]:
    """What the plain path answers to each prompt with each adapter, and without one."""
    made: dict[str, dict[tuple[str, int], list[int]]] = {}

    def answers(name: str) -> dict[tuple[str, int], list[int]]:
        if name not in made:
            made[name] = {}
            for adapter in ("", *adapters(name)):
                own, _, folder = adapter.partition("=")
                plain = load(tiny_folder(name), context=64, adapter=folder or None)
                for place, prompt in enumerate(PROMPTS):
                    answer = plain.generate(prompt, max_new_tokens=12, ignore_eos=True)
                    made[name][own, place] = answer.token_ids
        return made[name]

    return answers


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_pages": 9, "max_batch_tokens": 19, "max_draft": 3, "draft_sequences": 16}],
    ids=["batched", "chunks, drafts, few pages"],
)
@pytest.mark.parametrize("name", NAMES)
def test_each_of_a_mixed_batch_answers_as_the_plain_path_with_its_adapter_alone(
    name: str,
    settings: dict[str, Any],
    tiny_folder: Folder,
    adapters: Callable[[str], tuple[str, str]],
    alone: Callable[[str], dict[tuple[str, int], list[int]]],
) -> None:
    engine = engine_of(tiny_folder(name), context=64, adapters=adapters(name), **settings)
    expected = alone(name)
    asked = {
        f"{adapter} {place}": request(PROMPTS[place], adapter=adapter, max_new_tokens=12)
        for adapter, place in expected
    }
    told = run(engine, asked)
    for (adapter, place), token_ids in expected.items():
        assert ids(told[f"{adapter} {place}"]) == token_ids, (adapter, place)
    assert len({tuple(expected[adapter, 0]) for adapter in ("", "one", "two")}) == 3
    assert bool(engine.stats.num_preempted) == ("num_pages" in settings)
    engine.cache.check([])


def test_prefixes_of_different_adapters_never_mix(
    tiny_folder: Folder, adapters: Callable[[str], tuple[str, str]]
) -> None:
    engine = engine_of(tiny_folder("llama3"), adapters=adapters("llama3"))
    prompt = list(range(50))

    def cached_len(adapter: str) -> int:
        return run(engine, [request(prompt, adapter=adapter)])["0"][-1].cached_len

    assert [cached_len(adapter) for adapter in ("", "one", "two")] == [0, 0, 0]
    assert [cached_len(adapter) for adapter in ("", "one", "two")] == [48, 48, 48]


def test_name_that_is_not_served_is_refused_and_told_those_that_are(
    tiny_folder: Folder, adapters: Callable[[str], tuple[str, str]]
) -> None:
    engine = engine_of(tiny_folder("falcon-40b"), adapters=adapters("falcon-40b"))
    with pytest.raises(RequestError, match="no adapter 'three'; served are one, two"):
        engine.add("x", request([1], adapter="three"))
    bare = engine_of(tiny_folder("falcon-40b"))
    with pytest.raises(RequestError, match="no adapter 'one'; none is served"):
        bare.add("x", request([1], adapter="one"))
    assert not engine.busy
    assert not bare.busy


def test_adapter_travels_with_its_request() -> None:
    asked = Request(
        prompt_ids=(1,), params=SamplingParams(max_new_tokens=1), adapter="one", salt="s"
    )
    assert request_from_wire(request_to_wire(asked)) == asked


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one=/a/b", ("one", "/a/b")),
        ("/a/falcon-16k", ("falcon-16k", "/a/falcon-16k")),
        ("falcon-16k/", ("falcon-16k", "falcon-16k/")),
        ("v1.2:a_b=x=y", ("v1.2:a_b", "x=y")),
    ],
)
def test_adapter_goes_by_the_name_given_or_its_folders(text: str, place: tuple[str, str]) -> None:
    assert adapter_place(text) == place


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=x",
        "x=",
        "../x=y",
        "a b=x",
        "a/b=x",
        ".hidden=x",
        "-x=y",
        "é=x",
        "a\n=x",
        "x" * 129 + "=y",
    ],
)
def test_name_that_no_client_could_be_told_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="write NAME=FOLDER"):
        EngineOptions(adapters=(text,))


def test_one_name_for_two_adapters_is_refused() -> None:
    with pytest.raises(RequestError, match='"a" is given twice'):
        EngineOptions(adapters=("a=x", "b=y", "/z/a"))


def test_adapter_tuned_under_other_rotations_is_refused_unless_the_operator_says_what_holds(
    tiny_folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_folder("llama2")  # theta 10000, 256 tokens
    own = ModelFolder.open(base).config.rope
    assert own is not None
    longer = replace(own, trained_len=4096, max_len=4096)
    near = write_random_adapter(tmp_path / "near", base, seed=2, settings=longer.to_hf())
    other = replace(longer, theta=1e6)
    far = write_random_adapter(tmp_path / "far", base, seed=1, settings=other.to_hf())
    options = replace(SMALL, adapters=(f"near={near}", f"far={far}"))
    refusal = "'far' was tuned under RoPE default,theta=1000000, .* under default,theta=10000;"
    with pytest.raises(ConfigError, match=refusal) as refused:
        load_engine(base, options)
    assert "--rope default,theta=1000000 --context 4096" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        engine, info = load_engine(base, replace(options, rope="default,theta=1000000"))
    assert info.adapters == ("near", "far")
    assert "adapter near was tuned under RoPE default,theta=10000" in caplog.text
    assert "adapter far" not in caplog.text
    plain = load(base, adapter=far)
    expected = plain.generate(PROMPTS[0], max_new_tokens=24, ignore_eos=True).token_ids
    assert ids(run(engine, [request(PROMPTS[0], adapter="far")])["0"]) == expected


def test_adapted_head_and_adapters_of_other_models_are_refused_at_the_start(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    base = tiny_folder("llama2")
    head = write_random_adapter(tmp_path / "head", base, seed=1, targets=("lm_head", "q_proj"))
    with pytest.raises(CheckpointError, match=r"lm_head: is adapted, .* `longwing merge`"):
        load_engine(base, replace(SMALL, adapters=(str(head),)))
    other = write_random_adapter(tmp_path / "other", tiny_folder("falcon-40b"), seed=1)
    with pytest.raises(CheckpointError, match="no such linear"):
        load_engine(base, replace(SMALL, adapters=(str(other),)))


def test_adapters_take_their_part_of_the_memory(
    tiny_folder: Folder, adapters: Callable[[str], tuple[str, str]]
) -> None:
    folder, cpu = ModelFolder.open(tiny_folder("llama3")), torch.device("cpu")
    bare = replace(
        SMALL, num_pages=None, max_sequences=4096, memory=2**30 + 2**25, cpu_weights="float32"
    )
    with_two = replace(bare, adapters=adapters("llama3"))
    num = num_bytes(with_two, 4)
    page_bytes = bare.page_len * kv_bytes_per_token(folder.config, "float32")
    pages = pages_that_fit(folder, bare, cpu)
    assert pages * page_bytes > 2**24  # the memory is what limits them
    assert pages - pages_that_fit(folder, with_two, cpu) == pytest.approx(num / page_bytes, abs=1)
    plain, adapted = (
        load_engine(folder.path, replace(SMALL, adapters=names))[1]
        for names in ((), adapters("llama3"))
    )
    assert adapted.weight_bytes - plain.weight_bytes == num  # in whatever form blocks keep them


ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="a minute through Triton's interpreter")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("weights", ["dense", pytest.param("streamed", marks=ON_GPU)])
def test_graphs_of_decoding_choose_each_tokens_adapter(
    weights: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the padded step is run as it is; it reads the tensors that a graph would."""
    pytest.importorskip("triton")
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    folder = tiny_folder("falcon3")
    if weights == "streamed":  # two branches beside each other
        folder = tmp_path / "model"
        shape: dict[str, Any] = {**COMMON, "hidden_size": 128, "num_attention_heads": 4}
        config = FalconConfig(**shape, num_kv_heads=2, new_decoder_architecture=True, alibi=False)
        write_gptq(config, folder, bits=4, group_size=64)
    names = ("one", "two")
    found = [write_random_adapter(tmp_path / name, folder, seed=ord(name[0])) for name in names]
    model = load_model(folder, device=DEVICE, dtype=torch.float16, unpack=False)
    table = AdapterTable(names, attach(model, [Adapter.open(path) for path in found]))
    stream_weights(model)
    runner = Runner(model, num_pages=4, page_len=16, kv_dtype="float16", adapters=table)
    runner.graphs = None
    graphs = DecodeGraphs(
        *(model, runner.pages),
        context=64,
        most_sequences=8,
        rotations=Rotations(model.rotary),
        adapters=table,
    )

    def work(page: int, adapter: str) -> Work:
        """The first token of a text, and a draft."""
        key = CacheKey(salt="", rung=model.rotary.rungs[0] if model.rotary else 0, adapter=adapter)
        sequence = Sequence(id=adapter, prompt_ids=[5], max_len=64, key=key)
        sequence.pages = [page]
        return Work(sequence, 0, [5, 6], 1, True)

    for order in (("one", "", "two"), ("two", "one", "one")):  # the same graph, other adapters
        batch = [work(page, adapter) for page, adapter in enumerate(order)]
        shape = graphs.shape(batch)
        assert shape is not None
        found_TD = graphs.run(batch, shape).clone()
        expected_TD = runner.forward(batch)
        torch.testing.assert_close(found_TD, expected_TD, rtol=2e-2, atol=2e-2)
        assert (expected_TD[0] - expected_TD[2]).abs().max() > 0.2
