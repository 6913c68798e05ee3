"""An engine that plays from a script: everything the server can see of one, without a model.

`ScriptedEngine` has `EngineService`'s face. By default it echoes the prompt's tokens as its answer;
`answer` is a function from a request to the events of its answer, or the pieces below put together.
Nothing sleeps: what is to wait, waits on a `gate` (an asyncio.Event) that the test opens.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from longwing.engine.events import (
    Event,
    Failed,
    Finished,
    PromptRead,
    PromptToken,
    Reading,
    Step,
)
from longwing.engine.request import FinishReason, Request
from longwing.engine.status import EngineInfo, EngineStats, StepRecord
from longwing.engine.stop import StopStrings
from longwing.errors import EngineDeadError, OverloadedError
from longwing.tokenizer import Tokenizer

INFO = EngineInfo(
    name="scripted",
    architecture="falcon",
    quantization="gptq 4-bit group 128",
    dtype="float32",
    kv_dtype="float32",
    device="cpu",
    device_name="paper",
    vocab_size=1000,
    context=256,
    num_pages=64,
    page_len=16,
    kv_bytes=1 << 20,
    weight_bytes=1 << 20,
    max_sequences=8,
    max_batch_tokens=64,
    rope_method="dynamic",
    rope_rungs=(128, 256),
)

Wait = Callable[[], Awaitable[object]]
"""A pause in a script: awaited where it stands between the events."""


class ScriptedEngine:
    """Plays an engine.

    Args:
        tokenizer: spells the tokens of echoed answers.
        answer: what to say to the n-th request of a group: `answer(request, n)` gives events and
            pauses. Default: `echo`.
        max_requests: more at once raise OverloadedError.
        info: what is served.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        answer: Callable[[Request, int], Iterable[Event | Wait]] | None = None,
        max_requests: int = 1000,
        info: EngineInfo = INFO,
    ) -> None:
        self.tokenizer = tokenizer
        self.info: EngineInfo | None = info
        self.stats = EngineStats()
        self.status = "ready"
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.seen: list[Request] = []
        self.max_requests = max_requests
        self.at_work: set[ScriptedAnswers] = set()
        self.num_cancelled = 0
        self.stopped_with: list[float] = []
        self._answer = answer or self.echo

    async def start(self) -> None:
        self.status = "ready"

    def submit(self, requests: Sequence[Request]) -> "ScriptedAnswers":
        if self.status != "ready":
            raise EngineDeadError(f"the engine is {self.status}")
        if (
            sum(len(answers.waiting) for answers in self.at_work) + len(requests)
            > self.max_requests
        ):
            raise OverloadedError(f"{self.max_requests} requests are at work already", 2)
        self.seen.extend(requests)
        answers = ScriptedAnswers(self, [self._answer(one, n) for n, one in enumerate(requests)])
        self.at_work.add(answers)
        self.count()
        return answers

    async def stop(self, drain_s: float) -> None:
        self.status = "draining"
        self.stopped_with.append(drain_s)
        try:
            async with asyncio.timeout(drain_s):
                while self.at_work:
                    await asyncio.gather(*(answers.over.wait() for answers in self.at_work))
        except TimeoutError:
            pass
        self.die()

    def die(self) -> None:
        """As when the engine's process is killed: everything at work fails."""
        self.status = "dead"
        for answers in tuple(self.at_work):
            answers.lose()

    def count(self) -> None:
        running = sum(len(answers.waiting) for answers in self.at_work)
        self.stats = replace(self.stats, running=running)

    def echo(self, request: Request, n: int = 0) -> list[Event | Wait]:
        """The prompt's own tokens, as many as asked for, then its end token."""
        ids = [*request.prompt_ids, *self.tokenizer.eos_ids]
        return self.say(request, ids, seed=request.params.seed or 1000 + n)

    def say(
        self, request: Request, ids: Sequence[int], *, seed: int = 7, gate: Wait | None = None
    ) -> list[Event | Wait]:
        """These tokens, as an engine would send them; with a gate, a pause before each."""
        total = len(request.prompt_ids)
        events: list[Event | Wait] = [Reading(done=total, total=total, cached=0)]
        if request.prompt_logprobs is not None:
            events.append(PromptRead(tokens=tuple(
                PromptToken(id=token_id, logprob=None if place == 0 else -0.5)
                for place, token_id in enumerate(request.prompt_ids)
            )))  # fmt: skip
        stream = self.tokenizer.stream()
        stops = StopStrings(request.params.stop, include_stop=request.include_stop)
        reason, num = FinishReason.LENGTH, 0
        for token_id in ids[: request.params.max_new_tokens]:
            special = token_id in self.tokenizer.special_ids
            piece = self.tokenizer.token(token_id) if special else stream.push(token_id)
            text, stopped = ("", False) if special else stops.push(piece)
            ended = token_id in self.tokenizer.eos_ids and not request.params.ignore_eos
            num += 1
            if (ended or num == request.params.max_new_tokens) and not stopped:
                text += stops.flush()
            if gate is not None:
                events.append(gate)
            events.append(self.step(request, token_id, piece, special, text))
            if stopped or ended:
                reason = FinishReason.STOP_SEQUENCE if stopped else FinishReason.EOS_TOKEN
                break
        events.append(self.finished(request, num, reason, seed=seed, stop=stops.matched))
        return events

    def step(self, request: Request, token_id: int, piece: str, special: bool, text: str) -> Step:
        wanted = request.params.logprobs
        top = tuple((token_id + k, -0.25 - k) for k in range(wanted or 0))
        return Step(
            id=token_id,
            piece=piece,
            special=special,
            text=text,
            logprob=None if wanted is None else -0.25 - (request.params.seed or 0) % 5,
            top=top,
        )

    def finished(
        self, request: Request, num: int, reason: FinishReason, *, seed: int, stop: str | None
    ) -> Finished:
        return Finished(
            reason=reason,
            seed=seed,
            prompt_len=len(request.prompt_ids),
            cached_len=0,
            num_generated=num,
            queue_s=0.25,
            prefill_s=0.5,
            decode_s=1.5,
            stop=stop,
        )


class ScriptedAnswers:
    """A group's events, each request's in turn."""

    def __init__(self, engine: ScriptedEngine, scripts: Sequence[Iterable[Event | Wait]]) -> None:
        self.waiting = set(range(len(scripts)))
        self.over = asyncio.Event()
        self._engine = engine
        self._lost = asyncio.Event()
        self._scripts = scripts
        self._events = self._play()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        return self._events

    def cancel(self) -> None:
        if self.waiting:
            self._engine.num_cancelled += len(self.waiting)
        self._end()

    def lose(self) -> None:
        self._lost.set()

    def _end(self) -> None:
        self.waiting.clear()
        self._engine.at_work.discard(self)
        self._engine.count()
        self.over.set()

    async def _play(self) -> AsyncIterator[tuple[int, Event]]:
        for place, script in enumerate(self._scripts):
            for item in script:
                if callable(item) and not self._lost.is_set():
                    await self._pause(item)
                if self._lost.is_set():
                    for left in sorted(self.waiting):
                        yield left, Failed(kind="engine", message="the engine stopped")
                    self._end()
                    return
                if callable(item):
                    continue
                if isinstance(item, (Finished, Failed)):
                    self.waiting.discard(place)
                    self._engine.count()
                yield place, item
        self._end()

    async def _pause(self, wait: Wait) -> None:
        """Until the pause is over, or the engine is dead."""
        pause = asyncio.ensure_future(wait())
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait((pause, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            lost.cancel()
            await asyncio.gather(pause, lost, return_exceptions=True)
