"""/ui/api: the routes of models, downloads and evaluations, and the list of all.

Each is a line from HTTP to one of the page's nouns, and back to JSON, or to a response of its own.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from longwing.errors import LongwingError
from longwing.server.faults import TgiFault, refusal
from longwing.web import loading
from longwing.web.bodies import (
    DownloadBody,
    DownloadName,
    LoadBody,
    Nothing,
    PlanBody,
    ReportBody,
    RunBody,
    UnloadBody,
)
from longwing.web.calls import Nouns, body_of, fault_of
from longwing.web.plans import plan
from longwing.web.records import Asked
from longwing.web.session import Session
from longwing.web.shelf import Model, is_offline

API = "/ui/api"
DOCUMENTS = f"{API}/documents"
PROMPT = f"{API}/prompt"


Answer = Callable[[Request], Awaitable[object]]


def make_router(nouns: Nouns) -> APIRouter:
    """All routes of the page, without its files."""
    router = APIRouter(prefix=API, include_in_schema=False)

    def route(verb: str, path: str, work: Answer, *, admin: bool = True, status: int = 200) -> None:
        async def answer(http: Request) -> Response:
            try:
                nouns.access.require_own_page(http)
                if admin:
                    nouns.access.require_admin(http)
                said = await work(http)
            except LongwingError as error:
                raise fault_of(error) from error
            if isinstance(said, Response):
                return said
            body = orjson.dumps(said)
            return Response(body, status, {"Cache-Control": "no-store"}, "application/json")

        router.add_api_route(path, answer, methods=[verb], response_class=Response)

    session = Session(nouns)
    route("GET", "/session", session.session, admin=False)
    route("GET", "/state", session.state, admin=False)
    route("POST", "/documents", session.document, admin=False)
    route("POST", "/prompt", session.prompt, admin=False)
    models = _Models(nouns)
    route("GET", "/models", models.all)
    route("POST", "/plan", models.plan)
    route("POST", "/load", models.load, status=202)
    route("POST", "/load/cancel", models.cancel)
    route("POST", "/unload", models.unload, status=202)
    downloads = _Downloads(nouns)
    route("GET", "/downloads", downloads.all)
    route("POST", "/downloads", downloads.begin, status=202)
    route("POST", "/downloads/cancel", downloads.cancel)
    runs = _Evaluations(nouns)
    route("GET", "/evaluations", runs.all)
    route("POST", "/evaluations", runs.begin, status=202)
    route("GET", "/evaluations/{run_id}", runs.one)
    route("POST", "/evaluations/{run_id}/cancel", runs.cancel)
    route("POST", "/evaluations/{run_id}/resume", runs.resume, status=202)
    route("POST", "/evaluations/{run_id}/delete", runs.delete)
    route("POST", "/reports", runs.report)
    return router


class _Models:
    """What could be loaded, and loading it."""

    def __init__(self, nouns: Nouns) -> None:
        self._nouns = nouns

    async def all(self, http: Request) -> object:
        """Every model on this machine."""
        refresh = http.query_params.get("refresh") == "1"
        found = await self._nouns.aside(lambda: self._nouns.shelf.models(refresh=refresh))
        loaded = self._nouns.loader.loaded.id if self._nouns.serving.is_ready else None
        return {"models": [{**one.to_json(), "loaded": one.id == loaded} for one in found]}

    async def plan(self, http: Request) -> object:
        """What a model would need."""
        body = await body_of(http, PlanBody)
        model = await self._find(body.model)
        info = self._nouns.serving.service.info
        on_host = info is not None and info.device.startswith("cpu")
        held = info.weight_bytes + info.kv_bytes if info is not None and on_host else 0
        device = "cpu" if on_host else self._nouns.operator_device
        return await self._nouns.aside(lambda: plan(model, body, device=device, held=held))

    async def load(self, http: Request) -> object:
        """Put another model in place of the one that runs."""
        body = await body_of(http, LoadBody)
        model = await self._find(body.model)
        self._require_no_run()
        await self._nouns.loader.load(model, body)
        return {"loading": self._nouns.loader.to_json()}

    async def cancel(self, http: Request) -> object:
        """End a load."""
        await body_of(http, Nothing)
        cancelled = await self._nouns.loader.cancel()
        return {"loading": loading.to_json(cancelled, 0)}

    async def unload(self, http: Request) -> object:
        """End the engine."""
        body = await body_of(http, UnloadBody)
        self._require_no_run()
        self._nouns.loader.unload(body.drain_s)
        return {"loading": self._nouns.loader.to_json()}

    def _require_no_run(self) -> None:
        """An evaluation's cases must all be of one model."""
        run_id = self._nouns.runs.running
        if run_id is not None:
            reason = f"the evaluation {run_id} is asking this model; wait for it, or stop it"
            raise TgiFault("conflict", reason, status=409)

    async def _find(self, model_id: str) -> Model:
        found = await self._nouns.aside(self._nouns.shelf.find, model_id)
        if found is None:
            raise refusal(API, 404, "there is no such model on this machine")
        return found


class _Downloads:
    """Pulls."""

    def __init__(self, nouns: Nouns) -> None:
        self._downloads = nouns.downloads

    async def all(self, http: Request) -> object:
        """Every pull."""
        listed = [one.to_json() for one in self._downloads.all()]
        return {"downloads": listed, "offline": is_offline()}

    async def begin(self, http: Request) -> object:
        """Start one, or go on with it."""
        body = await body_of(http, DownloadBody)
        return self._downloads.begin(body.name, body.include).to_json()

    async def cancel(self, http: Request) -> object:
        """Stop one."""
        body = await body_of(http, DownloadName)
        try:
            return (await self._downloads.cancel(body.name)).to_json()
        except KeyError:
            raise refusal(API, 404, "there is no such download") from None


class _Evaluations:
    """Runs and reports."""

    def __init__(self, nouns: Nouns) -> None:
        self._nouns = nouns
        self._runs = nouns.runs

    async def all(self, http: Request) -> object:
        """Every run."""
        found = await self._nouns.aside(self._runs.summaries)
        return {"running": self._runs.running, "runs": found}

    async def begin(self, http: Request) -> object:
        """Start one."""
        asked = Asked.from_body(await body_of(http, RunBody))
        self._require_ready()
        return {"id": self._runs.begin(asked, _own_url(http), self._nouns.api_key)}

    async def one(self, http: Request) -> object:
        """A run with its table and heat map."""
        with _known():
            return await self._nouns.aside(self._runs.details, _run_id(http), _own_url(http))

    async def cancel(self, http: Request) -> object:
        """Stop it."""
        await body_of(http, Nothing)
        with _known():
            await self._runs.cancel(_run_id(http))
        return await self._nouns.aside(self._runs.summary, _run_id(http))

    async def resume(self, http: Request) -> object:
        """Go on with it."""
        await body_of(http, Nothing)
        self._require_ready()
        with _known():
            self._runs.resume(_run_id(http), _own_url(http), self._nouns.api_key)
        return {"id": _run_id(http)}

    async def delete(self, http: Request) -> object:
        """Remove its record."""
        await body_of(http, Nothing)
        with _known():
            await self._nouns.aside(self._runs.delete, _run_id(http))
        return {}

    async def report(self, http: Request) -> object:
        """Make a report, and say where it is."""
        body = await body_of(http, ReportBody)
        with _known():
            html = await self._nouns.aside(self._runs.report, body.runs)
        return {"url": self._nouns.reports.add(html)}

    def _require_ready(self) -> None:
        if not self._nouns.serving.is_ready:
            raise TgiFault("conflict", "no model is ready to be evaluated", status=409)


@contextlib.contextmanager
def _known() -> Iterator[None]:
    """A run that is not in the folder is a 404."""
    try:
        yield
    except KeyError:
        raise refusal(API, 404, "there is no such evaluation") from None


def _run_id(http: Request) -> str:
    return str(http.path_params["run_id"])


def _own_url(http: Request) -> str:
    """Where this server took the request: its own socket's address, whatever Host says."""
    host, port = http.scope["server"]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
