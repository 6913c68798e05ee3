"""An engine of two ranks over gloo: its answers are one rank's, and it dies whole."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SMALL, engine_of, finish, ids, request, run

from adapter_folders import write_random_adapter
from longwing.engine import loading, service
from longwing.engine.cache import CacheKey
from longwing.engine.engine import Engine
from longwing.engine.events import Event, Failed, Finished, PromptRead, Step
from longwing.engine.folder import ModelFolder
from longwing.engine.follower import Follower
from longwing.engine.followers import Followers
from longwing.engine.loading import load_engine, pages_that_fit, rank_device
from longwing.engine.mirror import MirrorReader, MirrorWriter
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request
from longwing.engine.sequence import Sequence, Work
from longwing.engine.service import EngineService, engine_process
from longwing.engine.step_clock import StepClock
from longwing.engine.wire import to_frame
from longwing.errors import ConfigError, EngineError, RequestError
from longwing.plan import RUNTIME_BYTES

Folder = Callable[[str], Path]

SHARED = replace(SMALL, tensor_parallel=2, max_draft=3, draft_sequences=4)
PROMPTS = [[1, 2, 3], list(range(150)), [9], [5, 6, 7, 8] * 9]

linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


class Live:
    """A service of two ranks, for several tests; what its processes write is in `log`."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.loop = asyncio.Runner()
        self.log = log
        self.service = EngineService(engine_process(folder, SHARED))

    def run(self, work: Awaitable[Any]) -> Any:
        async def whole() -> Any:
            return await work

        return self.loop.run(whole())

    @property
    def leader(self) -> int:
        return int(self.service._host._process.pid)  # type: ignore[union-attr]

    async def ready(self) -> None:
        async with asyncio.timeout(60):
            while self.service.status == "starting":
                await asyncio.sleep(0.02)

    async def answer(
        self, requests: list[Request], on_step: Callable[[], None] | None = None
    ) -> list[list[Event]]:
        told: list[list[Event]] = [[] for _ in requests]
        with self.service.submit(requests) as answers:
            async for index, event in answers:
                told[index].append(event)
                if isinstance(event, Step) and on_step is not None:
                    on_step()
                    on_step = None
        return told


@pytest.fixture(scope="module")
def live(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("group") / "stderr"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as file:
        patch.setattr(service, "_MAX_RESTARTS", 1)
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        made = Live(tiny_folder("falcon-40b"), log)
        try:
            made.run(made.service.start())
            yield made
        finally:
            made.run(made.service.stop(0))
            made.loop.close()
            os.dup2(kept, 2)
            os.close(kept)


def followers_of(pid: int) -> list[int]:
    """The processes that a process has started for its group."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"follower" in command(int(child))]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(command(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # nothing tells of the end of another process's child


def test_two_ranks_give_one_ranks_tokens_through_chunks_drafts_and_company(
    live: Live, tiny_folder: Folder
) -> None:
    alone = run(engine_of(tiny_folder("falcon-40b")), [request(prompt) for prompt in PROMPTS])
    told = live.run(live.answer([request(prompt) for prompt in PROMPTS]))
    assert [ids(events) for events in told] == [ids(alone[str(i)]) for i in range(len(PROMPTS))]
    assert all(isinstance(events[-1], Finished) for events in told)
    assert live.service.info is not None
    assert live.service.info.ranks == 2
    assert live.service.stats.num_accepted > 0


def test_log_probabilities_of_a_prompt_are_those_of_one_rank(
    live: Live, tiny_folder: Folder
) -> None:
    asked = [request([1, 2, 3]), request(PROMPTS[1], max_new_tokens=1, prompt_logprobs=2)]
    alone = run(engine_of(tiny_folder("falcon-40b")), asked)["1"]
    told = live.run(live.answer(asked))[1]
    ours, theirs = (
        [token.logprob for token in event.tokens[1:]]
        for events in (told, alone)
        for event in events
        if isinstance(event, PromptRead)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


@linux
def test_a_killed_rank_takes_the_group_down_with_words_and_it_comes_back(live: Live) -> None:
    leader, (follower,) = live.leader, followers_of(live.leader)
    began = time.monotonic()
    told = live.run(
        live.answer(
            [request([1], max_new_tokens=200), request([2], max_new_tokens=200)],
            on_step=lambda: os.kill(follower, signal.SIGKILL),
        )
    )
    assert time.monotonic() - began < 10
    assert [events[-1].kind for events in told if isinstance(events[-1], Failed)] == ["engine"] * 2
    wait_until_gone([leader, follower])
    assert "the group of 2 is lost: rank 1 was ended by SIGKILL" in live.log.read_text()
    live.run(live.ready())
    (events,) = live.run(live.answer([request([1, 2, 3])]))
    assert isinstance(events[-1], Finished)


@linux
def test_followers_end_with_the_first_rank_even_one_that_hangs(live: Live) -> None:
    leader, (follower,) = live.leader, followers_of(live.leader)

    def stop_and_kill() -> None:
        os.kill(follower, signal.SIGSTOP)
        os.kill(leader, signal.SIGKILL)

    (events,) = live.run(live.answer([request([1], max_new_tokens=200)], on_step=stop_and_kill))
    assert isinstance(events[-1], Failed)
    wait_until_gone([leader, follower])
    live.run(live.ready())
    assert live.service.status == "dead"  # the second death within ten minutes; see `live`


@pytest.fixture(scope="module")
def adapter(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapters") / "one"
    return f"one={write_random_adapter(folder, tiny_folder('falcon-40b'), seed=1)}"


@pytest.fixture(scope="module")
def leading(tiny_folder: Folder, adapter: str) -> Iterator[Engine]:
    """An engine of two ranks the first of which is this process."""
    options = replace(SHARED, rank_timeout_s=1, overlap="on", adapters=(adapter,))
    engine, info = load_engine(tiny_folder("falcon-40b"), options)
    assert info.ranks == 2
    with contextlib.closing(engine):
        yield engine


def test_adapters_and_steps_launched_ahead_are_shared_too(
    leading: Engine, tiny_folder: Folder, adapter: str
) -> None:
    asked = [request(prompt, adapter=name) for prompt in PROMPTS[:2] for name in ("", "one")]
    alone = run(engine_of(tiny_folder("falcon-40b"), adapters=(adapter,)), asked)
    assert {name: ids(told) for name, told in run(leading, asked).items()} == {
        name: ids(told) for name, told in alone.items()
    }


@linux
def test_a_rank_that_hangs_is_missed_and_ended(
    leading: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first rank's process, were it the engine's own, though its thread may go on."""
    (follower,) = followers_of(os.getpid())
    ended: list[int] = []
    monkeypatch.setattr(leading.runner._followers, "_dedicated", True)  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "_exit", ended.append)
    leading.add("0", request([1], max_new_tokens=200))
    leading.step()
    os.kill(follower, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineError, match="the group of 2 is lost: rank 0 waits in vain"):
        finish(leading, {"0": []})
    assert time.monotonic() - began < 5
    assert not command(follower)
    leading.close()  # waits for the thread that watches
    assert ended == [1]


def test_a_first_rank_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    options = asdict(replace(SHARED, rank_timeout_s=1))
    settings = {"rank": 1, "options": options, "path": "", "meeting": "", "leader": None}
    follower = Follower(theirs, settings)
    follower._serves = True
    said: list[object] = []
    monkeypatch.setattr(follower, "refuse", lambda error: said.append(str(error)))
    monkeypatch.setattr(os, "_exit", said.append)
    with ours, theirs:
        ours.sendall(to_frame({"op": "here"}))
        follower._read()
    assert said == ["it was silent for 1 s", 1]


def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    followers = Followers(
        tmp_path / "nowhere", replace(SHARED, page_len=8), torch.device("cpu"), dedicated=False
    )
    with followers, pytest.raises(EngineError, match=r"rank 1: .*nowhere"):
        followers.meet(1)


def test_a_model_that_cannot_be_shared_is_refused_before_anything_starts(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "Followers", None)
    with pytest.raises(ConfigError, match="2 ranks cannot share a model of 1 key/value head"):
        load_engine(tiny_folder("falcon-7b"), SHARED)


def test_each_of_two_ranks_has_room_for_twice_the_pages(tiny_folder: Folder) -> None:
    folder = ModelFolder.open(tiny_folder("falcon-40b"))
    memory = RUNTIME_BYTES + 2**24
    one = replace(SHARED, tensor_parallel=1, num_pages=None, memory=memory, max_sequences=4096)
    one = replace(one, cpu_weights="float32")
    two = replace(one, tensor_parallel=2)
    first, second = (pages_that_fit(folder, item, torch.device("cpu")) for item in (one, two))
    assert 2 * first < second < 2.5 * first


def test_more_ranks_than_gpus_are_refused_with_the_number_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    options = EngineOptions(device="cuda:1", tensor_parallel=3)
    assert [str(rank_device(options, rank)) for rank in range(3)] == ["cuda:1", "cuda:2", "cuda:3"]
    with pytest.raises(RequestError, match=r"is 4, and from cuda:1 on .* 3 of its 4 GPUs; use 3"):
        rank_device(replace(options, tensor_parallel=4), 0)


def test_a_mirrored_batch_is_the_batch_and_only_new_pages_travel() -> None:
    writer, reader = MirrorWriter(), MirrorReader()
    sequences = [
        Sequence(id=str(i), prompt_ids=[1], max_len=9, key=CacheKey(salt="s", rung=8, adapter="a"))
        for i in range(3)
    ]

    def sent(*batch: tuple[Sequence, list[int]]) -> tuple[list[Work], int]:
        works = [Work(sequence, 5, token_ids, 1, True) for sequence, token_ids in batch]
        wire = writer.write(works)
        read = reader.read(wire)
        assert [work.sequence.pages for work in read] == [work.sequence.pages for work in works]
        assert [(w.start, w.token_ids, w.num_drafts, w.wants_token) for w in read] == [
            (w.start, w.token_ids, w.num_drafts, w.wants_token) for w in works
        ]
        keys = {work.sequence.key for work in read}
        assert keys == {CacheKey(salt="", rung=8, adapter="a")}
        return read, sum(len(item["pages"]) for item in wire)

    for place, sequence in enumerate(sequences):
        sequence.pages = [place, place + 10]
    first, num = sent((sequences[0], [1, 2]), (sequences[1], [3]))
    assert num == 4
    sequences[1].pages.append(7)
    again, num = sent((sequences[0], [4]), (sequences[1], [5]), (sequences[2], [6]))
    assert num == 3
    assert again[1].sequence.pages is first[1].sequence.pages
    sequences[1].pages = [7, 8]  # lost its pages and began again
    third, num = sent((sequences[1], [4]), (sequences[2], [5]))
    assert num == 4
    assert third[1].sequence.pages is not again[1].sequence.pages


def test_a_step_is_overdue_until_its_device_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        """What a GPU says of the work that it was given."""

        answer = False

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.answer

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = StepClock(torch.device("cpu"), 8.0)
    clock._done = done = Done()  # type: ignore[assignment]
    assert not clock.overdue()
    clock.begin("a shape")
    now[0] += 20
    assert not clock.overdue()  # the first of its kind compiles
    clock.end()
    done.answer = True
    now[0] += 400
    assert not clock.overdue()  # done, and idle since
    done.answer = False
    clock.begin("a shape")
    clock.end()
    now[0] += 7
    assert not clock.overdue()
    now[0] += 2
    assert clock.overdue()
    assert clock.is_awaited()
    clock.begin("a shape", pairs=2e8)  # waits for the one before it, then takes 10 s and its limit
    clock.end()
    clock.begin("another of its rows")
    clock.end()
    clock.begin("another of its rows")
    assert not clock.is_awaited()  # its thread is still about to launch, and can be told
    now[0] += 17
    assert not clock.overdue()
