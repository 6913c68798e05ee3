"""`Replica`: one engine of many, and what it says in frames of plain data. Knows no Ray.

A call is a group of requests; its answer a stream of frames, each with the events since the last
one, so that a busy engine sends few large frames and an idle one small ones at once.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from longwing.engine.events import Event, to_wire
from longwing.engine.service import Answers, EngineService
from longwing.engine.status import EngineInfo, StepRecord
from longwing.engine.wire import request_from_wire
from longwing.errors import EngineDeadError

Frame = dict[str, Any]
"""replica: who speaks. events: [place in the group, event]. stats: of its engine. steps: those
since the last frame to anyone."""

_MAX_STEPS = 10_000
"""Records of steps kept for the next frame."""


class Replica:
    """An engine that answers groups of requests; start it before use.

    Args:
        name: what the fronts know it by.
        service: its engine.
    """

    def __init__(self, name: str, service: EngineService) -> None:
        self.name = name
        self.service = service
        self._steps: list[StepRecord] = []
        service.on_step.append(self._record)

    async def start(self) -> None:
        """Load the model; returns when it can answer.

        Raises:
            EngineDeadError: it could not be loaded.
        """
        await self.service.start()

    def info(self) -> dict[str, Any]:
        """The engine's `EngineInfo`, as plain data.

        Raises:
            EngineDeadError: it has not started.
        """
        if self.service.info is None or self.service.status != "ready":
            raise EngineDeadError(f"the engine is {self.service.status}")
        return asdict(self.service.info)

    def check(self) -> None:
        """Whether the engine can be used again, if not now.

        Raises:
            EngineDeadError: it will not come back by itself.
        """
        if self.service.status == "dead":
            raise EngineDeadError("the engine died too often")

    async def answer(self, group: Sequence[dict[str, Any]]) -> AsyncIterator[Frame]:
        """Frames until each request of the group has ended; what is left unread is cancelled.

        Args:
            group: requests, as `engine.wire` writes them.

        Raises:
            EngineDeadError: the engine is not there to take them.
            OverloadedError: there are as many requests as may be.
        """
        with self.service.submit([request_from_wire(wire) for wire in group]) as answers:
            yield self._frame([])  # who answers, before the prompt is read
            pump = _Pump(answers)
            try:
                while events := await pump.take():
                    yield self._frame(events)
            finally:
                await pump.stop()

    async def stop(self, drain_s: float) -> None:
        """Let requests at work finish, and end the engine."""
        await self.service.stop(drain_s)

    def _record(self, step: StepRecord) -> None:
        if len(self._steps) < _MAX_STEPS:
            self._steps.append(step)

    def _frame(self, events: Sequence[tuple[int, Event]]) -> Frame:
        steps, self._steps = self._steps, []
        return {
            "replica": self.name,
            "events": [[index, to_wire(event)] for index, event in events],
            "stats": asdict(self.service.stats),
            "steps": [asdict(step) for step in steps],
        }


class _Pump:
    """Events as they come, taken in handfuls."""

    def __init__(self, answers: Answers) -> None:
        self._events: list[tuple[int, Event]] = []
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._fill(answers), name="replica pump")

    async def _fill(self, answers: Answers) -> None:
        try:
            async for item in answers:
                self._events.append(item)
                self._news.set()
        finally:
            self._news.set()

    async def take(self) -> list[tuple[int, Event]]:
        """What came since the last time, waiting for something; empty at the end."""
        while not self._events and not self._task.done():
            self._news.clear()
            await self._news.wait()
            # The end is told before the task is done: let it end.
            await asyncio.sleep(0)
        taken, self._events = self._events, []
        return taken

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def info_from_wire(wire: dict[str, Any]) -> EngineInfo:
    """Undo `Replica.info`."""
    return EngineInfo.from_wire(wire)
