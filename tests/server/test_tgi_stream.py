"""TGI's streams: their bytes, their last event, and what happens when something goes wrong."""

import asyncio
import json
from typing import Any

import pytest
from scripted import ScriptedEngine
from server_of import ask, engine_of, serving_of

from longwing.engine.events import Failed, Step
from longwing.engine.request import FinishReason, Request
from longwing.server.serving import Serving
from longwing.server.tgi_answer import Stream
from longwing.server.tgi_schema import GenerateRequest
from longwing.server.tgi_validation import prepare
from longwing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def serving(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer)


def events(serving: Serving, inputs: str, **parameters: Any) -> list[dict[str, Any]]:
    answer = ask(serving, "/generate_stream", {"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    frames = answer.text.split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data:")) for frame in frames]


def test_the_bytes_are_tgis(serving: Serving) -> None:
    answer = ask(serving, "/generate_stream", {"inputs": "é", "parameters": {"max_new_tokens": 2}})
    assert answer.content == (
        b'data:{"index":1,"token":{"id":127,"text":"","logprob":-0.25,"special":false},'
        b'"generated_text":null,"details":null}\n\n'
        b'data:{"index":2,"token":{"id":102,"text":"\xc3\xa9","logprob":-0.25,"special":false},'
        b'"generated_text":"\xc3\xa9","details":{"finish_reason":"length","generated_tokens":2,'
        b'"seed":null,"input_length":2}}\n\n'
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-compute-type"] == "cpu+optimized"
    assert answer.headers["x-compute-characters"] == "1"
    assert "x-compute-time" not in answer.headers


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 3},
        {"max_new_tokens": 50},
        {"stop": ["lo"]},
        {"stop": ["o w"], "return_full_text": True},
        {"do_sample": True, "seed": 3},
        {"top_n_tokens": 3},
        {"truncate": 4},
    ],
)
def test_a_stream_and_a_whole_answer_say_the_same(
    serving: Serving, parameters: dict[str, Any]
) -> None:
    body = {"inputs": "hello wörld", "parameters": {**parameters, "details": True}}
    whole = ask(serving, "/generate", body).json()
    *before, last = events(serving, "hello wörld", **parameters)
    assert all(event["details"] is event["generated_text"] is None for event in before)
    assert last["generated_text"] == whole["generated_text"]
    told = whole["details"]
    assert [event["token"] for event in [*before, last]] == told["tokens"]
    assert [event["index"] for event in [*before, last]] == list(range(1, len(before) + 2))
    for name in ("finish_reason", "generated_tokens", "seed"):
        assert last["details"][name] == told[name]
    if "top_n_tokens" in parameters:
        assert [event["top_tokens"] for event in [*before, last]] == told["top_tokens"]
    else:
        assert all("top_tokens" not in event for event in before)


def test_tokens_are_not_held_back_for_their_successors(byte_tokenizer: Tokenizer) -> None:
    """While the engine is stuck before its third token, two events have been made."""

    async def main() -> None:
        gates = [asyncio.Event() for _ in range(3)]
        gates[0].set()
        gates[1].set()
        waits = iter(gates)

        def answer(request: Request, n: int) -> Any:
            for event in ScriptedEngine(byte_tokenizer).say(request, [64, 65, 66]):
                if isinstance(event, Step):
                    yield next(waits).wait
                yield event

        serving = serving_of(byte_tokenizer, engine={"answer": answer})
        body = GenerateRequest(inputs="x")
        prepared = await prepare(serving, body, salt="", streaming=True)
        stream = Stream(serving, prepared, serving.service.submit(prepared.requests))
        frames = stream.frames()
        assert b'"text":"a"' in await anext(frames)
        assert b'"text":"b"' in await anext(frames)
        gates[2].set()
        assert b'"text":"c"' in await anext(frames)
        await frames.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_an_end_nobody_saw_coming_gets_an_event_of_its_own(byte_tokenizer: Tokenizer) -> None:
    """A grammar may end a text without an end token."""

    def answer(request: Request, n: int) -> Any:
        engine = ScriptedEngine(byte_tokenizer)
        yield engine.step(request, 64, "a", False, "a")
        yield engine.finished(request, 1, FinishReason.EOS_TOKEN, seed=1, stop=None)

    first, last = events(serving_of(byte_tokenizer, engine={"answer": answer}), "x")
    assert first["generated_text"] is None
    assert last["generated_text"] == "a"
    assert (last["index"], last["token"]["special"], last["token"]["text"]) == (2, True, "")
    assert last["details"]["generated_tokens"] == 1


def test_a_stream_that_fails_midway_ends_with_the_error(byte_tokenizer: Tokenizer) -> None:
    def answer(request: Request, n: int) -> Any:
        yield ScriptedEngine(byte_tokenizer).step(request, 64, "a", False, "a")
        yield Failed(kind="engine", message="the engine stopped")

    first, last = events(serving_of(byte_tokenizer, engine={"answer": answer}), "x")
    assert first["token"]["text"] == "a"
    assert last == {
        "error": "Request failed during generation: the engine stopped",
        "error_type": "generation",
    }


def test_a_stream_without_an_end_says_that_it_is_incomplete(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, engine={"answer": lambda request, n: []})
    assert events(serving, "x") == [
        {"error": "Incomplete generation stream", "error_type": "incomplete_generation_stream"}
    ]


def test_a_refusal_to_try_again_later_keeps_its_status(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, engine={"max_requests": 0})
    for path in ("/generate_stream", "/generate", "/"):
        answer = ask(serving, path, {"inputs": "x", "stream": True})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "2"
        assert answer.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    engine_of(serving).status = "draining"
    answer = ask(serving, "/generate_stream", {"inputs": "x"})
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "unavailable"
    assert "retry-after" in answer.headers


def test_an_unforeseen_error_is_told_without_its_text(byte_tokenizer: Tokenizer) -> None:
    def answer(request: Request, n: int) -> Any:
        raise RuntimeError("/home/somebody/secret prompt")

    serving = serving_of(byte_tokenizer, engine={"answer": answer})
    told = ask(serving, "/generate", {"inputs": "x"})
    assert told.status_code == 500
    assert "secret" not in told.text
    assert told.json()["error_type"] == "internal"
    assert events(serving, "x") == [told.json()]
