"""The server with its page around scripted engines, without a network and without a model.

A `Site` is made of a folder of models. Its engines answer from a script (tests/server/scripted.py)
and load as the test says: at once, when a gate opens, or with an error.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI
from scripted import INFO, ScriptedEngine

from longwing.engine.options import EngineOptions
from longwing.errors import LongwingError
from longwing.server.app import make_app, serving_for
from longwing.server.options import ServerOptions
from longwing.tokenizer import Tokenizer
from longwing.web.options import WebOptions
from longwing.web.web import Started, Web

T = TypeVar("T")
SERVED = "falcon-40b"


class LoadableEngine(ScriptedEngine):
    """As EngineService, with a load that a test can hold up or let fail."""

    def __init__(self, path: Path, options: EngineOptions, site: "Site") -> None:
        context = options.context or 256
        info = replace(INFO, name=path.name, context=context, vocab_size=320)
        super().__init__(Tokenizer.from_folder(path), info=info, answer=site.answer)
        self.options = options
        self.status = "starting"
        self.on_loading: list[Callable[[int, int], None]] = []
        self.reasons: list[str] = []
        self._site = site

    @property
    def num_open(self) -> int:
        return sum(len(answers.waiting) for answers in self.at_work)

    async def start(self) -> None:
        for advance in self.on_loading:
            advance(50, 100)
        if self._site.load_gate is not None:
            await self._site.load_gate.wait()
        if self._site.load_error is not None:
            self.status = "dead"
            raise self._site.load_error
        self.status = "ready"

    async def stop(self, drain_s: float, *, reason: str = "the server is shutting down") -> None:
        self.reasons.append(reason)
        await super().stop(drain_s)

    def resume(self) -> None:
        if self.status == "draining":
            self.status = "ready"


class Site:
    """A server with its page.

    Attributes:
        engines: every engine that was made, in order.
        load_gate: until it is set, loading waits.
        load_error: what loading raises.
        answer: what the next engine answers; None echoes.
        app, web: once it runs.
    """

    def __init__(
        self,
        root: Path,
        scratch: Path,
        *,
        web: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        **server: Any,
    ) -> None:
        self.engines: list[LoadableEngine] = []
        self.load_gate: asyncio.Event | None = None
        self.load_error: LongwingError | Exception | None = None
        self.answer: Any = None
        self.server = ServerOptions(**server)
        self.runs_dir = scratch / "runs"
        self._root, self._web_options = root, WebOptions(**(web or {}))
        self._options = EngineOptions(**(engine or {}))
        self._static = scratch / "static"
        (self._static / "parts").mkdir(parents=True, exist_ok=True)
        (self._static / "index.html").write_text("<!doctype html><title>longwing</title>")
        (self._static / "parts" / "app.js").write_text("export {};")
        (self._static / "secret.py").write_text("key = 1")
        (scratch / "outside.txt").write_text("not yours")
        self.app: FastAPI
        self.web: Web

    async def _open(self) -> None:
        path = self._root / SERVED
        started = Started(
            path=path,
            name=SERVED,
            options=self._options,
            launch=self._launch,
        )
        engine = self._launch(path, self._options)
        await engine.start()
        serving = serving_for(engine, engine.tokenizer, self.server, model_id=SERVED)
        self.web = Web(
            self._web_options,
            started,
            roots=[self._root],
            runs_dir=self.runs_dir,
            static=self._static,
        )
        self.app = make_app(serving, self.web)

    def _launch(self, path: Path, options: EngineOptions) -> LoadableEngine:
        self.engines.append(LoadableEngine(path, options, self))
        return self.engines[-1]

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[T]], **client: Any) -> T:
        """Run `work` with a client of the application; nothing may be left running."""

        async def main() -> T:
            await self._open()
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            settings = {"base_url": "http://localhost", **client}
            try:
                async with asyncio.timeout(300):
                    async with httpx.AsyncClient(transport=transport, **settings) as http:
                        return await work(http)
            finally:
                await self.web.settle()
                await self.web.close()

        return asyncio.run(main())

    def ask(self, path: str, body: Any = None, method: str = "", **kwargs: Any) -> httpx.Response:
        """One call: a GET without a body, else a POST."""
        if body is not None:
            kwargs["json"] = body
        verb = method or ("GET" if body is None else "POST")
        return self.run(lambda http: http.request(verb, path, **kwargs))


async def until(http: httpx.AsyncClient, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The page's state, once something is true of it."""
    while True:
        state: dict[str, Any] = (await http.get("/ui/api/state")).json()
        if true(state):
            return state
        await asyncio.sleep(0)


def settled(state: dict[str, Any]) -> bool:
    """Whether nothing is being loaded."""
    loading = state["loading"]
    return loading is None or loading["phase"] not in ("draining", "loading")
