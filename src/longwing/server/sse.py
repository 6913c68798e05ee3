"""Server-sent events: `data:` frames to a client, comments when there is nothing to say.

A prompt of 24,000 tokens is read for a while before its first token; proxies and clients close a
connection that is silent for that long. So each chunk read is told in a comment line, and after
`keep_alive_s` without any frame one goes out too; clients skip what they do not know. The frames'
generator is closed when the client leaves, and its `finally` runs at once, wherever it stands.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from longwing.engine.events import Reading
from longwing.server.leave import ClientLeftError, until_done_or_left

KEEP_ALIVE = b": keep-alive\n\n"


def data_frame(obj: object) -> bytes:
    r"""One event, `data:{json}\n\n`; one line, since JSON escapes every line break."""
    return b"data:" + orjson.dumps(obj) + b"\n\n"


def reading_frame(reading: Reading) -> bytes:
    """A comment that says how far the prompt is; clients that do not know it skip it."""
    return b": reading %d/%d\n\n" % (reading.done, reading.total)


def sse_response(
    http: Request,
    frames: AsyncIterator[bytes],
    *,
    headers: Mapping[str, str] | None = None,
    keep_alive_s: float,
    on_close: Callable[[], None] | None = None,
) -> StreamingResponse:
    """The stream of these frames.

    Args:
        http: the request that is answered; its body has been read.
        frames: whole events. An error of the generator after it began is its own to put into a
            frame; one that gets here cuts the connection.
        headers: besides the content type, and those that keep proxies from buffering.
        keep_alive_s: seconds of silence after which a comment is sent.
        on_close: called once the stream is over. A client can leave before the generator has begun,
            and one that never began has no `finally`: cancel here what was begun before it.
    """
    return _EventStream(http, frames, headers or {}, keep_alive_s, on_close)


class _EventStream(StreamingResponse):
    def __init__(
        self,
        http: Request,
        frames: AsyncIterator[bytes],
        headers: Mapping[str, str],
        keep_alive_s: float,
        on_close: Callable[[], None] | None,
    ) -> None:
        super().__init__(
            frames,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
        )
        self._http = http
        self._frames = frames
        self._keep_alive_s = keep_alive_s
        self._on_close = on_close
        self._sending = asyncio.Lock()
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientLeftError):
                await until_done_or_left(self._http, self._stream(send))
        finally:
            if self._on_close is not None:
                self._on_close()

    async def _stream(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        keeper: asyncio.Task[None] | None = None
        try:
            await send({"type": "http.response.start", **start})
            self._last_sent = asyncio.get_running_loop().time()
            keeper = asyncio.create_task(self._keep_alive(send))
            async for frame in self._frames:
                await self._send(send, frame)
            keeper.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
            close = getattr(self._frames, "aclose", None)
            if close is not None:
                await close()

    async def _send(self, send: Send, frame: bytes) -> None:
        async with self._sending:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            self._last_sent = asyncio.get_running_loop().time()

    async def _keep_alive(self, send: Send) -> None:
        """One task a stream, not one a frame: it sleeps until the silence would be too long."""
        clock = asyncio.get_running_loop().time
        while True:
            silence_s = clock() - self._last_sent
            if silence_s >= self._keep_alive_s:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_s - silence_s)
