"""The benchmark measures what it says: the right contexts, real steps, floors by the plan room."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import SMALL

from longwing.engine.bench import Bench, quoted_share
from longwing.engine.ceilings import Ceilings
from longwing.engine.engine import Engine
from longwing.engine.findings import BenchSpec
from longwing.engine.folder import ModelFolder
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.sequence import Work
from longwing.errors import EngineError, RequestError
from longwing.plan import bytes_per_step, prefill_flops

Folder = Callable[[str], Path]

CEILINGS = Ceilings(bytes_per_s=1e9, flops_per_s=1e12)
OPTIONS = replace(SMALL, num_pages=256, max_draft=4, draft_sequences=4, context=256)


def bench_of(folder: Path, spec: BenchSpec, options: EngineOptions = OPTIONS) -> Bench:
    engine, info = load_engine(folder, options)
    return Bench(engine, info, ModelFolder.open(folder), CEILINGS, spec)


class Recorder:
    """What each step of an engine ran: (positions of first tokens, tokens of each sequence)."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[Work]] = []
        schedule = type(engine.scheduler).schedule

        def recorded(scheduler):
            works = schedule(scheduler)
            self.steps.append(works)
            return works

        monkeypatch.setattr(type(engine.scheduler), "schedule", recorded)

    @property
    def lengths(self) -> list[list[int]]:
        return [[len(work.token_ids) for work in works] for works in self.steps]


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-rw", "llama-dynamic"])
@pytest.mark.parametrize("reads", [False, True])
def test_decoding_is_timed_at_the_batch_and_context_that_were_asked_for(
    name: str, reads: bool, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BenchSpec(batches=(3,), contexts=(50,), tokens=4, repeats=2, reads=reads)
    bench = bench_of(tiny_folder(name), spec)
    seen = Recorder(bench.engine, monkeypatch)
    (line,) = (measure() for measure in bench.measurements())
    timed = seen.steps[-8:]
    assert all([len(work.token_ids) for work in works] == [1, 1, 1] for works in timed)
    assert all(50 <= work.start < 50 + spec.room for works in timed for work in works)
    read = sum(length for step in seen.lengths for length in step if length > 1)
    assert read == (3 * 50 if reads else 3 * (50 % 8))
    assert (line.what, line.batch, line.context) == ("decode", 3, 50)
    assert 0 < line.ms_low <= line.ms <= line.ms_high
    assert line.tokens_per_s == pytest.approx(3e3 / line.ms)


def test_floors_are_the_plan_rooms(tiny_folder: Folder) -> None:
    spec = BenchSpec(batches=(2,), contexts=(40,), prompts=(30,), tokens=1, repeats=1)
    bench = bench_of(tiny_folder("falcon-40b"), spec)
    decode, prefill = (measure() for measure in bench.measurements())
    planned = bench.plan(2, 40)
    assert planned is not None
    assert decode.floor_ms == pytest.approx(1e3 * bytes_per_step(planned) / 1e9)
    assert decode.of_ceiling == pytest.approx(decode.floor_ms / decode.ms)
    flops = prefill_flops(bench.folder.config, 30)
    assert prefill.floor_ms == pytest.approx(1e3 * flops / 1e12)


def test_a_prompt_is_read_whole_every_time(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BenchSpec(decodes=False, prompts=(100,), repeats=3)
    bench = bench_of(tiny_folder("llama3"), spec)
    seen = Recorder(bench.engine, monkeypatch)
    (line,) = (measure() for measure in bench.measurements())
    assert sum(sum(step) for step in seen.lengths) == 3 * 100
    assert line.tokens_per_s == pytest.approx(100e3 / line.ms)


def test_checking_drafts_brings_as_many_in_every_timed_step(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BenchSpec(decodes=False, batches=(2,), contexts=(40,), drafts=(3,), tokens=4, repeats=2)
    bench = bench_of(tiny_folder("falcon-7b"), spec)
    seen = Recorder(bench.engine, monkeypatch)
    (line,) = (measure() for measure in bench.measurements())
    assert all(step == [4, 4] for step in seen.lengths[-8:])
    assert (line.what, line.drafts) == ("check drafts", 3)


def test_an_invented_context_leaves_the_engine_as_it_was(tiny_folder: Folder) -> None:
    spec = BenchSpec(batches=(2,), contexts=(60,), tokens=2, repeats=1)
    bench = bench_of(tiny_folder("falcon-40b"), spec)
    options = bench.engine.options
    for measure in bench.measurements():
        measure()
    assert not bench.engine.busy
    assert bench.engine.cache.num_free == bench.engine.cache.num_pages
    bench.engine.cache.check([])
    assert bench.engine.options == options


def test_what_the_cache_cannot_hold_is_said_and_not_measured(tiny_folder: Folder) -> None:
    spec = BenchSpec(batches=(1, 40), contexts=(60,), tokens=1, repeats=1)
    one, forty = (m() for m in bench_of(tiny_folder("falcon-40b"), spec).measurements())
    assert one.ms is not None
    assert forty.ms is forty.of_ceiling is None
    assert forty.note == "the cache holds 2,048 tokens"


def test_a_batch_whose_first_has_ended_before_its_last_begins_is_not_measured(
    tiny_folder: Folder,
) -> None:
    spec = BenchSpec(batches=(2,), contexts=(120,), tokens=2, repeats=1, reads=True)
    small = replace(OPTIONS, max_beside_tokens=1)
    bench = bench_of(tiny_folder("falcon-40b"), spec, small)
    (line,) = (measure() for measure in bench.measurements())
    assert line.ms is None
    assert line.note.startswith("1 of 2 at work")


def test_quoting_compares_one_answer_with_and_without_drafts(tiny_folder: Folder) -> None:
    spec = BenchSpec(decodes=False, repeats=1)
    bench = bench_of(tiny_folder("llama2"), spec)
    prompt = [5, 6, 7, 8] * 10
    found = bench.quoting(prompt, 40)
    assert found.same
    assert found.num_tokens == 40
    assert 0 <= found.num_accepted <= found.num_drafted
    assert found.gain == pytest.approx(found.tokens_per_s / found.plain_tokens_per_s)


@pytest.mark.parametrize(
    ("answer", "share"),
    [([1, 2, 3, 4, 5], 1.0), ([9, 2, 3, 4, 5], 0.5), ([5, 4, 3, 2], 0.0), ([1], 0)],
)
def test_a_token_is_quoted_if_four_in_a_row_stand_in_the_prompt(
    answer: list[int], share: float
) -> None:
    assert quoted_share([1, 2, 3, 4, 5, 6], answer) == share


@pytest.mark.parametrize(
    "wrong", [{"batches": (0,)}, {"tokens": 0}, {"prompts": (-1,)}, {"contexts": ()}]
)
def test_numbers_that_nothing_can_be_measured_at_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        BenchSpec(**wrong)  # type: ignore[arg-type]


def test_without_a_prefix_cache_contexts_must_be_read(tiny_folder: Folder) -> None:
    options = EngineOptions(device="cpu", prefix_cache=False)
    with pytest.raises(RequestError, match="must really be read"):
        Bench.load(tiny_folder("llama2"), options, BenchSpec())


def test_a_measurement_that_fails_says_why(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BenchSpec(batches=(1,), contexts=(20,), tokens=1, repeats=1)
    bench = bench_of(tiny_folder("llama2"), spec)
    for parameter in bench.engine.model.parameters():
        with torch.no_grad():
            parameter.fill_(float("nan"))
    with pytest.raises(EngineError, match="a measurement failed"):
        bench.decode(1, 20)
