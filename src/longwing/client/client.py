"""`Client`: asks, and waits for the answer."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from longwing.client.faults import connected, fault
from longwing.errors import OverloadedError, RequestError

T = TypeVar("T")

CONNECT_S = 10.0
"""A server that is there takes a connection at once, however busy it is."""


class Client:
    """A server, asked by a program that waits for the answers. Safe to share between threads.

    Leaving a stream early (`break`, Ctrl-C) closes its connection, at which the server stops
    generating.

    Args:
        base_url: "http://127.0.0.1:8080", or with a path before the routes.
        api_key: sent as a Bearer token.
        timeout_s: seconds of silence after which an answer is given up.
        retries: how often a request is sent again that a full server refused, each time after the
            wait that it names.

    Raises, as do all methods unless they say otherwise:
        RequestError: the address or a setting cannot be sent. RefusedError: the server finds the
            request at fault.
        OverloadedError: the server is full; try again after its `retry_after_s`.
        ServerError: nobody answers, the server failed, or the answer broke off.
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
        self._http = httpx2.Client(
            headers=headers(api_key), timeout=timeouts(timeout_s), follow_redirects=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def generate(self, prompt: str, **settings: Unpack[GenerateSettings]) -> Answer:
        """The continuation of a prompt (TGI's route): at most 256 tokens, unless set."""
        return self._ask(calls.generate(prompt, settings))

    def stream(
        self,
        prompt: str,
        *,
        on_reading: OnReading | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> Iterator[StreamToken]:
        """The same, token by token; the last one brings the whole answer.

        Args:
            prompt: the text; servers read special tokens in it as such.
            on_reading: called with (done, total) tokens of the prompt, if the server says so.
            settings: as for `generate`.
        """
        return self._stream(calls.stream(prompt, settings), on_reading)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **settings: Unpack[ChatSettings]
    ) -> Completion:
        """The answer to a conversation (OpenAI's route), by the model's own template."""
        return self._ask(calls.chat(messages, settings))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        on_reading: OnReading | None = None,
        **settings: Unpack[ChatSettings],
    ) -> Iterator[ChatDelta]:
        """The same, as it comes; the last item has the counts of tokens."""
        return self._stream(calls.stream_chat(messages, settings), on_reading)

    def completion(
        self, prompt: str | Sequence[str], **settings: Unpack[TextSettings]
    ) -> Completion:
        """The continuation of one prompt or several (OpenAI's route)."""
        return self._ask(calls.completion(prompt, settings))

    def tokenize(self, text: str) -> list[TextToken]:
        """The text's tokens."""
        return self._ask(calls.tokenize(text))

    def chat_tokenize(self, messages: Sequence[Mapping[str, Any]]) -> list[TextToken]:
        """A conversation's tokens, by the model's own template (TGI's route)."""
        return self._ask(calls.chat_tokenize(messages))

    def info(self) -> dict[str, Any]:
        """What is served, and with which limits (TGI's route)."""
        return self._ask(calls.info())

    def models(self) -> list[str]:
        """The names of what is served (OpenAI's route)."""
        return self._ask(calls.models())

    def health(self) -> bool:
        """Whether the server would answer now; False too if nobody is there. Raises nothing."""
        try:
            return self._http.get(self._url + "/health").is_success
        except httpx2.TransportError:
            return False

    def _ask(self, call: Call[T]) -> T:
        tries_left = self._retries
        while True:
            try:
                with self._response(call) as response:
                    with connected(self._url, self._timeout_s):
                        content = response.read()
                    return call.result(content, self._url)
            except OverloadedError as error:
                if tries_left <= 0:
                    raise
                time.sleep(error.retry_after_s)
            tries_left -= 1

    def _stream(self, call: StreamCall[T], on_reading: OnReading | None) -> Iterator[T]:
        tries_left = self._retries
        while True:
            has_begun = False
            try:
                for item in self._once(call, on_reading):
                    has_begun = True
                    yield item
                return
            except OverloadedError as error:
                if has_begun or tries_left <= 0:
                    raise
                time.sleep(error.retry_after_s)
            tries_left -= 1

    def _once(self, call: StreamCall[T], on_reading: OnReading | None) -> Iterator[T]:
        reader = StreamReader(call, self._url, on_reading)
        with self._response(call) as response:
            chunks = response.iter_bytes()
            while not reader.done:
                with connected(self._url, self._timeout_s):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                yield from reader.push(chunk)
        reader.end()

    @contextmanager
    def _response(self, call: Call[T] | StreamCall[T]) -> Iterator[httpx2.Response]:
        """A response of status 2xx, whose body has not been read; closed at the end."""
        method = "GET" if call.body is None else "POST"
        request = self._http.build_request(method, self._url + call.path, content=call.body)
        with connected(self._url, self._timeout_s):
            response = self._http.send(request, stream=True)
        try:
            if not response.is_success:
                with connected(self._url, self._timeout_s):
                    content = response.read()
                raise fault(response.status_code, response.headers, content, self._url)
            yield response
        finally:
            response.close()


def checked_url(base_url: str) -> str:
    """The address without a slash at its end.

    Raises:
        RequestError: it is no address of the web.
    """
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise RequestError(f'"{base_url}" is no address: {error}') from None
    if url.scheme not in ("http", "https") or not url.host:
        raise RequestError(f'"{base_url}" is no address; write it as http://127.0.0.1:8080')
    return str(url).rstrip("/")


def headers(api_key: str | None) -> dict[str, str]:
    """What every request says of itself.

    Raises:
        RequestError: the key has characters that no header can hold.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise RequestError("the API key has characters that no header can hold")
    key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"Content-Type": "application/json", "User-Agent": "longwing", **key}


def timeouts(timeout_s: float) -> httpx2.Timeout:
    """Patience with silence, less with a connection that is not taken."""
    return httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
