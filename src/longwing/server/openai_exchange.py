"""One call of the API: a group of requests to the engine, and its answers on their way out.

A `Choice` makes JSON of one answer's events. It makes the stream's pieces, and keeps what it made
for the whole answer, so that both say the same. What a chat and a completion make of the events is
`openai_chat.py` and `openai_completions.py`.
"""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from longwing.engine.events import Event, Failed, Finished, PromptRead, Reading, Step
from longwing.engine.request import FinishReason, Request
from longwing.errors import EngineError, LongwingError, OverloadedError, RequestError, TemplateError
from longwing.server.faults import Fault, error_of, log_failure, openai_fault
from longwing.server.leave import ClientLeftError, until_done_or_left
from longwing.server.metrics import Metrics
from longwing.server.openai_logprobs import Score, ScoreQueue
from longwing.server.openai_schema import StreamOptions
from longwing.server.serving import Answers, Serving
from longwing.server.sse import data_frame, reading_frame, sse_response

DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]

FINISH = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
"""OpenAI's word for each end of a text; `cancelled` has none, and is an error."""


class Choice(ABC):
    """One answer: its events go in, entries of `choices` come out.

    Args:
        index: its place in `choices`.
        scores: where log-probabilities wait for their text, if they are asked for.

    Attributes:
        num_generated: tokens so far.
        cached_len: tokens of the prompt that were found in the cache.
        finished: how it ended, once it has.
    """

    def __init__(self, index: int, scores: ScoreQueue | None) -> None:
        self.index = index
        self.num_generated = 0
        self.cached_len = 0
        self.finished: Finished | None = None
        self._scores = scores

    def take(self, event: Event) -> Iterator[Json]:
        """The pieces that an event adds to a stream.

        Raises:
            LongwingError: the answer cannot be finished.
        """
        match event:
            case Reading():
                self.cached_len = event.cached
            case PromptRead():
                yield from self.read(event)
            case Step():
                self.num_generated += 1
                scores = self._scores.push(event) if self._scores else []
                yield from self.say(event.text, scores)
            case Finished():
                if event.reason not in FINISH:
                    raise EngineError("the answer was broken off")
                self.finished = event
                self.num_generated, self.cached_len = event.num_generated, event.cached_len
                scores = self._scores.finish(event.reason) if self._scores else []
                yield from self.end(FINISH[event.reason], scores)
            case Failed():
                raise error_of(event)

    def open(self) -> Iterator[Json]:
        """What a stream begins with."""
        yield from ()

    def read(self, event: PromptRead) -> Iterator[Json]:
        """What the prompt's log-probabilities add."""
        yield from ()

    @abstractmethod
    def say(self, text: str, scores: list[Score]) -> Iterator[Json]:
        """What a token adds."""

    @abstractmethod
    def end(self, reason: str, scores: list[Score]) -> Iterator[Json]:
        """What the end adds: its reason, and what was held back."""

    @abstractmethod
    def whole(self) -> Json:
        """The whole answer, once it has ended."""


@dataclass(kw_only=True)
class Exchange:
    """A call that is being answered.

    Attributes:
        serving: what is served.
        http: the call.
        requests: what the engine is asked, one for each choice.
        choices: what is made of its answers.
        num_samples: choices of each prompt; they share it.
        kind: what `object` says; `chunk_kind` in streams.
        prefix: how the id begins.
        began: when the call came, by the monotonic clock.
        headers: of the response.
    """

    serving: Serving
    http: HttpRequest
    requests: Sequence[Request]
    choices: Sequence[Choice]
    num_samples: int
    kind: str
    chunk_kind: str
    prefix: str
    began: float
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._id = f"{self.prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._adapter = self.requests[0].adapter
        self._fingerprint = fingerprint(self.serving, self._adapter)

    async def answer(self, *, stream: bool, options: StreamOptions | None) -> Response:
        """The response: of one piece, or a stream that has begun.

        Raises:
            LongwingError: it cannot be answered, and nothing has been sent yet.
            ClientLeftError: nobody waits for it any more.
        """
        self.serving.metrics.request_prepared(
            time.monotonic() - self.began,
            sum(len(self.requests[first].prompt_ids) for first in self._firsts()),
            sum(request.params.max_new_tokens or 0 for request in self.requests),
        )
        answers = self.serving.service.submit(self.requests)
        if not stream:
            body = await until_done_or_left(self.http, self._whole(answers))
            return Response(orjson.dumps(body), headers=self.headers, media_type="application/json")
        frames = self._frames(answers, options or StreamOptions.model_validate({}))
        await until_done_or_left(self.http, anext(frames))
        return sse_response(
            self.http,
            frames,
            headers=self.headers,
            keep_alive_s=self.serving.options.keep_alive_s,
        )

    async def _whole(self, answers: Answers) -> Json:
        with answers:
            async for index, event in answers:
                for _ in self.choices[index].take(event):
                    pass  # kept by the choice
        choices = [choice.whole() for choice in self.choices]
        self._count_answer()
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    async def _frames(
        self, answers: Answers, options: StreamOptions
    ) -> AsyncGenerator[bytes, None]:
        """The stream. Its first frame is empty, and comes with the engine's first event.

        So a request that fails at once still gets its status; the generator has begun by then, and
        ends the engine's work when it is closed. A client that waits in the queue for long gets
        the response's headers all the same.
        """
        with answers:
            events = aiter(answers)
            first = asyncio.ensure_future(anext(events))
            try:
                await asyncio.wait([first], timeout=self.serving.options.keep_alive_s)
                if first.done() and isinstance(failed := first.result()[1], Failed):
                    raise error_of(failed)
                yield b""
                async with contextlib.aclosing(self._pieces(first, events, options)) as frames:
                    async for frame in frames:
                        yield frame
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)

    async def _pieces(
        self,
        first: "asyncio.Future[tuple[int, Event]]",
        events: AsyncIterator[tuple[int, Event]],
        options: StreamOptions,
    ) -> AsyncGenerator[bytes, None]:
        """The frames, and at the end [DONE], or the error that came instead."""
        always = bool(options.continuous_usage_stats)
        at_end = bool(options.include_usage)
        try:
            for choice in self.choices:
                for piece in choice.open():
                    yield self._frame([piece], usage=always, named=at_end)
            async for index, event in _chained(first, events):
                if isinstance(event, Reading) and event.done < event.total:
                    yield reading_frame(event)
                for piece in self.choices[index].take(event):
                    yield self._frame([piece], usage=always, named=at_end)
            if at_end:
                yield self._frame([], usage=True, named=True)
            self._count_answer()
            yield DONE
        except (asyncio.CancelledError, GeneratorExit):
            self.serving.metrics.request_failed("dropped")
            raise
        except Exception as error:
            self.serving.metrics.request_failed(_kind(error))
            fault = openai_fault(error)
            if fault.status >= 500:
                log_failure(error, getattr(self.http.state, "request_id", ""))
            yield data_frame(fault.body())

    def _count_answer(self) -> None:
        """One call counts once, by its first answer."""
        if (finished := self.choices[0].finished) is not None:
            self.serving.metrics.request_answered(time.monotonic() - self.began, finished)

    def _frame(self, choices: list[Json], *, usage: bool, named: bool) -> bytes:
        """A chunk; `named` is whether it has a usage field, `usage` whether that says something."""
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        if usage or named:
            chunk["usage"] = self._usage() if usage else None
        return data_frame(chunk)

    def _head(self, kind: str) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._adapter or self.serving.model_id,
            "system_fingerprint": self._fingerprint,
        }

    def _firsts(self) -> range:
        """The first request of each prompt."""
        return range(0, len(self.requests), self.num_samples)

    def _usage(self) -> Json:
        """Tokens so far. A prompt counts once, however many answers it gets."""
        firsts = self._firsts()
        prompt_len = sum(len(self.requests[first].prompt_ids) for first in firsts)
        num_generated = sum(choice.num_generated for choice in self.choices)
        return {
            "prompt_tokens": prompt_len,
            "completion_tokens": num_generated,
            "total_tokens": prompt_len + num_generated,
            "prompt_tokens_details": {
                "cached_tokens": sum(self.choices[first].cached_len for first in firsts)
            },
        }


async def _chained(
    first: "asyncio.Future[tuple[int, Event]]", rest: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[tuple[int, Event]]:
    yield await first
    async for item in rest:
        yield item


@contextlib.contextmanager
def counted(metrics: Metrics) -> Iterator[float]:
    """Count a call, and what becomes of it until its response begins; errors leave as OpenAI's.

    Gives the time at which it came, by the monotonic clock.
    """
    metrics.request_began()
    try:
        yield time.monotonic()
    except (asyncio.CancelledError, ClientLeftError):
        metrics.request_failed("dropped")
        raise
    except (LongwingError, Fault) as error:
        metrics.request_failed(_kind(error))
        raise openai_fault(error) from error


def fingerprint(serving: Serving, adapter: str = "") -> str:
    """Names what answers are made with: the version, the model, its number types, the device."""
    info = serving.service.info
    made_with = [serving.model_id, *([adapter] if adapter else [])]
    if info is not None:
        made_with += [info.quantization, info.dtype, info.kv_dtype, info.device_name]
    digest = hashlib.sha256("\0".join(made_with).encode()).hexdigest()[:12]
    return f"longwing-{_VERSION}-{digest}"


def _version() -> str:
    try:
        return importlib.metadata.version("longwing")
    except importlib.metadata.PackageNotFoundError:
        return "source"


_VERSION = _version()


def _kind(error: Exception) -> str:
    """The metrics' word for an error."""
    match error:
        case OverloadedError():
            return "overloaded"
        case TemplateError():
            return "template"
        case RequestError():
            return "validation"
        case Fault():
            return "validation" if error.status < 500 else "generation"
    return "generation"
