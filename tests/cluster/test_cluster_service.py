"""Many engines as one: what a client is told when one of them dies."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from longwing.cluster import service as cluster_service
from longwing.cluster.affinity import Preference, ranked
from longwing.cluster.replica import Frame, Replica
from longwing.cluster.service import ClusterService, ReplicaLostError
from longwing.engine.events import Event, Failed, Finished, Step, to_wire
from longwing.engine.request import FinishReason, Request, SamplingParams
from longwing.engine.service import Answers
from longwing.engine.status import EngineInfo, EngineStats
from longwing.engine.wire import request_from_wire
from longwing.errors import EngineDeadError, OverloadedError

INFO = EngineInfo(
    name="m", architecture="falcon", quantization="none", dtype="float32", kv_dtype="float32",
    device="cpu", device_name="", vocab_size=9, context=4096, num_pages=9, page_len=8, kv_bytes=1,
    weight_bytes=1, max_sequences=8, max_batch_tokens=8, rope_method="default", rope_rungs=(4096,),
)  # fmt: skip


class Fleet:
    """Replicas that count up from a number their prompt and seed give; they die when told to."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.dies_after: dict[str, int] = {}
        self.asked: list[str] = []
        self.left: list[str] = []
        self.differs: set[str] = set()

    async def info(self) -> dict[str, Any]:
        if not self.names:
            raise ReplicaLostError("none")
        return asdict(INFO)

    async def answer(
        self, group: Sequence[dict[str, Any]], wish: Preference
    ) -> AsyncGenerator[Frame]:
        if not self.names:
            raise ReplicaLostError("none")
        name = ranked(self.names, wish)[0]
        self.asked.append(name)
        yield self._frame(name, [])
        try:
            requests = [request_from_wire(wire) for wire in group]
            for place in range(max(item.params.max_new_tokens or 0 for item in requests)):
                await asyncio.sleep(0)
                if self.dies_after.get(name) == place:
                    self.names.remove(name)
                    raise ReplicaLostError("killed")
                events = [
                    [index, event]
                    for index, item in enumerate(requests)
                    for event in self._say(name, item, place)
                ]
                yield self._frame(name, events)
        except (GeneratorExit, asyncio.CancelledError):
            self.left.append(name)
            raise

    def _say(self, name: str, item: Request, place: int) -> list[dict[str, Any]]:
        total = item.params.max_new_tokens or 0
        if place >= total:
            return []
        token = (sum(item.prompt_ids) + (item.params.seed or 0) + place) % 1000
        token += name in self.differs
        step = Step(id=token, piece=f"{token} ", special=False, text=f"{token} ")
        if place < total - 1:
            return [to_wire(step)]
        end = Finished(
            reason=FinishReason.LENGTH, seed=item.params.seed or 0, prompt_len=len(item.prompt_ids),
            cached_len=0, num_generated=total, queue_s=0.0, prefill_s=0.0, decode_s=0.0,
        )  # fmt: skip
        return [to_wire(step), to_wire(end)]

    def _frame(self, name: str, events: list[Any]) -> Frame:
        stats = asdict(EngineStats(running=1, num_steps=2))
        return {"replica": name, "events": events, "stats": stats, "steps": []}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_service, "_FIRST_WAIT_S", 0.0)


def use(fleet: Fleet, work: Callable[[ClusterService], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        service = ClusterService(fleet, max_requests=8)
        await service.start()
        await work(service)
        await service.stop(1)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left

    asyncio.run(whole())


def ask(seed: int | None = 5, num: int = 10, prompt: Sequence[int] = (1, 2)) -> Request:
    params = SamplingParams(max_new_tokens=num, seed=seed, temperature=1.0)
    return Request(prompt_ids=tuple(prompt), params=params)


async def listen(answers: Answers, num: int = 1) -> list[list[Event]]:
    told: list[list[Event]] = [[] for _ in range(num)]
    with answers:
        async for index, event in answers:
            told[index].append(event)
    return told


def ids(events: Sequence[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Step)]


@pytest.mark.parametrize("place", [0, 1, 5, 9])
def test_answer_goes_on_where_a_dead_replica_left_it(place: int) -> None:
    fleet = Fleet("a", "b")

    async def work(service: ClusterService) -> None:
        for name in ("a", "b"):
            fleet.names = ["a", "b"]
            fleet.dies_after = {name: place}
            fleet.asked.clear()
            (told,) = await listen(service.submit([ask(prompt=range(len(name), 90))]))
            alone = [(sum(range(1, 90)) + 5 + step) % 1000 for step in range(10)]
            assert ids(told) == alone
            assert isinstance(told[-1], Finished)
        assert fleet.asked

    use(fleet, work)


def test_request_without_a_seed_gets_one_and_is_repeated_with_it() -> None:
    fleet = Fleet("a", "b")
    fleet.dies_after = {"a": 4, "b": 4}

    async def work(service: ClusterService) -> None:
        first = fleet.names[:]
        answers = service.submit([ask(seed=None)])
        async for _, event in answers:
            if isinstance(event, Step) and len(fleet.asked) == 1:
                fleet.dies_after = {fleet.asked[0]: 4}
            last = event
        assert isinstance(last, Finished)
        assert len(set(fleet.asked)) == 2 == len(first)

    use(fleet, work)


def test_other_text_after_a_death_is_an_error_and_no_mixture() -> None:
    fleet = Fleet("a", "b")
    fleet.dies_after = {"a": 4}
    fleet.differs = {"b"}

    async def work(service: ClusterService) -> None:
        fleet.names = ["a"]
        answers = service.submit([ask()])
        told: list[Event] = []
        async for _, event in answers:
            told.append(event)
            if "b" not in fleet.names:
                fleet.names.append("b")
        assert len(ids(told)) == 4
        assert isinstance(told[-1], Failed)
        assert told[-1].kind == "engine"

    use(fleet, work)


def test_group_with_nobody_to_answer_it_fails_in_words() -> None:
    fleet = Fleet("a")
    fleet.dies_after = {"a": 2}

    async def work(service: ClusterService) -> None:
        told = await listen(service.submit([ask(), ask(seed=6)]), 2)
        for events in told:
            assert isinstance(events[-1], Failed)
            assert events[-1].kind == "engine"
        assert service.stats.running == 0
        assert service.stats.num_steps == 2

    use(fleet, work)


def test_only_the_unfinished_of_a_group_are_asked_again() -> None:
    fleet = Fleet("a", "b")

    async def work(service: ClusterService) -> None:
        fleet.dies_after = {"a": 6, "b": 6}
        answers = service.submit([ask(num=3), ask(seed=6, num=10)])
        told: list[list[Event]] = [[], []]
        async for index, event in answers:
            told[index].append(event)
            fleet.dies_after = {fleet.asked[0]: 6}
        assert [len(ids(events)) for events in told] == [3, 10]
        assert ids(told[1]) == [(3 + 6 + step) % 1000 for step in range(10)]

    use(fleet, work)


def test_client_who_leaves_ends_the_work() -> None:
    fleet = Fleet("a")

    async def work(service: ClusterService) -> None:
        with service.submit([ask(num=1000)]) as answers:
            async for _, event in answers:
                if isinstance(event, Step):
                    break
        async with asyncio.timeout(10):
            while not fleet.left:
                await asyncio.sleep(0)
        assert fleet.left == ["a"]

    use(fleet, work)


def test_same_document_goes_to_the_same_replica() -> None:
    fleet = Fleet("a", "b", "c")

    async def work(service: ClusterService) -> None:
        for document in range(20):
            fleet.asked.clear()
            for question in range(5):
                prompt = [document * 1000 + place for place in range(500)] + [question] * 9
                await listen(service.submit([ask(num=2, prompt=prompt)]))
            assert len(set(fleet.asked)) == 1

    use(fleet, work)


def test_too_many_requests_are_refused_and_none_are_taken_at_the_end() -> None:
    async def work(service: ClusterService) -> None:
        held = [service.submit([ask()]) for _ in range(8)]
        with pytest.raises(OverloadedError, match="of at most 8"):
            service.submit([ask()])
        for answers in held:
            await listen(answers)
        await service.stop(0)
        with pytest.raises(EngineDeadError, match="dead"):
            service.submit([ask()])

    use(Fleet("a"), work)


def test_stopping_lets_answers_finish_and_fails_what_takes_too_long() -> None:
    async def work(service: ClusterService) -> None:
        quick = asyncio.create_task(listen(service.submit([ask(num=5)])))
        slow = asyncio.create_task(listen(service.submit([ask(num=10**6)])))
        await asyncio.sleep(0)
        await service.stop(0.2)
        (told,), (cut,) = await quick, await slow
        assert isinstance(told[-1], Finished)
        assert isinstance(cut[-1], Failed)

    use(Fleet("a"), work)


class Scripted:
    """An `EngineService` as far as a replica looks."""

    def __init__(self) -> None:
        self.info, self.status, self.stats, self.on_step = INFO, "ready", EngineStats(), []

    def submit(self, requests: Sequence[Request]) -> Answers:
        answers = Answers(len(requests), lambda index: None)
        for index, _ in enumerate(requests):
            answers.tell(index, Step(id=7, piece="x", special=False, text="x"))
            answers.tell(index, Failed(kind="generation", message="no"))
        return answers


def test_replica_names_itself_before_the_prompt_is_read_and_says_all() -> None:
    async def whole() -> None:
        replica = Replica("r", Scripted())  # type: ignore[arg-type]
        frames = [frame async for frame in replica.answer([_wire(), _wire()])]
        assert frames[0]["replica"] == "r"
        assert frames[0]["events"] == []
        events = [(index, wire["event"]) for frame in frames for index, wire in frame["events"]]
        assert events == [(0, "Step"), (0, "Failed"), (1, "Step"), (1, "Failed")]

    asyncio.run(whole())


def _wire() -> dict[str, Any]:
    from longwing.engine.wire import request_to_wire

    return request_to_wire(ask())
