"""Frames between the server's process and the engine's: a length, then that many bytes of JSON.

JSON, because it can only ever become plain data. A frame is one object with an `op`; the server
sends "add", "cancel" and "stop", the engine "loading", "ready", "refused" and "events".
"""

import socket
import struct
from dataclasses import asdict
from typing import Any

import orjson

from longwing.engine.request import Grammar, Request, SamplingParams
from longwing.errors import EngineError

HEADER = struct.Struct(">I")
"""The length of what follows, in bytes."""

MAX_FRAME = 2**28
"""Bytes of one frame at most. The largest is a prompt's log-probabilities."""


def to_frame(message: dict[str, Any]) -> bytes:
    """A message with its header."""
    body = orjson.dumps(message)
    if len(body) > MAX_FRAME:
        raise EngineError(f"a message of {len(body):,} bytes is above the limit of {MAX_FRAME:,}")
    return HEADER.pack(len(body)) + body


def body_len(header: bytes) -> int:
    """What a header announces.

    Raises:
        EngineError: more than a frame may have.
    """
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME:
        raise EngineError(f"a message of {length:,} bytes is above the limit of {MAX_FRAME:,}")
    return int(length)


def from_body(body: bytes) -> dict[str, Any]:
    """The message of a frame."""
    message: dict[str, Any] = orjson.loads(body)
    return message


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message of a socket; None if the other side has left.

    Raises:
        OSError: the socket is broken, or its timeout over.
    """
    header = _exactly(sock, HEADER.size)
    body = None if header is None else _exactly(sock, body_len(header))
    return None if body is None else from_body(body)


def _exactly(sock: socket.socket, length: int) -> bytes | None:
    """So many bytes; None if the other side has left."""
    parts: list[bytes] = []
    while length:
        part = sock.recv(min(length, 1 << 20))
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def request_to_wire(request: Request) -> dict[str, Any]:
    """A request as plain data."""
    params = asdict(request.params)
    params["stop"] = list(request.params.stop)
    params["stop_token_ids"] = sorted(request.params.stop_token_ids)
    return {
        "prompt_ids": list(request.prompt_ids),
        "params": params,
        "grammar": None if request.grammar is None else asdict(request.grammar),
        "salt": request.salt,
        "adapter": request.adapter,
        "include_stop": request.include_stop,
        "prompt_logprobs": request.prompt_logprobs,
    }


def request_from_wire(wire: dict[str, Any]) -> Request:
    """Undo `request_to_wire`."""
    params = dict(wire["params"])
    params["stop"] = tuple(params["stop"])
    params["stop_token_ids"] = frozenset(params["stop_token_ids"])
    grammar = wire["grammar"]
    return Request(
        prompt_ids=tuple(wire["prompt_ids"]),
        params=SamplingParams(**params),
        grammar=None if grammar is None else Grammar(**grammar),
        salt=wire["salt"],
        adapter=wire["adapter"],
        include_stop=wire["include_stop"],
        prompt_logprobs=wire["prompt_logprobs"],
    )
