"""Requests and readers of their answers, for whichever client carries them.

A `Call` is a request with what reads its answer; a `StreamCall` makes a reader of events. Neither
knows of connections, so that the two clients differ in `await` alone.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from longwing.client.answers import (
    MAX_NEW_TOKENS,
    Answer,
    ChatDelta,
    ChatSettings,
    Choice,
    Completion,
    GenerateSettings,
    StreamToken,
    TextSettings,
    TextToken,
    Token,
)
from longwing.client.events import EventLines, Reading
from longwing.client.faults import event_fault, incomplete, understood
from longwing.errors import RequestError

T = TypeVar("T")

OnReading = Callable[[int, int], None]
"""Called with (done, total) tokens while the server reads the prompt."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request. `read` takes the parsed JSON of a 2xx answer."""

    path: str
    read: Callable[[Any], T]
    body: bytes | None = None

    def result(self, content: bytes, url: str) -> T:
        """What an answer's bytes say."""
        with understood(url):
            return self.read(json.loads(content))


@dataclass(frozen=True, kw_only=True)
class StreamCall(Generic[T]):
    """One request for a stream. `read` gives an event's item, and whether it is the last event."""

    path: str
    read: Callable[[Any], tuple[T | None, bool]]
    body: bytes


class StreamReader(Generic[T]):
    """What one stream says, from its bytes as they arrive."""

    def __init__(self, call: StreamCall[T], url: str, on_reading: OnReading | None) -> None:
        self._call, self._url, self._on_reading = call, url, on_reading
        self._lines = EventLines()
        self.done = False

    def push(self, chunk: bytes) -> Iterator[T]:
        """The items that are complete now; nothing after the last event.

        Raises:
            LongwingError: an event says that the answer failed, or is not understood.
        """
        for event in self._lines.push(chunk):
            if self.done:
                break
            if isinstance(event, Reading):
                if self._on_reading is not None:
                    self._on_reading(event.done, event.total)
                continue
            if event == "[DONE]":
                self.done = True
                break
            with understood(self._url):
                parsed = json.loads(event)
            if error := event_fault(parsed, self._url):
                raise error
            with understood(self._url):
                item, self.done = self._call.read(parsed)
            if item is not None:
                yield item

    def end(self) -> None:
        """The stream has ended.

        Raises:
            ServerError: its last event is missing.
        """
        if not self.done:
            raise incomplete(self._url)


# TGI


def generate(prompt: str, settings: GenerateSettings) -> Call[Answer]:
    """`POST /generate`."""
    return Call(path="/generate", body=_generate_body(prompt, settings), read=_answer)


def stream(prompt: str, settings: GenerateSettings) -> StreamCall[StreamToken]:
    """`POST /generate_stream`."""
    return StreamCall(
        path="/generate_stream", body=_generate_body(prompt, settings), read=_stream_token
    )


def tokenize(text: str) -> Call[list[TextToken]]:
    """`POST /tokenize`."""
    return Call(path="/tokenize", body=_bytes({"inputs": text}), read=_text_tokens)


def chat_tokenize(messages: Sequence[Mapping[str, Any]]) -> Call[list[TextToken]]:
    """`POST /chat_tokenize`."""
    return Call(
        path="/chat_tokenize",
        body=_bytes({"messages": list(messages)}),
        read=lambda said: _text_tokens(said["tokenize_response"]),
    )


def info() -> Call[dict[str, Any]]:
    """`GET /info`."""
    return Call(path="/info", read=dict)


def _text_tokens(said: Any) -> list[TextToken]:
    return [
        TextToken(id=int(t["id"]), text=str(t["text"]), start=t["start"], stop=t["stop"])
        for t in said
    ]


def _generate_body(prompt: str, settings: GenerateSettings) -> bytes:
    _check_names(settings, GenerateSettings)
    parameters = {"max_new_tokens": MAX_NEW_TOKENS, "details": True, **settings}
    given = _with_adapter(parameters, "adapter_id")
    return _bytes({"inputs": prompt, "parameters": given})


def _answer(said: Any) -> Answer:
    # POST / and SageMaker answer with a list of one.
    whole = said[0] if isinstance(said, list) else said
    return _described(str(whole["generated_text"]), whole.get("details") or {})


def _described(text: str, details: Mapping[str, Any]) -> Answer:
    others = details.get("best_of_sequences") or []
    return Answer(
        text=text,
        finish_reason=str(details.get("finish_reason", "")),
        num_generated=int(details.get("generated_tokens", 0)),
        seed=details.get("seed"),
        tokens=_tokens(details.get("tokens")),
        top_tokens=tuple(_tokens(top) for top in details.get("top_tokens") or []),
        prompt_tokens=_tokens(details.get("prefill")),
        prompt_len=int(details.get("input_length") or len(details.get("prefill") or [])),
        others=tuple(_described(str(other["generated_text"]), other) for other in others),
    )


def _stream_token(said: Any) -> tuple[StreamToken, bool]:
    text = said.get("generated_text")
    answer = None if text is None else _described(str(text), said.get("details") or {})
    token, top = _token(said["token"]), _tokens(said.get("top_tokens"))
    return StreamToken(token=token, top=top, answer=answer), answer is not None


def _tokens(said: Any) -> tuple[Token, ...]:
    return tuple(_token(token) for token in said or [])


def _token(said: Any) -> Token:
    return Token(
        id=int(said["id"]),
        text=str(said["text"]),
        logprob=said.get("logprob"),
        special=bool(said.get("special", False)),
    )


# OpenAI


def chat(messages: Sequence[Mapping[str, Any]], settings: ChatSettings) -> Call[Completion]:
    """`POST /v1/chat/completions`."""
    body = _completion_body({"messages": list(messages)}, settings, ChatSettings)
    return Call(path="/v1/chat/completions", body=body, read=_completion)


def stream_chat(
    messages: Sequence[Mapping[str, Any]], settings: ChatSettings
) -> StreamCall[ChatDelta]:
    """The same as a stream, with the counts of tokens at its end."""
    first = {
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = _completion_body(first, settings, ChatSettings)
    return StreamCall(path="/v1/chat/completions", body=body, read=_chat_delta)


def completion(prompt: str | Sequence[str], settings: TextSettings) -> Call[Completion]:
    """`POST /v1/completions`."""
    prompts = prompt if isinstance(prompt, str) else list(prompt)
    body = _completion_body({"prompt": prompts}, settings, TextSettings)
    return Call(path="/v1/completions", body=body, read=_completion)


def models() -> Call[list[str]]:
    """`GET /v1/models`."""
    return Call(path="/v1/models", read=lambda said: [str(one["id"]) for one in said["data"]])


def _completion_body(
    first: dict[str, Any], settings: ChatSettings | TextSettings, known: type[Any]
) -> bytes:
    _check_names(settings, known)
    given = _with_adapter(settings, "model")
    extra = given.pop("extra", {})
    given.setdefault("max_tokens", MAX_NEW_TOKENS)
    return _bytes({**first, **given, **dict(extra)})


def _completion(said: Any) -> Completion:
    usage = said.get("usage") or {}
    choices = tuple(_choice(choice) for choice in said["choices"])
    if not choices:
        raise ValueError("no choices")
    return Completion(
        choices=choices,
        prompt_len=int(usage.get("prompt_tokens", 0)),
        num_generated=int(usage.get("completion_tokens", 0)),
        model=str(said.get("model", "")),
        raw=said,
    )


def _choice(said: Any) -> Choice:
    message = said.get("message") or {}
    text = message.get("content") if "message" in said else said["text"]
    return Choice(
        text=str(text or ""),
        finish_reason=str(said.get("finish_reason") or ""),
        tool_calls=tuple(message.get("tool_calls") or ()),
        logprobs=said.get("logprobs"),
    )


def _chat_delta(said: Any) -> tuple[ChatDelta | None, bool]:
    """The item of one chunk; the end is `[DONE]`, which is no chunk."""
    usage = said.get("usage") or {}
    choice = (said["choices"] or [{}])[0]
    if not choice and not usage:
        return None, False
    delta = choice.get("delta") or {}
    item = ChatDelta(
        text=str(delta.get("content") or ""),
        index=int(choice.get("index", 0)),
        finish_reason=choice.get("finish_reason"),
        tool_calls=tuple(delta.get("tool_calls") or ()),
        prompt_len=int(usage.get("prompt_tokens", 0)),
        num_generated=int(usage.get("completion_tokens", 0)),
    )
    return item, False


def _with_adapter(settings: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The settings that were made, an adapter under the name that a dialect has for it."""
    given = {name: value for name, value in settings.items() if value is not None}
    if "adapter" in given:
        if field in given:
            raise RequestError(f"adapter and {field} say the same twice; give one")
        given[field] = given.pop("adapter")
    return given


def _check_names(settings: Mapping[str, Any], known: type[Any]) -> None:
    """A misspelt setting must not be dropped by the server without a word."""
    names = get_type_hints(known)
    for name in settings:
        if name not in names:
            raise RequestError(f'there is no setting "{name}"; known are: {", ".join(names)}')


def _bytes(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request cannot be written as JSON: {error}") from None
