"""On a GPU, a step ahead is launched without waiting for anything, and changes no token."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ids, request, run

from longwing.engine.ahead import Flight
from longwing.engine.engine import Engine
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "filtered": {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "log-probabilities": {"logprobs": 4},
    "no end too early": {"stop_token_ids": frozenset({7}), "min_new_tokens": 12},
}


def engine_on_gpu(folder: Path, overlap: str, dtype: str) -> Engine:
    options = EngineOptions(device="cuda", dtype=dtype, context=128, max_draft=0, overlap=overlap)
    return load_engine(folder, options)[0]


@contextmanager
def nothing_waits() -> Iterator[None]:
    """To wait for the GPU in here is an error, as far as PyTorch notices it."""
    try:  # from the first on: whatever setting the mode says, it is set
        set_sync_debug_mode("error")
        yield
    finally:
        set_sync_debug_mode("default")


def set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():  # once a process it warns that it does not notice all
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


def test_what_waits_is_an_error_inside_and_none_after() -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), nothing_waits():
        x.item()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert x.item() == 1


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the steps launched ahead; to wait for the GPU in one is an error."""
    launched: list[int] = []
    launch = Engine._launch_ahead

    def watched(engine: Engine, flight: Flight) -> Flight | None:
        with nothing_waits():
            ahead = launch(engine, flight)
        if ahead is not None:
            launched.append(len(ahead.batch))
        return ahead

    monkeypatch.setattr(Engine, "_launch_ahead", watched)
    return launched


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_step_ahead_waits_for_nothing_and_gives_the_same_tokens(
    kind: str, tiny_folder: Callable[[str], Path], launches: list[int]
) -> None:
    """One at a time: a batch padded otherwise would round otherwise, in 16 bits."""
    told = []
    for overlap in ("off", "on"):
        engine = engine_on_gpu(tiny_folder("falcon-40b"), overlap, "float16")
        engine.runner.record_graphs()
        assert engine.runner.graphs is not None
        told.append(
            [run(engine, [request([3, place], seed=place, **KINDS[kind])]) for place in (1, 2)]
        )
        engine.cache.check([])
    assert [ids(events["0"]) for events in told[0]] == [ids(events["0"]) for events in told[1]]
    assert launches == [1] * len(launches)
    assert len(launches) == 2 * 22  # of 24 tokens: not the first, and not after the last


def test_batch_on_a_gpu_is_told_the_same_with_and_without_overlap(
    tiny_folder: Callable[[str], Path],
) -> None:
    asked = [
        request(range(place + 1), max_new_tokens=10 + place, seed=place, **KINDS[kind])
        for place, kind in enumerate([*KINDS, *KINDS])
    ]
    told = [
        run(engine_on_gpu(tiny_folder("llama3"), overlap, "float32"), asked)
        for overlap in ("off", "on")
    ]
    assert [ids(events) for events in told[0].values()] == [
        ids(events) for events in told[1].values()
    ]
