"""`AsyncClient`: as `Client`, for programs that do other things while they wait."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self, TypeVar, Unpack

import httpx2

from longwing.client import calls
from longwing.client.answers import (
    Answer,
    ChatDelta,
    ChatSettings,
    Completion,
    GenerateSettings,
    StreamToken,
    TextSettings,
    TextToken,
)
from longwing.client.calls import Call, OnReading, StreamCall, StreamReader
from longwing.client.client import checked_url, headers, timeouts
from longwing.client.faults import connected, fault
from longwing.errors import OverloadedError

T = TypeVar("T")


class AsyncClient:
    """A server, asked from one event loop. Arguments, methods and errors are `Client`'s.

    A stream that is left early should be closed (`contextlib.aclosing`), as any asynchronous
    generator; its connection goes with it, and the server stops generating.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 0,
    ) -> None:
        self._url = checked_url(base_url)
        self._timeout_s = timeout_s
        self._retries = retries
        self._http = httpx2.AsyncClient(
            headers=headers(api_key), timeout=timeouts(timeout_s), follow_redirects=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def generate(self, prompt: str, **settings: Unpack[GenerateSettings]) -> Answer:
        """As `Client.generate`."""
        return await self._ask(calls.generate(prompt, settings))

    def stream(
        self,
        prompt: str,
        *,
        on_reading: OnReading | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> AsyncIterator[StreamToken]:
        """As `Client.stream`."""
        return self._stream(calls.stream(prompt, settings), on_reading)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], **settings: Unpack[ChatSettings]
    ) -> Completion:
        """As `Client.chat`."""
        return await self._ask(calls.chat(messages, settings))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        on_reading: OnReading | None = None,
        **settings: Unpack[ChatSettings],
    ) -> AsyncIterator[ChatDelta]:
        """As `Client.stream_chat`."""
        return self._stream(calls.stream_chat(messages, settings), on_reading)

    async def completion(
        self, prompt: str | Sequence[str], **settings: Unpack[TextSettings]
    ) -> Completion:
        """As `Client.completion`."""
        return await self._ask(calls.completion(prompt, settings))

    async def tokenize(self, text: str) -> list[TextToken]:
        """As `Client.tokenize`."""
        return await self._ask(calls.tokenize(text))

    async def chat_tokenize(self, messages: Sequence[Mapping[str, Any]]) -> list[TextToken]:
        """As `Client.chat_tokenize`."""
        return await self._ask(calls.chat_tokenize(messages))

    async def info(self) -> dict[str, Any]:
        """As `Client.info`."""
        return await self._ask(calls.info())

    async def models(self) -> list[str]:
        """As `Client.models`."""
        return await self._ask(calls.models())

    async def health(self) -> bool:
        """As `Client.health`."""
        try:
            return (await self._http.get(self._url + "/health")).is_success
        except httpx2.TransportError:
            return False

    async def _ask(self, call: Call[T]) -> T:
        tries_left = self._retries
        while True:
            try:
                async with self._response(call) as response:
                    with connected(self._url, self._timeout_s):
                        content = await response.aread()
                    return call.result(content, self._url)
            except OverloadedError as error:
                if tries_left <= 0:
                    raise
                await asyncio.sleep(error.retry_after_s)
            tries_left -= 1

    async def _stream(self, call: StreamCall[T], on_reading: OnReading | None) -> AsyncIterator[T]:
        tries_left = self._retries
        while True:
            has_begun = False
            try:
                async with aclosing(self._once(call, on_reading)) as items:
                    async for item in items:
                        has_begun = True
                        yield item
                return
            except OverloadedError as error:
                if has_begun or tries_left <= 0:
                    raise
                await asyncio.sleep(error.retry_after_s)
            tries_left -= 1

    async def _once(
        self, call: StreamCall[T], on_reading: OnReading | None
    ) -> AsyncGenerator[T, None]:
        reader = StreamReader(call, self._url, on_reading)
        async with self._response(call) as response, aclosing(response.aiter_bytes()) as chunks:
            while not reader.done:
                with connected(self._url, self._timeout_s):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                for item in reader.push(chunk):
                    yield item
        reader.end()

    @asynccontextmanager
    async def _response(self, call: Call[T] | StreamCall[T]) -> AsyncIterator[httpx2.Response]:
        method = "GET" if call.body is None else "POST"
        request = self._http.build_request(method, self._url + call.path, content=call.body)
        with connected(self._url, self._timeout_s):
            response = await self._http.send(request, stream=True)
        try:
            if not response.is_success:
                with connected(self._url, self._timeout_s):
                    content = await response.aread()
                raise fault(response.status_code, response.headers, content, self._url)
            yield response
        finally:
            await response.aclose()
