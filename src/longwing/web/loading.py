"""`Loader`: drains the running engine and puts another in its place.

All that can be refused is refused first: the folder's settings, headers and tokenizer, and the
options, are checked while the old engine still answers. Then it takes no more requests, those at
work finish, and it ends, because most machines hold one model and not two. Until the next one is
ready the server answers, in words, that there is none. A load that fails, or is cancelled, leaves
that state, with the reason; loading the former model again ends it. Cancelled while the old engine
is still being drained, it goes on answering as if nothing had been.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, cast

from fastapi import FastAPI

from longwing.engine.folder import ModelFolder
from longwing.engine.options import EngineOptions
from longwing.errors import ConfigError, EngineError, LongwingError
from longwing.server.app import current, exchange, serving_for
from longwing.server.faults import INTERNAL, log_failure
from longwing.server.options import ServerOptions
from longwing.server.serving import Service, Serving
from longwing.web.bodies import LoadBody
from longwing.web.settings import engine_options, shown
from longwing.web.shelf import Facts, Model, facts_of

DRAIN_S = 30.0
"""Seconds that answers at work get, unless the request says otherwise."""

_REASON = "the model is being exchanged for another"


class Engine(Service, Protocol):
    """An engine that can be loaded while others watch; `engine/service.py` has one."""

    on_loading: list[Callable[[int, int], None]]

    @property
    def num_open(self) -> int:
        """Requests at work and waiting."""
        ...

    async def stop(self, drain_s: float, *, reason: str = ...) -> None:
        """As a Service's; `reason` is what the unfinished are told."""
        ...

    def resume(self) -> None:
        """Take requests again, after a `stop` that was cancelled while it drained."""
        ...


Launch = Callable[[Path, EngineOptions], Engine]
"""Makes an engine, which is not yet started, for a model folder."""


class BusyError(LongwingError):
    """Another load is under way, or there is none to cancel."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded last, and how.

    Attributes:
        id: the model on the shelf.
        name: what clients know it by.
        facts: what its folder says.
        has_chat_template: whether the model brings a template of its own.
        templates: the names of those that can be used.
        options: of the engine.
    """

    id: str
    name: str
    facts: Facts
    has_chat_template: bool
    templates: tuple[str, ...]
    options: EngineOptions

    @classmethod
    def from_folder(
        cls, folder: ModelFolder, options: EngineOptions, *, model_id: str, name: str
    ) -> "Loaded":
        """What a folder that was opened holds."""
        return cls(
            id=model_id,
            name=name,
            facts=facts_of(folder.checkpoint),
            has_chat_template=folder.tokenizer.has_chat_template,
            templates=folder.tokenizer.template_names,
            options=options,
        )


@dataclass(kw_only=True)
class Loading:
    """A load under way, or one that did not succeed.

    Attributes:
        id, name: of the model; empty when only the old one is to end.
        phase: "draining", "loading", "failed", "cancelled" or "unloaded".
        done_bytes, total_bytes: of its weights.
        started_at: seconds since 1970.
        error: why it failed.
        options: what was asked for.
    """

    id: str
    name: str
    started_at: float
    phase: str = "draining"
    done_bytes: int = 0
    total_bytes: int = 0
    error: str | None = None
    options: dict[str, object]

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended, well or badly."""
        return self.phase in ("draining", "loading")


class Loader:
    """The application's engine, and how it is exchanged.

    Args:
        app: what serves.
        launch: makes engines.
        operator: the options the server was started with.
        loaded: what it was started with.
        threads: where folders are read.

    Attributes:
        loaded: what was loaded last.
        loading: see `Loading`; None while all is well.
    """

    def __init__(
        self,
        app: FastAPI,
        launch: Launch,
        operator: EngineOptions,
        loaded: Loaded,
        threads: Executor,
    ) -> None:
        self.loaded = loaded
        self.loading: Loading | None = None
        self._app = app
        self._launch = launch
        self._operator = operator
        self._threads = threads
        self._server = current(app).options
        self._checking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def serving(self) -> Serving:
        """What answers now, or did last."""
        return current(self._app)

    @property
    def engine(self) -> Engine:
        """Its engine."""
        return cast(Engine, self.serving.service)

    async def load(self, model: Model, body: LoadBody) -> Loading:
        """Begin to load a model, once it is found loadable.

        Raises:
            BusyError: another load is under way.
            LongwingError: it cannot be loaded so; nothing has changed.
        """
        self._require_idle()
        async with self._checking:
            options = engine_options(body, self._operator, self._server)
            if model.why_not is not None:
                raise ConfigError(model.why_not, file=model.name)
            folder = await asyncio.get_running_loop().run_in_executor(
                self._threads, ModelFolder.open, model.path, options.rope
            )
            loaded = Loaded.from_folder(folder, options, model_id=model.id, name=model.name)
        self._require_idle()
        loading = self._begin(model.id, model.name, options)
        drain_s = self._drain_s(body.drain_s)
        self._task = asyncio.create_task(
            self._exchange(loading, folder, loaded, drain_s), name=f"load {model.name}"
        )
        return loading

    def unload(self, drain_s: float | None) -> Loading:
        """Begin to end the engine, so that its memory is free.

        Raises:
            BusyError: a load is under way.
        """
        self._require_idle()
        loading = self._begin("", "", EngineOptions())
        self._task = asyncio.create_task(self._unload(loading, self._drain_s(drain_s)))
        return loading

    async def cancel(self) -> Loading:
        """End a load that is under way.

        Raises:
            BusyError: none is.
        """
        loading, task = self.loading, self._task
        if loading is None or task is None or not loading.is_under_way:
            raise BusyError("nothing is being loaded")
        task.cancel()
        await asyncio.wait([task])
        if loading.is_under_way:
            loading.phase = "cancelled"
            if self.serving.is_ready:
                self.loading = None
        return loading

    async def close(self) -> None:
        """End what is under way, for good; the engine that serves is the server's to end."""
        self._is_closed = True
        with contextlib.suppress(BusyError):
            await self.cancel()

    def to_json(self) -> dict[str, object] | None:
        """The load that is under way or failed, for the page."""
        return None if self.loading is None else to_json(self.loading, self.engine.num_open)

    def _require_idle(self) -> None:
        if self._is_closed:
            raise BusyError("the server is shutting down")
        if self._checking.locked() or (self.loading is not None and self.loading.is_under_way):
            name = self.loading.name if self.loading else ""
            raise BusyError(f"{name or 'another model'} is being loaded; wait, or cancel it")

    def _begin(self, model_id: str, name: str, options: EngineOptions) -> Loading:
        loading = Loading(id=model_id, name=name, started_at=time.time(), options=shown(options))
        self.loading = loading
        return loading

    def _drain_s(self, wanted: float | None) -> float:
        return min(DRAIN_S if wanted is None else wanted, self._server.drain_s)

    async def _drain(self, drain_s: float) -> None:
        """End the old engine; if that is cancelled early, it lives on."""
        try:
            await self.engine.stop(drain_s, reason=_REASON)
        except asyncio.CancelledError:
            self.engine.resume()
            if not self.serving.is_ready:
                await self.engine.stop(0)  # it was past draining: to its end, then
            raise

    async def _unload(self, loading: Loading, drain_s: float) -> None:
        await self._drain(drain_s)
        loading.phase = "unloaded"

    async def _exchange(
        self, loading: Loading, folder: ModelFolder, loaded: Loaded, drain_s: float
    ) -> None:
        await self._drain(drain_s)
        loading.phase = "loading"
        engine = self._launch(folder.path, loaded.options)

        def advance(done: int, total: int) -> None:
            loading.done_bytes, loading.total_bytes = done, total

        engine.on_loading.append(advance)
        try:
            await engine.start()
            serving = self._serving(engine, folder, loaded.name)
        except asyncio.CancelledError:
            await engine.stop(0)
            raise
        except Exception as error:
            is_told = isinstance(error, LongwingError)
            loading.phase, loading.error = "failed", str(error) if is_told else INTERNAL
            if not is_told:
                log_failure(error, "")
            await engine.stop(0)
        else:
            exchange(self._app, serving)
            self.loaded, self.loading = loaded, None

    def _serving(self, engine: Engine, folder: ModelFolder, name: str) -> Serving:
        if engine.info is None:
            raise EngineError("the engine started without saying what it is")
        options = within(self._server, engine.info.context)
        return serving_for(engine, folder.tokenizer, options, model_id=name)


def to_json(loading: Loading, num_open: int) -> dict[str, object]:
    """A load for the page, with the requests that the engine is at."""
    return {**asdict(loading), "open_requests": num_open}


def within(options: ServerOptions, context: int) -> ServerOptions:
    """The operator's limits, where a context holds less than they allow."""
    total, longest = options.max_total_tokens, options.max_input_length
    if total is not None:
        total = min(total, context)
    if longest is not None and longest >= (total or context):
        longest = None
    return replace(options, max_total_tokens=total, max_input_length=longest)
