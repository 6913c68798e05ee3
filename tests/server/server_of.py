"""The whole application around a scripted engine: in this process, or on a port of its own."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
from scripted import INFO, ScriptedEngine

from longwing.server import run
from longwing.server.app import make_app
from longwing.server.metrics import Metrics
from longwing.server.options import ServerOptions
from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer

T = TypeVar("T")
MODEL_ID = "owner/scripted"

app_of = functools.lru_cache(maxsize=8)(make_app)
"""The application of a Serving, made once: it takes longer than a hundred calls."""


def serving_of(
    tokenizer: Tokenizer,
    *,
    max_input_len: int = 100,
    max_total_len: int = 120,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> Serving:
    """What is served; `engine` and `options` are arguments of ScriptedEngine and ServerOptions."""
    return Serving(
        service=ScriptedEngine(tokenizer, **{"info": INFO, **(engine or {})}),
        tokenizer=tokenizer,
        options=ServerOptions(**options),
        model_id=MODEL_ID,
        max_input_len=max_input_len,
        max_total_len=max_total_len,
        created=1_700_000_000,
        metrics=Metrics(max_total_len),
    )


def engine_of(serving: Serving) -> ScriptedEngine:
    """The engine, as what it is."""
    assert isinstance(serving.service, ScriptedEngine)
    return serving.service


def within(serving: Serving, work: Callable[[httpx.AsyncClient], Awaitable[T]], **client: Any) -> T:
    """Run `work` with a client of the application, without a network; errors are not answers."""

    async def main() -> T:
        transport = httpx.ASGITransport(app_of(serving), raise_app_exceptions=True)
        settings = {"base_url": "http://localhost", **client}
        async with httpx.AsyncClient(transport=transport, **settings) as http:
            return await work(http)

    return asyncio.run(main())


def ask(serving: Serving, path: str, body: Any = None, method: str = "", **kwargs: Any) -> Any:
    """One call: a GET without a body, else a POST; bytes go as they are."""
    if isinstance(body, bytes):
        kwargs["content"] = body
        kwargs["headers"] = {"content-type": "application/json", **kwargs.get("headers", {})}
    elif body is not None:
        kwargs["json"] = body
    verb = method or ("GET" if body is None else "POST")
    return within(serving, lambda http: http.request(verb, path, **kwargs))


class Live:
    """A server on a port of its own, in a thread.

    Attributes:
        url: where it is.
        serving: what it serves; touch it by `call` alone.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self.error: BaseException | None = None

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        with contextlib.closing(run.bind(self.serving.options)) as sock:
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            await run.serve(
                self.serving,
                sock,
                stop=self._stop,
                hurry=self._hurry,
                announce=lambda _: self._started.set(),
            )

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(20)
        if self.error is not None:
            raise self.error

    def call(self, work: Callable[[], T]) -> T:
        """Run a function in the server's thread, between two of its steps."""

        async def main() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(main(), self._loop).result(20)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is true in the server's thread."""

        async def main() -> None:
            async with asyncio.timeout(20):
                while not true():
                    await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(main(), self._loop).result(30)

    def sigterm(self) -> None:
        """What a first signal does."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def hurry(self) -> None:
        """What a second signal does."""
        self._loop.call_soon_threadsafe(self._hurry.set)

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def running(serving: Serving) -> Iterator[Live]:
    """A live server; at the end it is told to stop, and stops."""
    live = Live(serving)
    live.start()
    try:
        yield live
    finally:
        with contextlib.suppress(RuntimeError):  # it may have stopped by itself
            live.sigterm()
            live.hurry()
        live.join()
