"""The engine's process: takes requests from a socket, steps the engine, sends back what happened.

One thread reads the socket; the main thread runs the model and never waits while there is work. The
process ends when the other side of the socket does, whatever the reason: no engine is left behind.
"""

import contextlib
import faulthandler
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from longwing.engine.engine import Engine
from longwing.engine.events import Event, Failed, to_wire
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.status import EngineInfo
from longwing.engine.warmup import warm_up
from longwing.engine.wire import receive, request_from_wire, to_frame
from longwing.errors import (
    CapacityError,
    EngineError,
    LongwingError,
    OverloadedError,
    RequestError,
)

_log = logging.getLogger(__name__)

Load = Callable[[Callable[[int, int], None]], tuple[Engine, EngineInfo]]
"""Loads a model, told how to report progress."""


def run(sock: socket.socket, load: Load) -> None:
    """Load a model, then serve it until the socket closes or a "stop" comes."""
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    last = 0.0

    def loading(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2 or done == total:
            last = now
            _send(sock, {"op": "loading", "done": done, "total": total})

    with contextlib.ExitStack() as stack:
        try:
            engine, info = load(loading)
            stack.enter_context(contextlib.closing(engine))
            warm_up(engine)
        except LongwingError as error:
            _send(sock, {"op": "refused", "message": str(error)})
            return
        threading.Thread(target=_read, args=(sock, inbox), name="engine inbox", daemon=True).start()
        _send(sock, {"op": "ready", "info": asdict(info)})
        _serve(sock, engine, inbox)
    with contextlib.suppress(OSError):  # the other side may have left first
        sock.shutdown(socket.SHUT_RDWR)  # wakes the reader; to close the socket would not


def _serve(
    sock: socket.socket, engine: Engine, inbox: "queue.SimpleQueue[dict[str, Any] | None]"
) -> None:
    """Step while there is work; look into the inbox before each step."""
    while True:
        said: list[tuple[str, Event]] = []
        messages = _drain(inbox, wait=not engine.busy)
        for message in messages:
            if message is None or message["op"] == "stop":
                return
            said += _obey(engine, message)
        said += engine.step()
        if said or messages:
            _tell(sock, engine, said)


def _tell(sock: socket.socket, engine: Engine, said: list[tuple[str, Event]]) -> None:
    """Send what happened, and how the engine is doing.

    What no frame can hold (the log-probabilities of a prompt of a million tokens) fails its own
    request alone.
    """
    steps = [asdict(step) for step in engine.take_steps()]

    def send(events: list[tuple[str, Event]], steps: list[dict[str, Any]]) -> None:
        wire = [[request_id, to_wire(event)] for request_id, event in events]
        stats = asdict(engine.stats)
        _send(sock, {"op": "events", "events": wire, "steps": steps, "stats": stats})

    try:
        send(said, steps)
    except EngineError:
        send([], steps)
        for request_id, event in said:
            try:
                send([(request_id, event)], [])
            except EngineError as error:
                engine.cancel(request_id)
                send([(request_id, Failed(kind="generation", message=str(error)))], [])


def _obey(engine: Engine, message: dict[str, Any]) -> list[tuple[str, Event]]:
    request_id = str(message["id"])
    if message["op"] == "cancel":
        engine.cancel(request_id)
        return []
    try:
        engine.add(request_id, request_from_wire(message["request"]))
    except (RequestError, CapacityError) as error:
        return [(request_id, Failed(kind="request", message=str(error)))]
    except OverloadedError as error:
        return [(request_id, Failed(kind="generation", message=str(error)))]
    return []


def _drain(
    inbox: "queue.SimpleQueue[dict[str, Any] | None]", *, wait: bool
) -> list[dict[str, Any] | None]:
    """All messages there are; with `wait`, at least one."""
    messages = [inbox.get()] if wait else []
    with contextlib.suppress(queue.Empty):
        while True:
            messages.append(inbox.get_nowait())
    return messages


def _read(sock: socket.socket, inbox: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Move messages from the socket to the inbox; None at its end."""
    try:
        while (message := receive(sock)) is not None:
            inbox.put(message)
    except OSError:
        pass
    inbox.put(None)


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.sendall(to_frame(message))


class _Thread:
    """An engine in a thread of this process: for tests, and for Python programs."""

    def __init__(self, sock: socket.socket, load: Load) -> None:
        self._sock = sock.dup()
        self._thread = threading.Thread(
            target=self._run, args=(load,), name="longwing engine", daemon=True
        )
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self, load: Load) -> None:
        with self._sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            run(self._sock, load)


def engine_thread(load: Load) -> Callable[[socket.socket], _Thread]:
    """How to start an engine in a thread; see `service.engine_process`."""
    return lambda sock: _Thread(sock, load)


def main() -> None:
    """The engine's process: its socket's number is the argument, LONGWING_ENGINE its settings."""
    # Ctrl-C and a service manager's SIGTERM reach every process of a group. When to end is the
    # server's decision: it lets answers finish, then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # a hung engine shows where it hangs
    settings = json.loads(os.environ["LONGWING_ENGINE"])
    logging.basicConfig(level=settings["log_level"], format="%(levelname)s engine: %(message)s")
    options, path = EngineOptions(**settings["options"]), Path(settings["path"])
    with (
        socket.socket(fileno=int(sys.argv[1])) as sock,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        try:
            run(
                sock, lambda progress: load_engine(path, options, progress=progress, dedicated=True)
            )
        except EngineError as error:
            _log.critical("%s", error)
            _end(1)
    _end(0)


def _end(status: int) -> NoReturn:
    """End this process without looking back.

    A reader thread blocked in recv must not delay it, nor what an error's frames hold: to free a
    graph or a tensor waits for the GPU, and a GPU that waits for a lost rank is never through.
    """
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
