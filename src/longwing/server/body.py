"""JSON from strangers, as the routes get it.

Python's parser reads NaN, takes half a surrogate pair for a character, and recurses as deep as it
is told to. orjson does none of that; here it is asked once, before FastAPI checks the fields, and
what it refuses is a 400 in the route's dialect. Numbers beyond 64 bits become floats, so that an
integer field refuses them. Nothing is nested deeper than MAX_DEPTH afterwards, so that whatever
walks through a body can do so by recursion.
"""

import re
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MAX_DEPTH = 254
"""orjson writes nothing deeper, which is how depth is measured here."""
MAX_CONTAINERS = 50_000
"""Lists and objects in a body; a million empty ones in 2 MB would stop the server for a second."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class JsonRequest(Request):
    """A request whose body is parsed by `parse`."""

    async def json(self) -> Any:
        """The body; FastAPI asks for it."""
        if not hasattr(self, "_parsed"):
            self._parsed = parse(await self.body())
        return self._parsed


class JsonRoute(APIRoute):
    """A route that takes JSON: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, after the body is known to be JSON."""
        handler = super().get_route_handler()
        takes_body = "POST" in (self.methods or ())

        async def handle(http: Request) -> Response:
            request = JsonRequest(http.scope, http.receive)
            if takes_body:
                _check_type(http.headers.get("content-type", ""))
                if await request.body():
                    await request.json()
            return await handler(request)

        return handle


def parse(raw: bytes) -> Any:
    """The JSON value in `raw`.

    Raises:
        HTTPException: 400; not UTF-8, not JSON, nested too deeply, or of too many parts.
    """
    # Counting is quick, and says of nearly every body that it is neither deep nor of many parts.
    num_brackets = raw.count(b"[") + raw.count(b"{")
    if num_brackets > MAX_CONTAINERS:
        structure = _STRING.sub(b"", raw)
        if structure.count(b"[") + structure.count(b"{") > MAX_CONTAINERS:
            raise _not_json(f"more than {MAX_CONTAINERS} lists and objects")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _not_json(f"{error.msg[:200]} at {error.pos}") from None
    if num_brackets > MAX_DEPTH:
        try:
            orjson.dumps(value)
        except orjson.JSONEncodeError:
            raise _not_json(f"deeper than {MAX_DEPTH}") from None
    return value


def _not_json(reason: str) -> HTTPException:
    return HTTPException(400, f"Failed to parse the request body as JSON: {reason}")


def _check_type(content_type: str) -> None:
    """Only JSON: a page on another site can send anything else without being asked first."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise HTTPException(415, "Expected request with `Content-Type: application/json`")
