"""`EngineService`: the engine as the server sees it, an asyncio object without torch.

The engine runs in a process of its own, so that neither its work nor its death stops the server
from answering. Requests go out and events come back over a socket (`wire.py`). Every request that
was accepted gets exactly one `Finished` or `Failed`, also when the engine is killed; it is then
started again, a few times.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from longwing.engine.events import Event, Failed, Finished, from_wire
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request
from longwing.engine.status import EngineInfo, EngineStats, StepRecord
from longwing.engine.wire import HEADER, body_len, from_body, request_to_wire, to_frame
from longwing.errors import EngineDeadError, LongwingError, OverloadedError

_log = logging.getLogger(__name__)

_OWN_END_S = 2.0
"""How long an engine whose socket is closed may take to give its memory back."""

_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 600.0
"""An engine that dies more often than that in this time stays dead: it would only die again."""

_GONE = Failed(kind="engine", message="the engine stopped while this request was at work")


class Host(Protocol):
    """Where an engine lives."""

    def alive(self) -> bool:
        """Whether it still runs."""

    def kill(self) -> None:
        """End it now, and wait for its end."""


Launch = Callable[[socket.socket], Host]
"""Starts an engine on its end of a socket pair."""


class Answers:
    """The events of a group of requests, as they come; cancels what is unfinished when left.

    Use as `with service.submit(requests) as answers: async for index, event in answers: ...`.
    """

    def __init__(self, num: int, cancel: Callable[[int], None]) -> None:
        self._open = set(range(num))
        self._num_untold = num
        self._cancel = cancel
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._num_untold:
            index, event = await self._events.get()
            self._num_untold -= isinstance(event, (Finished, Failed))
            yield index, event

    def cancel(self) -> None:
        """Drop every unfinished request of the group; no event follows. Idempotent."""
        for index in sorted(self._open):
            self._cancel(index)
        self._num_untold -= len(self._open)
        self._open.clear()

    def tell(self, index: int, event: Event) -> None:
        """Pass an event on; what comes after the end, or after a cancellation, is dropped."""
        if index in self._open:
            if isinstance(event, (Finished, Failed)):
                self._open.discard(index)
            self._events.put_nowait((index, event))


class EngineService:
    """One engine, for one event loop.

    Args:
        launch: starts an engine; `engine_process` makes one that does.
        max_requests: requests at work and waiting, beyond which new ones are refused.
        max_tokens: the same for the sum of their prompts and longest answers; None: four times what
            the cache holds.
        hang_s: an engine that is silent for so long while it has work is killed.

    Attributes:
        status: "starting", "ready", "draining" or "dead".
        info: what is served; None until it is ready for the first time.
        stats: how the engine is doing, as of its last step.
        on_step: called with a StepRecord after each step.
        on_loading: called with (bytes read, bytes in all) while the model is loaded.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        max_requests: int = 128,
        max_tokens: int | None = None,
        hang_s: float = 300.0,
    ) -> None:
        self.status = "starting"
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.on_loading: list[Callable[[int, int], None]] = []
        self._launch = launch
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._hang_s = hang_s
        self._ids = itertools.count()
        self._open: dict[str, _Open] = {}
        self._num_tokens = 0
        self._host: Host | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._heard = 0.0
        self._deaths: list[float] = []

    @property
    def num_open(self) -> int:
        """Requests at work and waiting."""
        return len(self._open)

    async def start(self) -> None:
        """Launch the engine, and return when it is ready.

        Raises:
            EngineDeadError: it could not be started; says what it said.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name="engine service")
        await self._ready

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Hand over a group of requests: samples of one prompt, or the prompts of one call.

        Raises:
            EngineDeadError: the engine is not there to take them.
            OverloadedError: there are as many as may be; try again later.
        """
        if self.status != "ready" or self._writer is None:
            raise EngineDeadError(f"the engine is not taking requests: it is {self.status}")
        costs = [len(item.prompt_ids) + (item.params.max_new_tokens or 0) for item in requests]
        self._admit(len(requests), sum(costs))
        ids = [str(next(self._ids)) for _ in requests]
        frames = [
            to_frame({"op": "add", "id": request_id, "request": request_to_wire(request)})
            for request_id, request in zip(ids, requests, strict=True)
        ]
        if not self._open:
            self._heard = time.monotonic()  # an idle engine says nothing: its silence begins now
        answers = Answers(len(requests), lambda index: self._drop(ids[index]))
        for index, (request_id, frame, cost) in enumerate(zip(ids, frames, costs, strict=True)):
            self._open[request_id] = _Open(answers, index, cost)
            self._num_tokens += cost
            self._writer.write(frame)
        self._idle.clear()
        return answers

    async def stop(
        self, drain_s: float = 90.0, *, reason: str = "the server is shutting down"
    ) -> None:
        """Take no more requests, let those at work finish, and end the engine.

        Args:
            drain_s: how long they may take; what is unfinished then fails.
            reason: what its clients are told.
        """
        self.status = "draining"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_s)
        self.status = "dead"
        self._fail_all(Failed(kind="engine", message=reason))
        if self._writer is not None:
            self._send({"op": "stop"})
        if self._task is not None:
            await asyncio.wait([self._task], timeout=5.0)
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._end_host()

    def resume(self) -> None:
        """Take requests again, where `stop` was cancelled while it waited for those at work."""
        if self.status == "draining" and self._task is not None:
            self.status = "dead" if self._task.done() else "ready"

    def _admit(self, num: int, cost: int) -> None:
        """Refuse what would be too much."""
        if self.num_open + num > self._max_requests:
            raise OverloadedError(
                f"{self.num_open} requests are at work or waiting, of at most {self._max_requests}"
            )
        limit = self._max_tokens
        if limit is None and self.info is not None:
            limit = 4 * self.info.num_pages * self.info.page_len
        # A lone request is never too much: whether it fits is for the engine to say.
        if limit is not None and self._open and self._num_tokens + cost > limit:
            raise OverloadedError(
                f"{self._num_tokens:,} tokens are at work or waiting, and {cost:,} more would "
                f"exceed the limit of {limit:,}"
            )

    async def _keep(self) -> None:
        """Run engines, one after the death of another, until the service stops."""
        while self.status in ("starting", "ready"):
            try:
                await self._run_one()
            except Exception as error:
                _log.exception("the engine could not be launched, or said what nobody understands")
                self._tell_start(EngineDeadError(f"the engine could not be started: {error}"))
            self._fail_all(_GONE)
            if self.status not in ("starting", "ready"):
                return
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < _RESTART_WINDOW_S] + [now]
            first_start = self._ready is not None and not self._ready.done()
            if first_start or len(self._deaths) > _MAX_RESTARTS:
                self.status = "dead"
                self._tell_start(EngineDeadError("the engine ended before it was ready"))
                return
            _log.error("the engine died; starting it again")
            self.status = "starting"

    async def _run_one(self) -> None:
        """One engine, from its launch to its end."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._host = self._launch(theirs)
        except OSError:
            ours.close()
            raise
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._heard = time.monotonic()
        watch = asyncio.create_task(self._watch(self._host), name="engine watchdog")
        try:
            while True:
                body = await reader.readexactly(body_len(await reader.readexactly(HEADER.size)))
                self._heard = time.monotonic()
                self._hear(from_body(body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the engine's end, wanted or not
        finally:
            if self.status == "ready":
                self.status = "starting"
            self.stats = EngineStats()
            watch.cancel()
            self._writer.close()
            self._writer = None
            await self._end_host()

    def _hear(self, message: dict[str, Any]) -> None:
        """Obey one message of the engine."""
        op = message["op"]
        if op == "events":
            for request_id, wire in message["events"]:
                self._pass_on(request_id, from_wire(wire))
            self.stats = EngineStats(**message["stats"])
            for step in message["steps"]:
                for observe in self.on_step:
                    observe(StepRecord(**step))
        elif op == "loading":
            for progress in self.on_loading:
                progress(message["done"], message["total"])
        elif op == "ready":
            self.info = EngineInfo.from_wire(message["info"])
            if self.status == "starting":
                self.status = "ready"
            self._tell_start(None)
        elif op == "refused":
            _log.error("the engine could not start: %s", message["message"])
            if self._ready is not None and not self._ready.done():
                self.status = "dead"  # the first start: there is nothing to try again for
                self._tell_start(EngineDeadError(message["message"]))

    def _pass_on(self, request_id: str, event: Event) -> None:
        entry = self._open.get(request_id)
        if entry is None:
            return  # cancelled meanwhile
        if isinstance(event, (Finished, Failed)):
            self._forget(request_id)
        entry.answers.tell(entry.index, event)

    def _drop(self, request_id: str) -> None:
        """Cancel one request."""
        if request_id in self._open:
            self._forget(request_id)
            self._send({"op": "cancel", "id": request_id})

    def _forget(self, request_id: str) -> None:
        self._num_tokens -= self._open.pop(request_id).cost
        if not self._open:
            self._idle.set()

    def _fail_all(self, event: Failed) -> None:
        for request_id in list(self._open):
            self._pass_on(request_id, event)

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(to_frame(message))

    def _tell_start(self, error: LongwingError | None) -> None:
        """Let `start` return or raise; only the first call counts."""
        if self._ready is not None and not self._ready.done():
            if error is None:
                self._ready.set_result(None)
            else:
                self._ready.set_exception(error)

    async def _watch(self, host: Host) -> None:
        """Kill an engine that is silent while it has work."""
        while True:
            await asyncio.sleep(min(self._hang_s / 10, 5.0))
            if self._open and time.monotonic() - self._heard > self._hang_s:
                _log.error("the engine has been silent for %.0f s: killing it", self._hang_s)
                await asyncio.to_thread(host.kill)

    async def _end_host(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            await asyncio.to_thread(host.kill)


class _Open:
    """A request that was accepted and has not ended."""

    __slots__ = ("answers", "cost", "index")

    def __init__(self, answers: Answers, index: int, cost: int) -> None:
        self.answers, self.index, self.cost = answers, index, cost


class _Process:
    """An engine in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_OWN_END_S)  # one that is ending by itself may do so
            return
        if hasattr(signal, "SIGUSR1"):
            self._process.send_signal(signal.SIGUSR1)  # where it stands, to its stderr
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.5)
        self._process.kill()
        self._process.wait()


def _without_keys() -> dict[str, str]:
    """This process's environment, less the keys of its API: the engine has no use for them."""
    secret = ("API_KEY", "ADMIN_KEY")
    return {
        name: value
        for name, value in os.environ.items()
        if not any(word in name for word in secret)
    }


def engine_process(path: Path, options: EngineOptions, *, log_level: str = "WARNING") -> Launch:
    """How to start an engine for a model folder in a process of its own.

    Args:
        path: the model folder.
        options: how to load and serve it.
        log_level: what the process writes to stderr.
    """

    def launch(sock: socket.socket) -> Host:
        settings = {"path": str(path), "options": asdict(options), "log_level": log_level}
        return _Process(
            subprocess.Popen(
                # -P: a file of the folder we stand in must not pass for a module.
                [sys.executable, "-P", "-m", "longwing.engine.worker", str(sock.fileno())],
                pass_fds=[sock.fileno()],
                stdin=subprocess.DEVNULL,
                env={**_without_keys(), "LONGWING_ENGINE": json.dumps(settings)},
            )
        )

    return launch
