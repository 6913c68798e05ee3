"""`Web`: the page and its routes as one extension of the server (`server/app.py`)."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from longwing.engine.folder import ModelFolder
from longwing.engine.options import EngineOptions
from longwing.server.app import current
from longwing.web.access import Access
from longwing.web.calls import Nouns
from longwing.web.documents import MAX_BYTES, Documents
from longwing.web.downloads import Downloads
from longwing.web.loading import Launch, Loaded, Loader
from longwing.web.options import WebOptions
from longwing.web.page import STATIC, Page
from longwing.web.records import Records
from longwing.web.reports import PREFIX, Reports
from longwing.web.routes import DOCUMENTS, PROMPT, make_router
from longwing.web.runs import Runs
from longwing.web.shelf import Shelf

NUM_THREADS = 3
"""For headers, records and the tokens of documents; requests have threads of their own."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """What the server was started with.

    Attributes:
        path: the model folder.
        name: what clients know the model by.
        options: of its engine.
        launch: makes engines for other models.
    """

    path: Path
    name: str
    options: EngineOptions
    launch: Launch


class Web:
    """The page, for one server.

    Args:
        options: the operator's.
        started: what the server was started with.
        roots: folders of model folders.
        runs_dir: where evaluations are kept.
        static: the page's files.
    """

    def __init__(
        self,
        options: WebOptions,
        started: Started,
        *,
        roots: Sequence[Path],
        runs_dir: Path,
        static: Path = STATIC,
    ) -> None:
        self.payload_limits: Mapping[str, int] = {DOCUMENTS: MAX_BYTES, PROMPT: MAX_BYTES}
        self._options = options
        self._started = started
        self._page = Page(static)
        self._reports = Reports()
        self._shelf = Shelf(roots, started.path, started.name)
        self._runs = Runs(Records(runs_dir))
        self._downloads = Downloads()
        self._threads = ThreadPoolExecutor(NUM_THREADS, "web")
        self._loader: Loader | None = None

    def install(self, app: FastAPI) -> None:
        """Add the page and its routes."""
        server = current(app).options
        started = self._started
        folder = ModelFolder.open(started.path, started.options.rope)
        loaded = Loaded.from_folder(
            folder,
            started.options,
            model_id=self._shelf.id_of(started.path) or started.name,
            name=started.name,
        )
        self._loader = Loader(app, started.launch, started.options, loaded, self._threads)
        nouns = Nouns(
            access=Access(server, self._options),
            shelf=self._shelf,
            loader=self._loader,
            downloads=self._downloads,
            documents=Documents(self._threads),
            runs=self._runs,
            reports=self._reports,
            threads=self._threads,
            api_key=server.api_keys[0] if server.api_keys else None,
            operator_device=started.options.device,
        )
        app.include_router(make_router(nouns))
        app.router.routes.append(Route(f"{PREFIX}{{ticket}}", self._report, methods=["GET"]))
        app.router.routes.extend(self._page.routes)

    def is_open(self, scope: Scope) -> bool:
        """Whether a request needs no API key: the page's files, which ask for one, and reports."""
        return self._page.is_page(scope) or self._reports.is_report(scope)

    async def settle(self) -> None:
        """End a load that is under way, and begin none."""
        if self._loader is not None:
            await self._loader.close()

    async def close(self) -> None:
        """End downloads and evaluations that are under way."""
        await asyncio.gather(self._runs.close(), self._downloads.close())
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _report(self, http: Request) -> Response:
        return self._reports.response(str(http.path_params["ticket"]))
