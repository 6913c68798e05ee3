"""What every route of the page has in hand: the nouns, its body, and how a refusal is told.

Errors are TGI's `{"error", "error_type"}`, as everywhere outside /v1. What the nouns refuse becomes
a status here, in one table.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from longwing.errors import CheckpointError, EvalError, HubError, LongwingError, RequestError
from longwing.server.body import parse
from longwing.server.faults import Fault, TgiFault
from longwing.server.serving import Serving
from longwing.web import downloads, loading, runs
from longwing.web.access import Access
from longwing.web.bodies import Body, read
from longwing.web.documents import Documents, NotInstalledError
from longwing.web.reports import Reports
from longwing.web.shelf import Shelf

T = TypeVar("T")
B = TypeVar("B", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Nouns:
    """What the routes speak for."""

    access: Access
    shelf: Shelf
    loader: loading.Loader
    downloads: downloads.Downloads
    documents: Documents
    runs: runs.Runs
    reports: Reports
    threads: Executor
    api_key: str | None
    operator_device: str

    @property
    def serving(self) -> Serving:
        """What is served now."""
        return self.loader.serving

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do in a thread what blocks."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)


async def body_of(http: Request, kind: type[B]) -> B:
    """The request's JSON; a page elsewhere cannot send this type unasked."""
    if kind_of(http) != "application/json":
        raise TgiFault(
            "unsupported_media_type",
            "Expected request with `Content-Type: application/json`",
            status=415,
        )
    raw = await http.body()
    return read(kind, parse(raw) if raw else {})


def kind_of(http: Request) -> str:
    """The body's content type, without parameters."""
    return http.headers.get("content-type", "").partition(";")[0].strip().lower()


_STATUS: Mapping[type[LongwingError], tuple[int, str]] = {
    loading.BusyError: (409, "conflict"),
    downloads.RunningError: (409, "conflict"),
    runs.RunningError: (409, "conflict"),
    NotInstalledError: (501, "not_installed"),
    CheckpointError: (422, "validation"),
    EvalError: (422, "validation"),
    HubError: (422, "validation"),
    RequestError: (422, "validation"),
}
"""What the nouns refuse, as a status and a word."""


def fault_of(error: LongwingError) -> LongwingError:
    """A noun's refusal as the page gets it; what is not here is the server's to tell."""
    if isinstance(error, Fault):
        return error
    for kind, (status, word) in _STATUS.items():
        if isinstance(error, kind):
            return TgiFault(word, str(error), status=status)
    return error
