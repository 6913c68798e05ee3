"""What went wrong, from what a server said or from its silence.

The classes are those that a model in this process raises: a refused request is a RequestError as
well as a ServerError; a full queue is an OverloadedError, which says when to try again.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

from longwing.errors import LongwingError, OverloadedError, RequestError, ServerError

_REFUSED = (400, 404, 409, 413, 415, 422)
_SHOWN = 500
"""Characters of a server's words that are repeated."""

_STATUS = {"validation": 422, "generation": 424, "overloaded": 429, "incomplete_generation": 500}
"""TGI's words for errors in streams, and the status each has elsewhere."""


class RefusedError(ServerError, RequestError):
    """The server says that the request is at fault: a parameter, the prompt's length, the route."""


def fault(status: int, headers: Mapping[str, str], content: bytes, url: str) -> LongwingError:
    """The error that a response other than 2xx stands for."""
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    message, kind = _words(body)
    if not message:
        message = " ".join(content.decode(errors="replace").split())
    said = f"{url}: {message[:_SHOWN] or 'no reason given'} (HTTP {status})"
    retry_after = headers.get("retry-after")
    if status == 429 or (status == 503 and (retry_after is not None or kind == "overloaded")):
        return OverloadedError(said, _seconds(retry_after))
    if status in (401, 403):
        return ServerError(f"{said}; give the server's API key", status, kind)
    if 300 <= status < 400:
        return ServerError(f"{url} redirects to {headers.get('location', '?')}", status, kind)
    return (RefusedError if status in _REFUSED else ServerError)(said, status, kind)


def event_fault(event: object, url: str) -> LongwingError | None:
    """The error that an event of a stream stands for; None if it is none."""
    if not isinstance(event, dict) or "error" not in event:
        return None
    message, kind = _words(event)
    error = event["error"]
    status = _STATUS.get(kind, 0)
    if isinstance(error, dict):
        for name in ("http_status_code", "code"):
            if isinstance(error.get(name), int):
                status = error[name]
    said = f"{url}: {message[:_SHOWN] or 'no reason given'}"
    if status in (429, 503) or kind == "overloaded":
        return OverloadedError(said)
    return (RefusedError if status in _REFUSED else ServerError)(said, status, kind)


def incomplete(url: str) -> ServerError:
    """A stream that ended without its last event."""
    return ServerError(
        f"{url}: the stream broke off before the answer was complete", 0, "incomplete"
    )


@contextmanager
def understood(url: str) -> Iterator[None]:
    """What is done with a server's words inside; words of another shape become a ServerError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{url} answered with something else than text generation does "
            f"({type(error).__name__}: {str(error)[:80]}); is it the right address?",
            200,
            "protocol",
        ) from error


@contextmanager
def connected(url: str, timeout_s: float) -> Iterator[None]:
    """What the connection does inside; its errors become a ServerError with a remedy."""
    try:
        yield
    except httpx2.ConnectTimeout as error:
        raise _unreachable(url, "it does not take connections") from error
    except httpx2.TimeoutException as error:
        raise ServerError(
            f"{url} was silent for {timeout_s:g} s; a long prompt may need a longer timeout",
            0,
            "timeout",
        ) from error
    except (httpx2.ConnectError, httpx2.ProxyError) as error:
        raise _unreachable(url, str(error)) from error
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise ServerError(f"{url}: the connection broke: {reason}", 0, "connection") from error


def _unreachable(url: str, reason: str) -> ServerError:
    return ServerError(
        f"no server answers at {url} ({reason}); start one with `longwing serve`, or give the "
        "address of one that runs",
        0,
        "unreachable",
    )


def _words(body: Any) -> tuple[str, str]:
    """(message, kind) in any of the dialects: TGI's, OpenAI's, FastAPI's."""
    if not isinstance(body, dict):
        return "", ""
    error = body.get("error", body.get("detail", body.get("message", "")))
    if isinstance(error, dict):
        kind = error.get("code") if isinstance(error.get("code"), str) else error.get("type")
        return str(error.get("message", "")), str(kind or "")
    message = error if isinstance(error, str) else json.dumps(error)
    return message, str(body.get("error_type", ""))


def _seconds(retry_after: str | None) -> int:
    """A Retry-After in seconds; a date, or nonsense, counts as one."""
    return int(retry_after) if retry_after and retry_after.isdecimal() else 1
