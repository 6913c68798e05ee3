"""Who may ask, and how much: what stands between the network and the routes.

In this order, and before a byte of the body is read: the size of the headers, the Host and Origin
a browser was made to send (a page elsewhere must not talk to a server on this machine, though the
browser that shows it can), the API key, the number of requests at work, the announced length. The
body is counted and timed as it arrives. Everything is denied unless it is `OPEN_PATHS`.

The guard also gives each request its id, catches what no route caught, and writes the log's line.
It is plain ASGI: a request passes it once, and a stream through it costs nothing.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longwing.errors import OverloadedError
from longwing.server.access_log import log_request
from longwing.server.faults import CLIENT_LEFT, log_failure, respond
from longwing.server.leave import ClientLeftError
from longwing.server.options import MAX_HEADER_BYTES, MAX_HEADER_FIELDS, ServerOptions

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
"""What needs no key: they say one word about the server, and nothing about anyone."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")


class Guard:
    """The outermost part of the application.

    Args:
        app: what is guarded.
        options: keys and limits.
        on_overload: called for each request that is refused because too many are at work.
        is_open: what needs no key beside OPEN_PATHS, such as a page that asks its reader for one.
        payload_limits: paths whose bodies may have another length than the options say.

    Attributes:
        num_at_work: POST requests that are being answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        *,
        on_overload: Callable[[], None] = lambda: None,
        is_open: Callable[[Scope], bool] = lambda scope: False,
        payload_limits: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.app = app
        self.on_overload = on_overload
        self.is_open = is_open
        self.payload_limits = payload_limits
        self.options = options
        self.num_at_work = 0
        self._keys = [_digest(key.encode()) for key in options.api_keys]
        self._is_local = is_loopback(options.host)
        self._named = frozenset(host.lower() for host in options.allowed_hosts)
        self._hosts = self._named | {options.host.lower()}
        self._origins = frozenset(origin.lower() for origin in options.cors_allow_origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(_header(scope, b"x-request-id"))
        state["salt"] = ""
        answer = _Answer(send, state["request_id"])
        try:
            await self._pass(scope, self._bounded(scope, receive), answer)
        except Exception as error:
            await self._last_resort(scope, receive, answer, error)
        finally:
            log_request(scope, answer.status or CLIENT_LEFT, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_headers(scope["headers"])
        self._check_browser(scope)
        self._check_key(scope)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.num_at_work >= self.options.max_concurrent_requests:
            self.on_overload()
            raise OverloadedError(f"{self.num_at_work} requests are at work, the most there may be")
        self._check_length(scope)
        self.num_at_work += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.num_at_work -= 1

    async def _last_resort(
        self, scope: Scope, receive: Receive, answer: "_Answer", error: Exception
    ) -> None:
        """Answer what no route could; once an answer has begun, cutting it off is all there is."""
        if answer.status is None:
            response = respond(Request(scope), error)
            await response(scope, receive, answer)
        elif not isinstance(error, (ClientLeftError, ClientDisconnect)):
            log_failure(error, scope["state"]["request_id"])

    def _check_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        if len(headers) > MAX_HEADER_FIELDS:
            raise HTTPException(431, f"more than {MAX_HEADER_FIELDS} header fields")
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise HTTPException(431, f"headers of more than {MAX_HEADER_BYTES} bytes")

    def _check_browser(self, scope: Scope) -> None:
        """Against DNS rebinding and other sites' pages: a server on loopback knows its names."""
        if not self._is_local:
            return
        host = _header(scope, b"host").lower()
        if host and not self._is_ours(host):
            raise HTTPException(
                403, "this server does not go by that Host; serve with --allowed-hosts to add names"
            )
        origin = _header(scope, b"origin").lower()
        if not origin or not {"*", origin}.isdisjoint(self._origins):
            return
        if not is_own_origin(origin, host, self._named):
            raise HTTPException(
                403, "pages of this Origin may not ask; serve with --cors-allow-origin to let them"
            )

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        return name in self._hosts or is_loopback(name.strip("[]"))

    def _check_key(self, scope: Scope) -> None:
        """Every key is compared, and in constant time, whichever fits."""
        if not self._keys or scope["path"] in OPEN_PATHS or self.is_open(scope):
            return
        kind, _, key = _header(scope, b"authorization").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise HTTPException(
                401,
                "a valid API key is needed: `Authorization: Bearer …`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        # Prompts are cached for their own key alone. The name is not the key, nor leads to it.
        scope["state"]["salt"] = hashlib.sha256(b"salt" + given).hexdigest()

    def _check_length(self, scope: Scope) -> None:
        announced = _header(scope, b"content-length").lstrip("0")
        # Python refuses to read a number of thousands of digits; nobody needs to.
        huge = len(announced) > 18
        if announced.isdecimal() and (huge or int(announced) > self._limit(scope)):
            raise self._too_large(scope)

    def _limit(self, scope: Scope) -> int:
        return self.payload_limits.get(scope["path"], self.options.payload_limit)

    def _too_large(self, scope: Scope) -> HTTPException:
        return HTTPException(413, f"body of more than {self._limit(scope)} bytes")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, counting and timing the body; it is not kept here."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.options.body_timeout_s
        left = self._limit(scope)
        complete = False

        async def bounded() -> Message:
            nonlocal left, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive within {self.options.body_timeout_s:g} s"
                ) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large(scope)
            complete = not message.get("more_body", False)
            return message

        return bounded


class _Answer:
    """`send`, remembering the status and adding the headers that every response has."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status: int | None = None
        self._send = send
        self._headers = [
            (b"x-request-id", request_id.encode("ascii")),
            (b"x-content-type-options", b"nosniff"),
        ]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_own_origin(origin: str, host: str, named: Collection[str]) -> bool:
    """Whether a page is this server's own.

    Args:
        origin: the request's Origin, in lower case.
        host: its Host.
        named: further names that are this server.
    """
    ours = origin.partition("://")[2]  # an origin has no path
    return bool(ours) and (ours == host or _name(ours) in named)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> str:
    """A header's value; of several the first; empty if there is none."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


def _name(host: str) -> str:
    """A Host header's name, without the port; empty if it is not one."""
    found = _HOST.fullmatch(host)
    return found[1] if found else ""


def _request_id(given: str) -> str:
    """The client's own id if it is harmless, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
