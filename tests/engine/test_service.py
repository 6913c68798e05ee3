"""The engine in a process of its own: its answers, its refusals, its death and its end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from engines import SMALL, ids, request

from longwing.engine.events import Event, Failed, Finished, Step, from_wire, to_wire
from longwing.engine.generator import load
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.request import Grammar, Request, SamplingParams
from longwing.engine.service import EngineService, engine_process
from longwing.engine.wire import body_len, from_body, request_from_wire, request_to_wire, to_frame
from longwing.engine.worker import engine_thread
from longwing.errors import EngineDeadError, EngineError, OverloadedError

Folder = Callable[[str], Path]


def in_thread(folder: Path, **settings: Any) -> EngineService:
    options = {name: settings.pop(name) for name in list(settings) if hasattr(SMALL, name)}
    launch = engine_thread(
        lambda progress: load_engine(folder, replace(SMALL, **options), progress=progress)
    )
    return EngineService(launch, **settings)


def in_process(folder: Path, **settings: Any) -> EngineService:
    return EngineService(engine_process(folder, SMALL), **settings)


def serve(service: EngineService, use: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        await service.start()
        try:
            await use()
        finally:
            await service.stop(0)
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not leftover

    asyncio.run(whole())


async def answer(service: EngineService, *requests: Request) -> list[list[Event]]:
    told: list[list[Event]] = [[] for _ in requests]
    with service.submit(requests) as answers:
        async for index, event in answers:
            told[index].append(event)
    return told


@pytest.mark.parametrize("launched", [in_thread, in_process])
def test_answers_are_the_plain_paths(
    launched: Callable[..., EngineService], tiny_folder: Folder
) -> None:
    folder = tiny_folder("falcon-40b")
    plain = load(folder)
    service = launched(folder)
    progress: list[tuple[int, int]] = []
    service.on_loading.append(lambda done, total: progress.append((done, total)))

    async def use() -> None:
        prompts = [[1, 2, 3], list(range(70)), [9]]
        told = await answer(service, *(request(prompt) for prompt in prompts))
        for events, prompt in zip(told, prompts, strict=True):
            alone = plain.generate(prompt, max_new_tokens=24, ignore_eos=True)
            assert ids(events) == alone.token_ids
            assert isinstance(events[-1], Finished)
        assert service.info is not None
        assert (service.info.context, service.info.rope_method) == (256, "default")
        assert service.stats.num_generated_tokens == 72
        assert service.num_open == 0

    serve(service, use)
    assert progress[-1][0] == progress[-1][1] > 0
    assert service.status == "dead"


def test_killed_engine_fails_its_requests_and_comes_back(tiny_folder: Folder) -> None:
    service = in_process(tiny_folder("falcon-40b"))

    async def use() -> None:
        with service.submit(
            [request([1], max_new_tokens=200), request([2], max_new_tokens=200)]
        ) as answers:
            last: dict[int, Event] = {}
            killed = False
            async for index, event in answers:
                last[index] = event
                if isinstance(event, Step) and not killed:
                    killed = True
                    os.kill(service._host._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        assert [type(event) for event in last.values()] == [Failed, Failed]
        assert {event.kind for event in last.values()} == {"engine"}  # type: ignore[union-attr]
        assert service.status == "starting"
        with pytest.raises(EngineDeadError, match="starting"):
            service.submit([request([1])])
        async with asyncio.timeout(60):
            while service.status == "starting":
                await asyncio.sleep(0.05)
        (events,) = await answer(service, request([1, 2, 3]))
        assert isinstance(events[-1], Finished)

    serve(service, use)


def test_engine_that_was_idle_for_long_is_not_taken_for_a_hung_one(tiny_folder: Folder) -> None:
    service = in_process(tiny_folder("falcon-40b"), hang_s=0.5)

    async def use() -> None:
        for _ in range(3):
            await asyncio.sleep(0.7)  # longer than an engine may be silent while it has work
            ((*_, last),) = await answer(service, request([1], max_new_tokens=20))
            assert isinstance(last, Finished)

    serve(service, use)


def test_engine_that_cannot_be_launched_is_told_as_such() -> None:
    def launch(_sock: Any) -> Any:
        raise OSError("no more processes")

    async def start() -> None:
        service = EngineService(launch)
        with pytest.raises(EngineError, match="no more processes"):
            await service.start()
        await service.stop(0)
        assert service.status == "dead"

    asyncio.run(start())


def test_engine_ends_at_once_whatever_an_error_holds() -> None:
    """On a GPU that waits for a lost rank, to free what the error's frames hold takes for ever."""
    program = """
import threading
from longwing.engine import worker
from longwing.errors import EngineError

class Graph:
    def __del__(self):
        threading.Event().wait()

def run(sock, load):
    graph = Graph()
    raise EngineError("the group of 2 is lost")

worker.run = run
worker.main()
"""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = {"path": "x", "options": asdict(EngineOptions()), "log_level": "INFO"}
        done = subprocess.run(
            [sys.executable, "-c", program, str(theirs.fileno())],
            env={**os.environ, "LONGWING_ENGINE": json.dumps(words)},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "CRITICAL engine: the group of 2 is lost" in done.stderr


def test_more_requests_than_may_be_are_refused_at_once(tiny_folder: Folder) -> None:
    service = in_thread(tiny_folder("falcon-40b"), max_requests=3, max_tokens=600)

    async def use() -> None:
        with service.submit([request([1], max_new_tokens=250)] * 2):
            with pytest.raises(
                OverloadedError, match="2 requests are at work or waiting, of at most 3"
            ):
                service.submit([request([1])] * 2)
            with pytest.raises(OverloadedError, match="would exceed the limit of 600"):
                service.submit([request([1], max_new_tokens=150)])
        assert service.num_open == 0
        await answer(service, request([1]))  # leaving the block made room

    serve(service, use)


def test_cancelled_requests_leave_no_pages(tiny_folder: Folder) -> None:
    service = in_thread(tiny_folder("falcon-40b"))

    async def use() -> None:
        for _ in range(20):
            with service.submit([request([1, 2], max_new_tokens=250)] * 3) as answers:
                async for _, event in answers:
                    if isinstance(event, Step):
                        break
        await answer(service, request([5], max_new_tokens=1))
        assert (service.stats.pages_used, service.stats.running, service.stats.waiting) == (0, 0, 0)

    serve(service, use)


def test_stopping_lets_answers_finish_and_takes_no_new_ones(tiny_folder: Folder) -> None:
    service = in_process(tiny_folder("falcon-40b"))

    async def use() -> None:
        running = asyncio.create_task(answer(service, request([1], max_new_tokens=100)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(service.stop(60))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="draining"):
            service.submit([request([1])])
        ((*_, last),) = await running
        assert isinstance(last, Finished)
        await stopping

    serve(service, use)


def test_answers_that_take_too_long_to_finish_are_failed(tiny_folder: Folder) -> None:
    service = in_thread(tiny_folder("falcon-40b"))

    async def use() -> None:
        running = asyncio.create_task(answer(service, request([1], max_new_tokens=255)))
        await asyncio.sleep(0)
        await service.stop(0)
        ((*_, last),) = await running
        assert last == Failed(kind="engine", message="the server is shutting down")

    serve(service, use)


def test_model_that_cannot_be_loaded_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")

    async def start() -> None:
        service = EngineService(engine_process(tmp_path, SMALL))
        with pytest.raises(EngineError, match=r"config\.json"):
            await service.start()
        assert service.status == "dead"
        await service.stop(0)

    asyncio.run(start())


def test_request_at_fault_fails_alone_and_says_why(tiny_folder: Folder) -> None:
    service = in_thread(tiny_folder("falcon-40b"))

    async def use() -> None:
        bad = request([1], grammar=Grammar(kind="regex", source="(("))
        first, second = await answer(service, bad, request([1]))
        assert isinstance(first[-1], Failed)
        assert first[-1].kind == "request"
        assert isinstance(second[-1], Finished)

    serve(service, use)


def test_answer_larger_than_a_frame_fails_its_own_request_alone(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = in_thread(tiny_folder("falcon-40b"))

    async def use() -> None:
        monkeypatch.setattr("longwing.engine.wire.MAX_FRAME", 4096)
        large = request(range(100), prompt_logprobs=5)
        first, second = await answer(service, large, request([1]))
        assert isinstance(first[-1], Failed)
        assert "4,096" in first[-1].message
        assert isinstance(second[-1], Finished)

    serve(service, use)


def test_requests_and_events_survive_the_wire() -> None:
    item = Request(
        prompt_ids=(1, 2),
        params=SamplingParams(
            max_new_tokens=3, stop=("a", "ü"), stop_token_ids=frozenset({7}), seed=2**64 - 1
        ),
        grammar=Grammar(kind="regex", source="a+"),
        salt="me",
        include_stop=True,
        prompt_logprobs=2,
    )
    frame = to_frame(request_to_wire(item))
    assert body_len(frame[:4]) == len(frame) - 4
    assert request_from_wire(from_body(frame[4:])) == item
    event = Step(id=1, piece="ü", special=False, text="ü", logprob=-0.5, top=((1, -0.5), (2, -1.0)))
    assert from_wire(from_body(to_frame(to_wire(event))[4:])) == event
    with pytest.raises(EngineError, match="limit"):
        body_len(b"\xff\xff\xff\xff")
