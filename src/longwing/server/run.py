"""The server as a process: its socket, its signals, its end.

Told to stop (SIGTERM, Ctrl-C), it goes on listening: /health and /ready say 503 from that moment,
so do new requests, and those at work finish, within `drain_s`. Then it closes, with exit status 0.
Told twice, it ends the answers that are still at work (their clients get an error, not silence).

uvicorn would close its socket and count connections instead; here the engine's service knows when
the last answer is complete.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from longwing.errors import ConfigError
from longwing.server.app import Extension, current, make_app
from longwing.server.options import MAX_HEADER_BYTES, ServerOptions
from longwing.server.serving import Serving

SETTLE_S = 5
"""Seconds in which clients may read what is left of complete answers."""
IDLE_S = 75
"""Seconds an idle connection is kept: more than load balancers keep theirs (60)."""


def run(
    options: ServerOptions,
    open_serving: Callable[[], Awaitable[Serving]],
    *,
    announce: Callable[[str], None] | None = None,
    extension: Extension | None = None,
) -> None:
    """Serve until told to stop.

    Args:
        options: where to listen, and how long to drain.
        open_serving: starts the engine; may take minutes. The port is taken before that, so that
            one that is in use is found at once, but answers nothing yet.
        announce: called with the server's URL when it answers.
        extension: routes of a room above.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    with contextlib.closing(bind(options)) as sock:
        asyncio.run(_run(open_serving, sock, announce, extension))


def bind(options: ServerOptions) -> socket.socket:
    """The server's socket: it has its address, and does not listen yet.

    Raises:
        ConfigError: the address is not of this machine, or in use.
    """
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(options, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(options, error) from error
    return sock


async def _run(
    open_serving: Callable[[], Awaitable[Serving]],
    sock: socket.socket,
    announce: Callable[[str], None] | None,
    extension: Extension | None,
) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())
    opening = asyncio.ensure_future(open_serving())
    if not await _first(opening, stop):
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        return
    await serve(
        opening.result(), sock, stop=stop, hurry=hurry, announce=announce, extension=extension
    )


async def serve(
    serving: Serving,
    sock: socket.socket,
    *,
    stop: asyncio.Event,
    hurry: asyncio.Event,
    announce: Callable[[str], None] | None = None,
    extension: Extension | None = None,
) -> None:
    """Answer on a socket until `stop`; then drain, or end at once when it is `hurry`."""
    app = make_app(serving, extension)
    config = uvicorn.Config(
        app,
        http=partial(PatientProtocol, patience_s=serving.options.body_timeout_s),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=SETTLE_S,
        # The guard refuses earlier, and in words; this is for what never becomes a request.
        h11_max_incomplete_event_size=MAX_HEADER_BYTES + 2**15,
    )
    server = _Server(config, lambda: announce(_url(serving, sock)) if announce else None)
    answering = asyncio.ensure_future(server.serve(sockets=[sock]))
    if await _first(answering, stop):
        answering.result()
        return
    if extension is not None:
        await extension.settle()
    service = current(app).service  # not always the one it began with
    draining = asyncio.ensure_future(service.stop(serving.options.drain_s))
    closing = None if extension is None else asyncio.ensure_future(extension.close())
    if not await _first(draining, hurry):
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await service.stop(0)
    if closing is not None:
        await closing
    server.should_exit = True
    await answering


class _Server(uvicorn.Server):
    """uvicorn without hands on the signals, and with a word when it is up."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to `_run`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn; then tell."""
        await super().startup(sockets)
        self._started()


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, for clients who send a request's head within `patience_s`, or are cut off.

    Without it, a thousand connections that each send a byte now and then hold the server for ever.
    """

    def __init__(self, *args: Any, patience_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience_s = patience_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection owes a request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Each part of a head leaves the deadline where it is; a whole one lifts it."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect()
        else:
            self._relieve()

    def on_response_complete(self) -> None:
        """Uvicorn's own timer takes over: an idle connection may be idle for longer."""
        self._relieve()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is owed."""
        self._relieve()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._patience_s, self.transport.abort)

    def _relieve(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


async def _first(work: "asyncio.Future[Any]", event: asyncio.Event) -> bool:
    """Wait for either; whether the work is done."""
    told = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((work, told), return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()
    return work.done()


def _url(serving: Serving, sock: socket.socket) -> str:
    """Where the server is, with the port it got."""
    host = serving.options.host
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sock.getsockname()[1]}"


def _cannot_listen(options: ServerOptions, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {options.host}:{options.port}: {error.strerror or error}",
        remedy="choose another --host or --port",
    )
