"""Small engines for the tests, and ways to drive them to the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longwing.engine.engine import Engine
from longwing.engine.events import Event, Failed, Finished, Step
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams

SMALL = EngineOptions(
    dtype="float32", num_pages=64, page_len=8, max_batch_tokens=64, max_sequences=16, max_draft=0
)


def engine_of(folder: Path, **settings: Any) -> Engine:
    return load_engine(folder, replace(SMALL, **settings))[0]


def request(prompt_ids: Iterable[int], **settings: Any) -> Request:
    """Greedy, 24 tokens, end tokens ignored, unless told otherwise."""
    own = {name: settings.pop(name) for name in REQUEST_FIELDS if name in settings}
    params = {"max_new_tokens": 24, "ignore_eos": True, **settings}
    return Request(prompt_ids=tuple(prompt_ids), params=SamplingParams(**params), **own)


def run(
    engine: Engine, requests: Mapping[str, Request] | Sequence[Request]
) -> dict[str, list[Event]]:
    """All at once, to the end; each one's events."""
    if not isinstance(requests, Mapping):
        requests = {str(place): item for place, item in enumerate(requests)}
    for name, item in requests.items():
        engine.add(name, item)
    told: dict[str, list[Event]] = {name: [] for name in requests}
    finish(engine, told)
    return told


def finish(engine: Engine, told: dict[str, list[Event]]) -> None:
    for _ in range(5000):
        if not engine.busy:
            break
        for name, event in engine.step():
            told[name].append(event)
    assert not engine.busy
    for events in told.values():
        assert isinstance(events[-1], (Finished, Failed))
        assert sum(isinstance(event, (Finished, Failed)) for event in events) == 1


def ids(events: Iterable[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Step)]


def text(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Step))


REQUEST_FIELDS = ("grammar", "salt", "adapter", "include_stop", "prompt_logprobs")
