"""Reports at addresses that hold for a while.

A link cannot carry a key. So a report is made for whoever may see it, and lies for some minutes at
an address that nobody can guess; whoever has the address may read it. Its own policy lets it do
nothing at all: no script, nothing loaded, and an origin that is not this server's.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Scope

PREFIX = "/ui/report/"
LIFE_S = 600.0
MAX_KEPT = 20

HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class _Report:
    html: bytes
    until: float


class Reports:
    """The reports that can be read now.

    Args:
        clock: seconds, for their age.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, _Report] = {}

    def add(self, html: str) -> str:
        """Keep a report; its address is the answer."""
        self._forget()
        while len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        ticket = secrets.token_urlsafe(24)
        self._kept[ticket] = _Report(html=html.encode(), until=self._clock() + LIFE_S)
        return PREFIX + ticket

    def response(self, ticket: str) -> Response:
        """The report, or a 404 that says no more than that."""
        self._forget()
        report = self._kept.get(ticket)
        if report is None:
            text = "This report is not here any more; ask for it again on the page."
            return Response(text, 404, headers=HEADERS, media_type="text/plain")
        return Response(report.html, headers=HEADERS, media_type="text/html")

    @staticmethod
    def is_report(scope: Scope) -> bool:
        """Whether a request is for a report: its address is its key."""
        return scope["method"] in ("GET", "HEAD") and str(scope["path"]).startswith(PREFIX)

    def _forget(self) -> None:
        now = self._clock()
        self._kept = {key: one for key, one in self._kept.items() if one.until > now}
