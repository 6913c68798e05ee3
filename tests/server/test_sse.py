"""Streams and leaving, apart from any route: bytes, silence, and who ends what."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request

from longwing.server.leave import ClientLeftError, until_done_or_left
from longwing.server.sse import KEEP_ALIVE, data_frame, sse_response


class Client:
    """The far end of one call: what it was sent, and its leaving."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.leaves = asyncio.Event()
        self.on_frame: Callable[[bytes], Awaitable[None]] | None = None
        self.http = Request({"type": "http", "headers": []}, self.receive)

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self.on_frame is not None and message.get("body"):
            await self.on_frame(message["body"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def read(self, frames: AsyncIterator[bytes], keep_alive_s: float, **more: Any) -> None:
        response = sse_response(self.http, frames, keep_alive_s=keep_alive_s, **more)
        await response(self.http.scope, self.receive, self.send)


def test_a_frame_is_one_line_whatever_is_in_it() -> None:
    assert data_frame({"a": "x\ny\r\u2028"}) == 'data:{"a":"x\\ny\\r\u2028"}\n\n'.encode()


def test_silence_is_filled_with_comments_and_speech_is_not() -> None:
    async def main() -> None:
        client = Client()
        enough = asyncio.Event()
        comments = 0

        async def count(frame: bytes) -> None:
            nonlocal comments
            comments += frame == KEEP_ALIVE
            if comments == 3:
                enough.set()

        client.on_frame = count

        async def frames() -> AsyncIterator[bytes]:
            yield b"data:1\n\n"
            await enough.wait()
            yield b"data:2\n\n"

        await client.read(frames(), 0.005)
        assert client.body.startswith(b"data:1\n\n" + KEEP_ALIVE * 3)
        assert client.body.replace(KEEP_ALIVE, b"") == b"data:1\n\ndata:2\n\n"
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    asyncio.run(main())


def test_a_stream_that_speaks_in_time_has_no_comments() -> None:
    async def main() -> None:
        client = Client()

        async def frames() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"data:1\n\n"

        await client.read(frames(), 60)
        assert client.body == b"data:1\n\n" * 100

    asyncio.run(main())


@pytest.mark.parametrize("where", ["waiting", "sending"])
def test_a_client_that_leaves_ends_the_generator_at_once(where: str) -> None:
    async def main() -> None:
        client = Client()
        closed: list[str] = []

        async def stuck(frame: bytes) -> None:
            client.leaves.set()
            await asyncio.Event().wait()

        async def frames() -> AsyncIterator[bytes]:
            try:
                if where == "sending":
                    client.on_frame = stuck
                yield b"data:1\n\n"
                client.leaves.set()
                await asyncio.Event().wait()
            finally:
                closed.append("generator")

        await client.read(frames(), 60, on_close=lambda: closed.append("call"))
        assert closed == ["generator", "call"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_what_was_begun_is_ended_though_the_generator_never_ran() -> None:
    async def main() -> None:
        client = Client()
        closed: list[str] = []
        client.leaves.set()

        async def frames() -> AsyncIterator[bytes]:
            closed.append("ran")
            yield b""

        async def send(message: Any) -> None:
            await asyncio.Event().wait()

        response = sse_response(
            client.http, frames(), keep_alive_s=60, on_close=lambda: closed.append("call")
        )
        await response(client.http.scope, client.receive, send)
        assert closed == ["call"]

    asyncio.run(main())


def test_work_ends_with_its_result_or_its_error() -> None:
    async def main() -> None:
        async def work(value: int) -> int:
            if not value:
                raise ValueError("none")
            return value

        assert await until_done_or_left(Client().http, work(3)) == 3
        with pytest.raises(ValueError, match="none"):
            await until_done_or_left(Client().http, work(0))
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_work_for_a_client_that_left_is_cancelled_to_its_end() -> None:
    async def main() -> None:
        client = Client()
        ended: list[bool] = []

        async def work() -> None:
            try:
                client.leaves.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(True)

        with pytest.raises(ClientLeftError):
            await until_done_or_left(client.http, work())
        assert ended == [True]

    asyncio.run(main())
