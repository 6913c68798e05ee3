"""What every route needs, in one place: the engine, the tokenizer and the limits.

`Service` and `Answers` say all that the server knows of an engine; `engine/service.py` is one, and
the tests have a scripted one. A `Serving` sits in the application's state, and a route asks for it
by `Depends(serving_of)`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from starlette.requests import Request as HttpRequest

from longwing.engine.events import Event
from longwing.engine.request import Request
from longwing.engine.status import EngineInfo, EngineStats, StepRecord
from longwing.errors import ConfigError
from longwing.server.options import ServerOptions
from longwing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from longwing.server.metrics import Metrics

SHORT_TEXT = 1000
"""Characters that are tokenised at once, within a millisecond or so; more go to a thread."""


class Answers(Protocol):
    """The events of a group of requests; leaving the `with` block cancels what is unfinished."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """(Place of the request in the group, event), until each had its Finished or Failed."""
        ...

    def cancel(self) -> None:
        """End what is unfinished; may be called twice."""
        ...


class Service(Protocol):
    """An engine as the server sees it; see `engine/service.py`."""

    info: EngineInfo | None
    stats: EngineStats
    status: str
    on_step: list[Callable[[StepRecord], None]]

    async def start(self) -> None:
        """Return when the engine is ready."""
        ...

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Begin a group of requests.

        Raises:
            OverloadedError: too many wait already.
            EngineDeadError: the engine is not ready, draining or dead.
        """
        ...

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, let those at work finish within `drain_s`, end the engine."""
        ...


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and how.

    Attributes:
        service: the engine.
        tokenizer: the model's.
        options: the operator's.
        model_id: the name that clients know the model by.
        max_input_len: tokens in a prompt, at most.
        max_total_len: tokens in a prompt and its answer, at most.
        created: when the server was started, in seconds since 1970.
        metrics: what /metrics shows.
    """

    service: Service
    tokenizer: Tokenizer
    options: ServerOptions
    model_id: str
    max_input_len: int
    max_total_len: int
    created: int
    metrics: "Metrics"

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are served beside the model."""
        return () if self.service.info is None else self.service.info.adapters

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now."""
        return self.service.status == "ready"


def serving_of(http: HttpRequest) -> Serving:
    """The application's `Serving`; for `Depends`."""
    serving: Serving = http.app.state.serving
    return serving


ANY_MODEL = frozenset(["", "tgi", "dummy"])
"""What clients of a server with one model write for its name (huggingface_hub: "dummy")."""


def model_names(model_id: str) -> frozenset[str]:
    """What the model may be called by: its name, also without its owner's."""
    return ANY_MODEL | {model_id, model_id.rstrip("/").rpartition("/")[2]}


def check_adapter_names(model_id: str, adapters: Sequence[str]) -> None:
    """Refuse adapters that go by a name of the model.

    Raises:
        ConfigError: one does.
    """
    for name in adapters:
        if name in model_names(model_id):
            raise ConfigError(
                f'adapter "{name}" goes by a name of the model, "{model_id}"',
                remedy="name it otherwise: --adapter NAME=FOLDER",
            )


def lengths(options: ServerOptions, context: int) -> tuple[int, int]:
    """Longest prompt and longest prompt with answer, from the options and the engine's context.

    Raises:
        ConfigError: the options ask for more than the context, or leave no room for an answer.
    """
    total = options.max_total_tokens or context
    longest = options.max_input_length or total - 1
    if total > context:
        raise ConfigError(
            f"`max_total_tokens` is {total}, but the context holds {context} tokens; "
            f"serve with --max-total-tokens {context}, or with a longer context"
        )
    if not 0 < longest < total:
        raise ConfigError(
            f"`max_input_length` must be < `max_total_tokens`. Given: {longest} and {total}"
        )
    return longest, total


async def encode(serving: Serving, text: str, *, add_bos: bool | None = None) -> list[int]:
    """The ids of a text whose special tokens are meant as such; long ones in a thread.

    Raises:
        RequestError: the text cannot be tokenised.
    """

    def work() -> list[int]:
        return serving.tokenizer.encode(text, special_tokens=True, add_bos=add_bos)

    return work() if len(text) <= SHORT_TEXT else await asyncio.to_thread(work)
