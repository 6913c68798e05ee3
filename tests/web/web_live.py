"""The server with its page on a port of its own, in a thread, around real engines in threads."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from live_engine import SMALL
from server_of import Live
from web_site import SERVED

from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.service import EngineService
from longwing.engine.worker import engine_thread
from longwing.server import run
from longwing.server.app import serving_for
from longwing.server.options import ServerOptions
from longwing.tokenizer import Tokenizer
from longwing.web.options import WebOptions
from longwing.web.web import Started, Web

T = TypeVar("T")


class LiveSite(Live):
    """A server of a folder of models; `with` starts and stops it.

    Attributes:
        url: where it listens.
        runs_dir: where its evaluations are.
    """

    def __init__(
        self, root: Path, scratch: Path, *, web: dict[str, Any] | None = None, **server: Any
    ) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # made once the engine says what it is
        self.runs_dir = scratch / "runs"
        self._root = root
        self._options = ServerOptions(**{"port": 0, "drain_s": 20.0, **server})
        self._web_options = WebOptions(**(web or {}))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sigterm()
        self.join()

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[T]], **client: Any) -> T:
        """Run `work` with a client of the server."""

        async def main() -> T:
            async with asyncio.timeout(300):
                async with httpx.AsyncClient(base_url=self.url, timeout=60, **client) as http:
                    return await work(http)

        return asyncio.run(main())

    async def _serve(self) -> None:
        path = self._root / SERVED
        service = _launch(path, SMALL)
        await service.start()
        tokenizer = Tokenizer.from_folder(path)
        self.serving = serving_for(service, tokenizer, self._options, model_id=SERVED)
        started = Started(path=path, name=SERVED, options=SMALL, launch=_launch)
        page = Web(self._web_options, started, roots=[self._root], runs_dir=self.runs_dir)
        self._loop = asyncio.get_running_loop()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        with run.bind(self._options) as sock:
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            await run.serve(
                self.serving,
                sock,
                stop=self._stop,
                hurry=self._hurry,
                announce=lambda _: self._started.set(),
                extension=page,
            )
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not leftover, leftover


def _launch(path: Path, options: EngineOptions) -> EngineService:
    small = replace(SMALL, context=options.context or 800, rope=options.rope)

    def load(progress: Any) -> Any:
        return load_engine(path, small, progress=progress)

    return EngineService(engine_thread(load))
