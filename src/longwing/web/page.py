"""The page's files, served from memory.

They are read once, when the server starts: a request names one of them or gets a 404, and no path
it sends is ever joined to another. There is no Range and no directory; a file's ETag is the digest
of its content, and browsers ask again each time whether it is still the same.

The policy lets the page load and reach nothing but this server. Script in a model's answer or in a
document does not run, even where the page would let it through.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"

KINDS: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}
"""What is served, by its suffix; other files of the folder are not."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "frame-src 'self'",
        "worker-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
"""Of every file; X-Content-Type-Options is the guard's."""


@dataclass(frozen=True, kw_only=True)
class _File:
    content: bytes
    kind: str
    etag: str


class Page:
    """The files under `folder`, at /ui/NAME; index.html at /ui, /ui/ and, to browsers, at /.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path = STATIC) -> None:
        self._files = {
            path.relative_to(folder).as_posix(): _read(path)
            for path in sorted(folder.rglob("*"))
            if path.suffix in KINDS and path.is_file()
        }

    @property
    def routes(self) -> list[BaseRoute]:
        """Where the files are. The first is for browsers alone: / is a health check to others."""
        return [
            _ForBrowsers("/", self._index, methods=["GET"]),
            Route("/ui", self._index, methods=["GET"]),
            Route("/ui/", self._index, methods=["GET"]),
            Route("/ui/{name:path}", self._named, methods=["GET"]),
        ]

    def is_page(self, scope: Scope) -> bool:
        """Whether a request is for one of the files, which anyone may read."""
        if scope["method"] not in ("GET", "HEAD"):
            return False
        path: str = scope["path"]
        if path == "/":
            return wants_html(scope)
        return path == "/ui" or (path.startswith("/ui/") and path.removeprefix("/ui/") in self)

    def __contains__(self, name: str) -> bool:
        return name == "" or name in self._files

    async def _index(self, http: Request) -> Response:
        return self._answer(http, "index.html")

    async def _named(self, http: Request) -> Response:
        return self._answer(http, http.path_params["name"])

    def _answer(self, http: Request, name: str) -> Response:
        file = self._files.get(name)
        if file is None:
            return Response("There is no such page.", 404, media_type="text/plain")
        headers = {**HEADERS, "ETag": file.etag}
        if http.scope["path"] == "/":
            headers["Vary"] = "Accept"
        known = {tag.strip().removeprefix("W/") for tag in _if_none_match(http).split(",")}
        if file.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers={**headers, "Content-Type": file.kind})


class _ForBrowsers(Route):
    """A route that others than browsers do not see."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As a route's; nothing matches where HTML was not asked for."""
        if scope["type"] != "http" or not wants_html(scope):
            return Match.NONE, {}
        return super().matches(scope)


def wants_html(scope: Scope) -> bool:
    """Whether text/html is among what a request accepts by name; `*/*` is not a browser's."""
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return any(part.partition(b";")[0].strip() == b"text/html" for part in accepted.split(b","))


def _if_none_match(http: Request) -> str:
    return http.headers.get("if-none-match", "")


def _read(path: Path) -> _File:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content=content, kind=KINDS[path.suffix], etag=etag)
