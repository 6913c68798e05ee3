"""Both clients against a scripted server: every answer read, every failure told by its kind."""

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from client.scripted_server import Said, event, json_said, last, serving, token
from longwing.client import Answer, AsyncClient, Client, RefusedError, StreamToken, Token
from longwing.client.events import MAX_EVENT_BYTES, EventLines, Reading
from longwing.errors import OverloadedError, RequestError, ServerError

DETAILS = {
    "finish_reason": "eos_token",
    "generated_tokens": 2,
    "seed": 5,
    "prefill": [{"id": 1, "text": "a", "logprob": None}],
    "tokens": [{"id": 2, "text": " b", "logprob": -0.25, "special": False}],
    "top_tokens": [[{"id": 2, "text": " b", "logprob": -0.25, "special": False}]],
    "best_of_sequences": [
        {"generated_text": "other", "finish_reason": "length", "generated_tokens": 1, "seed": 6,
         "prefill": [], "tokens": []}
    ],
}  # fmt: skip
CHAT = {
    "id": "chatcmpl-1", "object": "chat.completion", "model": "tiny",
    "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None,
                 "message": {"role": "assistant", "content": "Hello."}}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
}  # fmt: skip


def awaited(url: str, ask: Callable[[AsyncClient], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, **settings) as client:
            return await ask(client)

    return asyncio.run(run())


async def collected(items: Any) -> list[Any]:
    return [item async for item in items]


def test_client_is_imported_without_torch_or_any_other_room() -> None:
    check = (
        "import longwing.client, sys; "
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('longwing.')}; "
        "sys.exit('torch' in sys.modules or rooms != {'client', 'errors'})"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_generate_sends_tgis_body_and_reads_every_detail() -> None:
    with serving(json_said({"generated_text": " b", "details": DETAILS})) as server:
        with Client(server.url + "/", api_key="secret") as client:
            answer = client.generate("a", temperature=0.5, stop=["x"], top_p=None)
        assert answer == awaited(server.url, lambda c: c.generate("a", temperature=0.5))
    heard = server.heard[0]
    assert (heard.method, heard.path) == ("POST", "/generate")
    assert heard.headers["Authorization"] == "Bearer secret"
    assert heard.body == {
        "inputs": "a",
        "parameters": {"max_new_tokens": 256, "details": True, "temperature": 0.5, "stop": ["x"]},
    }
    assert answer == Answer(
        text=" b",
        finish_reason="eos_token",
        num_generated=2,
        seed=5,
        tokens=(Token(id=2, text=" b", logprob=-0.25),),
        top_tokens=((Token(id=2, text=" b", logprob=-0.25),),),
        prompt_tokens=(Token(id=1, text="a"),),
        prompt_len=1,
        others=(Answer(text="other", finish_reason="length", num_generated=1, seed=6),),
    )


def test_adapter_goes_by_each_dialects_own_word() -> None:
    said = [json_said({"generated_text": "b"}), json_said(CHAT)]
    with serving(*said) as server, Client(server.url) as client:
        client.generate("a", adapter="mine")
        client.chat([], adapter="mine")
        with pytest.raises(RequestError, match="adapter and model say the same twice"):
            client.chat([], adapter="mine", model="tiny")
    assert server.heard[0].body["parameters"]["adapter_id"] == "mine"
    assert server.heard[1].body["model"] == "mine"
    assert not any("adapter" in heard.body for heard in server.heard)


@pytest.mark.parametrize("piece_len", [1, 2, 3, 7, 1000])
def test_stream_is_the_same_however_its_bytes_are_cut(piece_len: int) -> None:
    texts = ["né", "🙂", "\u2028\x85\n", " z"]  # line ends to Python, and not to SSE
    stream = b": keep-alive\n\n: reading 3/9\n\n: reading 9/9\r\n\r\n"
    stream += b"".join(event(token(text, number)) for number, text in enumerate(texts))
    stream += event(last("!", "".join(texts) + "!")).replace(b"\n\n", b"\r\n\r\n")
    pieces = [stream[at : at + piece_len] for at in range(0, len(stream), piece_len)]
    reading: list[tuple[int, int]] = []
    with serving(Said(pieces=pieces)) as server:
        with Client(server.url) as client:
            said = list(client.stream("x", on_reading=lambda *at: reading.append(at)))
        assert said == awaited(server.url, lambda c: collected(c.stream("x")))
    assert [one.text for one in said] == [*texts, "!"]
    assert reading == [(3, 9), (9, 9)]
    assert [one.answer for one in said[:-1]] == [None] * 4
    assert said[-1].answer == Answer(
        text="".join(texts) + "!", finish_reason="length", num_generated=3, seed=7, prompt_len=9
    )


def test_special_token_adds_no_text() -> None:
    assert StreamToken(token=Token(id=1, text="<end>", special=True)).text == ""


def test_stream_without_its_last_event_raises_after_what_came() -> None:
    with serving(Said(pieces=[event(token("a"))])) as server, Client(server.url) as client:
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(ServerError, match="broke off") as caught:
            next(stream)
        assert caught.value.kind == "incomplete"
        with pytest.raises(ServerError, match="broke off"):
            awaited(server.url, lambda c: collected(c.stream("x")))


def test_connection_cut_in_the_middle_raises() -> None:
    with serving(Said(pieces=[event(token("a"))], broken=True)) as server:
        with Client(server.url) as client, pytest.raises(ServerError, match="connection broke"):
            list(client.stream("x"))
        with pytest.raises(ServerError, match="connection broke"):
            awaited(server.url, lambda c: collected(c.stream("x")))


@pytest.mark.parametrize(
    ("said", "kind", "error"),
    [
        ({"error": "too long", "error_type": "validation"}, "validation", RefusedError),
        ({"error": "Request failed", "error_type": "generation"}, "generation", ServerError),
        ({"error": {"message": "m", "type": "t", "code": "c"}}, "c", ServerError),
        ({"error": {"message": "m", "http_status_code": 422}}, "", RefusedError),
    ],
)  # fmt: skip
def test_error_event_ends_a_stream_with_its_kind(
    said: dict[str, Any], kind: str, error: type[ServerError]
) -> None:
    one_piece = event(token("a")) + event(said)
    with serving(Said(pieces=[one_piece])) as server, Client(server.url) as client:
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(error) as caught:
            next(stream)
    assert type(caught.value) is error
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (422, {"error": "too long", "error_type": "validation"}, RefusedError, "too long"),
        (400, {"error": {"message": "context length is 9", "code": "context_length_exceeded"}},
         RefusedError, "context length is 9"),
        (404, {"error": "no such route", "error_type": "not_found"}, RefusedError, "no such route"),
        (401, {"error": "no valid key", "error_type": "auth"}, ServerError, "API key"),
        (424, {"error": "Request failed", "error_type": "generation"}, ServerError, "failed"),
        (500, {"detail": "oh"}, ServerError, "oh"),
        (503, {"error": "dead", "error_type": "unavailable"}, ServerError, "dead"),
        (302, {}, ServerError, "redirects"),
    ],
)  # fmt: skip
def test_refusal_keeps_status_and_words(
    status: int, body: object, error: type[ServerError], words: str
) -> None:
    with serving(json_said(body, status)) as server, Client(server.url) as client:
        for ask in (client.info, lambda: list(client.stream("x")), lambda: client.chat([])):
            with pytest.raises(error, match=words) as caught:
                ask()
            assert type(caught.value) is error
            assert caught.value.status == status
        with pytest.raises(error, match=words):
            awaited(server.url, lambda c: c.info())


def test_refused_request_is_a_request_error_too() -> None:
    assert issubclass(RefusedError, RequestError)


@pytest.mark.parametrize("status", [429, 503])
def test_full_server_says_when_to_try_again(status: int) -> None:
    full = json_said({"error": "Model is overloaded"}, status, Retry_After="3")
    with serving(full) as server, Client(server.url) as client:
        with pytest.raises(OverloadedError, match="overloaded") as caught:
            client.generate("x")
        assert caught.value.retry_after_s == 3
        assert len(server.heard) == 1


def test_retries_wait_as_long_as_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("longwing.client.client.time.sleep", slept.append)
    monkeypatch.setattr("longwing.client.async_client.asyncio.sleep", sleep)
    full = json_said({"error": "Model is overloaded"}, 429, Retry_After="2")
    good = Said(pieces=[event(last("a", "a"))])
    with serving(full, full, good) as server, Client(server.url, retries=2) as client:
        assert [one.text for one in client.stream("x")] == ["a"]
    with serving(full, json_said({"data": [{"id": "m"}]})) as server:
        assert awaited(server.url, lambda c: c.models(), retries=1) == ["m"]
    with serving(full) as server, Client(server.url, retries=2) as client:
        with pytest.raises(OverloadedError):
            client.info()
        assert len(server.heard) == 3
    assert slept == [2, 2, 2, 2, 2]


def test_silence_is_given_up_with_a_remedy() -> None:
    waiting = threading.Event()
    with serving(Said(pieces=[event(token("a")), waiting.wait])) as server:
        with Client(server.url, timeout_s=0.2) as client:
            stream = client.stream("x")
            assert next(stream).text == "a"
            with pytest.raises(ServerError, match=r"silent for 0\.2 s; a long prompt") as caught:
                next(stream)
            assert caught.value.kind == "timeout"
        waiting.set()


def test_nobody_there_names_the_address_and_a_remedy() -> None:
    with serving(json_said({})) as server:
        pass
    with Client(server.url) as client:
        assert not client.health()
        with pytest.raises(ServerError, match=rf"{server.url}.*longwing serve") as caught:
            client.info()
        assert caught.value.status == 0
    assert not awaited(server.url, lambda c: c.health())
    with pytest.raises(ServerError, match="longwing serve"):
        awaited(server.url, lambda c: c.generate("x"))


def test_leaving_a_stream_closes_its_connection() -> None:
    for leave in (_leave_sync, _leave_async):
        chunks = itertools.chain([event(token("a"))], itertools.repeat(b": keep-alive\n\n", 10**6))
        with serving(Said(pieces=chunks)) as server:  # type: ignore[arg-type]
            leave(server.url)
            assert server.left.wait(10)


def _leave_sync(url: str) -> None:
    with Client(url) as client:
        stream = client.stream("x")
        next(stream)
        stream.close()


def _leave_async(url: str) -> None:
    async def leave(client: AsyncClient) -> None:
        stream = client.stream("x")
        await anext(stream)
        await stream.aclose()

    awaited(url, leave)


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b'{"generated_text": null, "details": 4}', b"{}", b"null"]
)
def test_other_kind_of_server_is_recognised(content: bytes) -> None:
    with serving(Said(pieces=[content])) as server, Client(server.url) as client:
        with pytest.raises(ServerError, match="right address") as caught:
            client.generate("x")
        assert caught.value.kind == "protocol"
        with pytest.raises(ServerError):
            list(client.stream("x"))


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "", "http://", "http://[::1"])
def test_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(RequestError, match="no address"):
        Client(url)
    with pytest.raises(RequestError, match="no address"):
        AsyncClient(url)


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(RequestError, match='no setting "temprature"; known are'):
            client.generate("x", temprature=1)  # type: ignore[call-arg]
        with pytest.raises(RequestError, match="cannot be written as JSON"):
            client.generate("x", temperature=float("nan"))
    with pytest.raises(RequestError, match="API key"):
        Client("http://127.0.0.1:9", api_key="a\nb")


def test_chat_and_completion_speak_openais_dialect() -> None:
    text = {"choices": [{"text": "A b", "finish_reason": "length", "logprobs": {"tokens": []}}]}
    answers = (json_said(CHAT), json_said(CHAT), json_said(text))
    messages = [{"role": "user", "content": "Hi"}]
    with serving(*answers) as server, Client(server.url) as client:
        answer = client.chat(messages, seed=1, extra={"cache_salt": "s"}, tools=None)
        assert awaited(server.url, lambda c: c.chat(messages)) == answer
        whole = client.completion("A", echo=True, logprobs=2, max_tokens=1)
    assert (answer.text, answer.finish_reason) == ("Hello.", "stop")
    assert (answer.prompt_len, answer.num_generated, answer.model) == (4, 2, "tiny")
    assert (whole.text, whole.choices[0].logprobs) == ("A b", {"tokens": []})
    assert server.heard[0].path == "/v1/chat/completions"
    assert server.heard[0].body == {
        "messages": messages, "seed": 1, "max_tokens": 256, "cache_salt": "s"
    }  # fmt: skip
    assert server.heard[2].path == "/v1/completions"
    assert server.heard[2].body == {"prompt": "A", "echo": True, "logprobs": 2, "max_tokens": 1}


def test_chat_streams_to_done_and_counts_tokens() -> None:
    def chunk(**delta: object) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}

    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}
    texts = [chunk(role="assistant", content=""), chunk(content="He"), chunk(content="y")]
    pieces = [event(one) for one in (*texts, end, usage)]
    answers = Said(pieces=[*pieces, b"data: [DONE]\n\n"]), Said(pieces=pieces)
    with serving(*answers) as server, Client(server.url) as client:
        said = list(client.stream_chat([{"role": "user", "content": "Hi"}]))
        with pytest.raises(ServerError, match="broke off"):
            list(client.stream_chat([]))
    assert "".join(one.text for one in said) == "Hey"
    assert [one.finish_reason for one in said if one.finish_reason] == ["stop"]
    assert (said[-1].prompt_len, said[-1].num_generated) == (4, 2)
    assert server.heard[0].body["stream_options"] == {"include_usage": True}


def test_the_small_questions() -> None:
    tokens = [{"id": 5, "text": "a", "start": 0, "stop": 1}]
    chat = {"tokenize_response": tokens, "templated_text": "a"}
    answers = [tokens, chat, chat, {"data": [{"id": "m"}]}, {"sha": None}]
    with serving(*map(json_said, answers)) as server, Client(server.url) as client:
        assert [(one.id, one.stop) for one in client.tokenize("a")] == [(5, 1)]
        chat_tokens = client.chat_tokenize([{"role": "user", "content": "a"}])
        assert awaited(server.url, lambda c: c.chat_tokenize([])) == chat_tokens
        assert client.models() == ["m"]
        assert client.info() == {"sha": None}
        assert client.health()
    paths = ["/tokenize", "/chat_tokenize", "/chat_tokenize", "/v1/models", "/info", "/health"]
    assert [heard.path for heard in server.heard] == paths


def test_events_are_cut_by_the_rules_of_sse() -> None:
    lines = EventLines()
    assert lines.push(b"data:a\ndata: b\nevent: x\n\n\ndata") == ["a\nb"]
    assert lines.push(b": {}\r\n\r\n:comment\n\n: reading 1/x\n: reading 2/3\n") == [
        "{}",
        Reading(2, 3),
    ]
    with pytest.raises(ServerError, match="longer than"):
        lines.push(b"x" * (MAX_EVENT_BYTES + 1))


def test_async_client_asks_many_at_once() -> None:
    both_are_here = threading.Barrier(2, timeout=10)
    body = json.dumps({"generated_text": "t"}).encode()
    with serving(Said(pieces=[both_are_here.wait, body])) as server:

        async def ask(client: AsyncClient) -> list[Answer]:
            return list(await asyncio.gather(client.generate("a"), client.generate("b")))

        assert [answer.text for answer in awaited(server.url, ask)] == ["t", "t"]
