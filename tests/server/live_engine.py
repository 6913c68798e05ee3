"""The whole application around a real engine, on a port of its own, in a thread."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from server_of import Live

from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.service import EngineService
from longwing.engine.worker import engine_thread
from longwing.server.app import serving_for
from longwing.server.options import ServerOptions
from longwing.tokenizer import Tokenizer

SMALL = EngineOptions(
    dtype="float32", num_pages=256, page_len=8, max_batch_tokens=64, max_sequences=16
)
MODEL_ID = "owner/tiny"


class LiveEngine(Live):
    """As `Live`, with an engine that is started in the server's own event loop.

    Attributes:
        service: the engine's service.
    """

    def __init__(self, folder: Path, engine: dict[str, Any], server: dict[str, Any]) -> None:
        options = replace(SMALL, **engine)
        self.service = EngineService(
            engine_thread(lambda progress: load_engine(folder, options, progress=progress)),
            max_requests=server.get("max_concurrent_requests", 128),
        )
        self._folder = folder
        self._options = ServerOptions(**{"port": 0, **server})
        super().__init__(None)  # type: ignore[arg-type]  # made once the engine says what it is

    async def _serve(self) -> None:
        await self.service.start()
        self.serving = serving_for(
            self.service, Tokenizer.from_folder(self._folder), self._options, model_id=MODEL_ID
        )
        try:
            await super()._serve()
        finally:
            await self.service.stop(0)
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not leftover, leftover


@contextlib.contextmanager
def serving(
    folder: Path, *, engine: dict[str, Any] | None = None, **server: Any
) -> Iterator[LiveEngine]:
    """A live server of a model folder; at the end it is told to stop, and stops."""
    live = LiveEngine(folder, engine or {}, server)
    live.start()
    try:
        yield live
    finally:
        with contextlib.suppress(RuntimeError):  # it may have stopped by itself
            live.sigterm()
            live.hurry()
        live.join()
