"""A server on this machine that answers as a test wrote it down, in the pieces it wrote."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One answer: its status, headers, and the pieces of its body, each sent on its own.

    A piece may be a function: it is called in place of sending (to wait, or to look).
    `broken` cuts the connection before the body's end.
    """

    status: int = 200
    pieces: Sequence[bytes | Callable[[], object]] = ()
    headers: dict[str, str] = field(default_factory=dict)
    broken: bool = False


@dataclass
class Heard:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class ScriptedServer:
    """Answers in the order of `answers`, the last one for ever; remembers what it was asked."""

    def __init__(self, answers: Sequence[Said]) -> None:
        self.answers = list(answers)
        self.heard: list[Heard] = []
        self.left = threading.Event()
        self.url = ""


@contextmanager
def serving(*answers: Said) -> Iterator[ScriptedServer]:
    """A server that lives as long as the block."""
    script = ScriptedServer(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            script.heard.append(Heard(self.command, self.path, dict(self.headers), body))
            said = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for piece in said.pieces:
                    if callable(piece):
                        piece()
                    else:
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                        self.wfile.flush()
                if not said.broken:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:
                script.left.set()
            self.close_connection = said.broken or self.close_connection

        do_GET = do_POST = answer

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


def json_said(value: object, status: int = 200, **headers: str) -> Said:
    """A JSON answer."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Said(status=status, pieces=[json.dumps(value).encode()], headers=named)


def event(value: object) -> bytes:
    """One server-sent event, written as longwing's server writes it: not escaped to ASCII."""
    return b"data:" + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def token(text: str, number: int = 1, *, special: bool = False, **rest: object) -> dict[str, Any]:
    """A stream event of TGI's."""
    return {
        "index": number,
        "token": {"id": number, "text": text, "logprob": -0.5, "special": special},
        "generated_text": None,
        "details": None,
        **rest,
    }


def last(text: str, whole: str) -> dict[str, Any]:
    """The last one of a stream."""
    details = {"finish_reason": "length", "generated_tokens": 3, "seed": 7, "input_length": 9}
    return token(text, 3, generated_text=whole, details=details)
