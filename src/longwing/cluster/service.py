"""`ClusterService`: many engines as the server sees one. Plain Python; `front.py` gives it Ray.

Each group of requests goes to one replica. When that one dies, the group is asked again of another:
the seed is chosen here, a token is a function of prompt, seed and place, so the second answer
repeats the first; what was told already is skipped, and compared. Only if it differs (two kinds of
card may round differently) does a request fail, and says so.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from longwing.cluster.affinity import Preference, PrefixMap, block_names, document_key
from longwing.cluster.replica import Frame, info_from_wire
from longwing.engine.events import Event, Failed, Finished, PromptRead, Reading, Step, from_wire
from longwing.engine.request import MAX_SEED, Request
from longwing.engine.service import Answers
from longwing.engine.status import EngineInfo, EngineStats, StepRecord
from longwing.engine.wire import request_to_wire
from longwing.errors import EngineDeadError, LongwingError, OverloadedError

_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 5
_FIRST_WAIT_S = 0.1
"""Before the second attempt; doubled before each further one."""

_POLL_S = 2.0
"""How often the replicas are asked whether any of them is there."""

_GONE = Failed(kind="engine", message="the engine stopped while this request was at work")
_DIVERGED = Failed(
    kind="engine", message="the engine stopped, and another would not go on with the same text"
)


class ReplicaLostError(LongwingError):
    """A replica died, hung up or would not take a request: another may."""


class Replicas(Protocol):
    """The engines, wherever they are."""

    def answer(self, group: Sequence[dict[str, Any]], wish: Preference) -> AsyncGenerator[Frame]:
        """Hand a group to one of them; closing the iterator cancels it.

        Raises:
            ReplicaLostError: that one is lost.
        """
        ...

    async def info(self) -> dict[str, Any]:
        """What one of them says of itself; waits until there is one.

        Raises:
            ReplicaLostError: none answered.
        """
        ...


@dataclass(kw_only=True, eq=False)
class _Told:
    """What a request's client knows already."""

    request: Request
    ids: list[int] = field(default_factory=list)
    read: int = -1
    prompt_read: bool = False
    place: int = 0  # steps seen of the present attempt
    done: bool = False


class ClusterService:
    """The replicas as one engine, for one event loop: what `server.serving.Service` asks for.

    Args:
        replicas: the engines.
        max_requests: requests at work and waiting, beyond which new ones are refused.

    Attributes:
        status: "starting" (also while no replica answers), "ready", "draining" or "dead".
        info: what one replica serves; they are all alike.
        stats: all replicas' numbers, added up, as each last told them.
        on_step: called with a StepRecord for each step of any of them.
    """

    def __init__(self, replicas: Replicas, *, max_requests: int = 1024) -> None:
        self.status = "starting"
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.on_step: list[Callable[[StepRecord], None]] = []
        self._replicas = replicas
        self._max_requests = max_requests
        self._prefixes = PrefixMap()
        self._stats: dict[str, EngineStats] = {}
        self._loads: Counter[str] = Counter()
        self._num_open = 0
        self._groups: set[asyncio.Task[None]] = set()
        self._poll: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when one replica is there."""
        self.info = info_from_wire(await self._replicas.info())
        self.status = "ready"
        self._poll = asyncio.create_task(self._ask_often(), name="cluster poll")

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Hand over a group of requests.

        Raises:
            EngineDeadError: the service takes no more.
            OverloadedError: there are as many as may be; try again later.
        """
        if self.info is None or self.status in ("draining", "dead"):
            raise EngineDeadError(f"the engines are not taking requests: they are {self.status}")
        if self._num_open + len(requests) > self._max_requests:
            raise OverloadedError(
                f"{self._num_open} requests are at work or waiting, of at most {self._max_requests}"
            )
        told = [_Told(request=_with_seed(request)) for request in requests]

        def leave(index: int) -> None:
            told[index].done = True
            if all(item.done for item in told):
                task.cancel()

        answers = Answers(len(requests), leave)
        task = asyncio.create_task(self._see_through(told, answers), name="cluster group")
        self._groups.add(task)
        self._num_open += len(requests)

        def end(task: "asyncio.Task[None]") -> None:
            self._groups.discard(task)
            self._num_open -= len(requests)
            if not task.cancelled() and task.exception() is not None:
                _log.error("a group of requests failed", exc_info=task.exception())
            _fail(told, answers, _GONE)  # whatever happened, nobody waits for ever

        task.add_done_callback(end)
        return answers

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, and let those at work finish within `drain_s`."""
        self.status = "draining"
        if self._groups:
            await asyncio.wait(self._groups, timeout=drain_s)
        self.status = "dead"
        for task in list(self._groups):
            task.cancel()
        if self._groups:
            await asyncio.wait(self._groups)
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.wait([self._poll])

    async def _see_through(self, told: list[_Told], answers: Answers) -> None:
        """Ask until all of a group is answered, or too many replicas were lost with it."""
        names = block_names(told[0].request.prompt_ids)
        avoid: frozenset[str] = frozenset()
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            wish = Preference(
                reader=self._prefixes.reader(names),
                key=document_key(names),
                loads=dict(self._loads),
                avoid=avoid,
            )
            lost = await self._attempt(told, answers, names, wish)
            if all(item.done for item in told):
                return
            if lost is not None:
                avoid |= {lost}
        _fail(told, answers, _GONE)

    async def _attempt(
        self, told: list[_Told], answers: Answers, names: list[bytes], wish: Preference
    ) -> str | None:
        """Ask one replica for what is unfinished; its name, if it said it."""
        places = [place for place, item in enumerate(told) if not item.done]
        for place in places:
            told[place].place = 0
        group = [request_to_wire(told[place].request) for place in places]
        replica: str | None = None
        try:
            async with contextlib.aclosing(self._replicas.answer(group, wish)) as frames:
                async for frame in frames:
                    if replica is None:
                        replica = str(frame["replica"])
                        self._loads[replica] += 1
                        self._prefixes.learn(names, replica)
                    self._hear(frame, told, places, answers)
                    if all(item.done for item in told):
                        return replica
        except ReplicaLostError as error:
            _log.warning("replica %s was lost: %s", replica or "(not reached)", error)
            if replica is not None:
                self._lose(replica)
        finally:
            if replica is not None:
                self._loads[replica] -= 1
        return replica

    def _hear(
        self, frame: Frame, told: list[_Told], places: Sequence[int], answers: Answers
    ) -> None:
        self._count(frame["replica"], EngineStats(**frame["stats"]))
        for step in frame["steps"]:
            for observe in self.on_step:
                observe(StepRecord(**step))
        for index, wire in frame["events"]:
            event = from_wire(wire)
            if isinstance(event, Failed) and event.kind == "engine":
                raise ReplicaLostError(event.message)
            item = told[places[index]]
            new = None if item.done else _news(item, event)
            if new is not None:
                item.done = isinstance(new, (Finished, Failed))
                answers.tell(places[index], new)

    def _lose(self, replica: str) -> None:
        """Forget what a lost replica had read, and what it was doing."""
        self._prefixes.forget(replica)
        if replica in self._stats:
            idle = {"running": 0, "waiting": 0, "pages_used": 0, "pages_cached": 0}
            self._count(replica, replace(self._stats[replica], **idle))

    def _count(self, replica: str, stats: EngineStats) -> None:
        """Keep what a replica last told, and add all of them up."""
        self._stats[replica] = stats
        total: Counter[str] = Counter()
        for own in self._stats.values():
            total.update(asdict(own))
        self.stats = EngineStats(**total)

    async def _ask_often(self) -> None:
        """Know whether any replica is there: /health says it."""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await self._replicas.info()
            except ReplicaLostError as error:
                if self.status == "ready":
                    _log.error("no engine answers: %s", error)
                    self.status = "starting"
            else:
                if self.status == "starting":
                    self.status = "ready"


def _news(item: _Told, event: Event) -> Event | None:
    """What the client does not know yet; a failure if an answer is not the one it was told."""
    if isinstance(event, Reading):
        if item.ids or event.done <= item.read:
            return None
        item.read = event.done
    elif isinstance(event, PromptRead):
        if item.prompt_read:
            return None
        item.prompt_read = True
    elif isinstance(event, Step):
        place, item.place = item.place, item.place + 1
        if place < len(item.ids):
            return None if item.ids[place] == event.id else _DIVERGED
        item.ids.append(event.id)
    elif isinstance(event, Finished) and item.place < len(item.ids):
        return _DIVERGED
    return event


def _fail(told: Sequence[_Told], answers: Answers, event: Failed) -> None:
    for place, item in enumerate(told):
        if not item.done:
            item.done = True
            answers.tell(place, event)


def _with_seed(request: Request) -> Request:
    """The request with a seed, so that it can be asked twice."""
    if request.params.seed is not None:
        return request
    seed = secrets.randbelow(MAX_SEED + 1)
    return replace(request, params=replace(request.params, seed=seed))
