"""Answers: a stream says what the whole answer says, and every end is told truthfully."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_app import app_of, post, posts, says, serving, tokenizer
from scripted import ScriptedEngine

from longwing.engine.events import Failed, PromptToken, Step
from longwing.engine.request import FinishReason
from longwing.server.openai_logprobs import ScoreQueue, prompt_scores, token_text
from longwing.server.serving import Serving

HI = [{"role": "user", "content": "Hi"}]
ENDS = [
    FinishReason.LENGTH,
    FinishReason.EOS_TOKEN,
    FinishReason.STOP_SEQUENCE,
]


def events(response: httpx.Response) -> list[Any]:
    """What a stream's `data:` lines hold."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [frame for frame in response.text.split("\n\n") if frame.startswith("data:")]
    texts = [frame.removeprefix("data:").strip() for frame in frames]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def joined(chunks: list[Any], field: str = "text") -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            piece = choice["delta"].get("content") if field == "delta" else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + (piece or "")
    return texts


texts = st.text(
    st.one_of(st.sampled_from("aé世😀👩‍🚀 \n<|"), st.characters(exclude_categories=["Cs"])),
    max_size=24,
)


@settings(max_examples=40, deadline=None)
@given(
    text=texts,
    stop=st.lists(st.text("aé世 \n", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 40),
    n=st.integers(1, 2),
    logprobs=st.booleans(),
)
def test_a_stream_put_together_is_the_whole_answer(
    text: str, stop: list[str], max_tokens: int, n: int, logprobs: bool
) -> None:
    served = serving(says(text), enable_prefill_logprobs=True)
    app = app_of(served)
    common: dict[str, Any] = {"stop": stop, "max_tokens": max_tokens, "n": n}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    body = {**common, "prompt": "Go on ü", "echo": True}
    body |= {"logprobs": 2} if logprobs else {}
    whole, stream = posts(served, "/v1/completions", [body, {**body, **streamed}], app=app)
    *chunks, usage, done = events(stream)
    assert done == "[DONE]"
    assert usage["usage"] == whole.json()["usage"]
    for choice in whole.json()["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs:
            for name, values in choice["logprobs"].items():
                assert [v for piece in mine for v in piece["logprobs"][name]] == values
            offsets = choice["logprobs"]["text_offset"]
            assert offsets == sorted(offsets)
            assert all(offset <= len(choice["text"]) for offset in offsets)

    body = {**common, "messages": HI, "logprobs": logprobs}
    whole, stream = posts(served, "/v1/chat/completions", [body, {**body, **streamed}], app=app)
    *chunks, usage, done = events(stream)
    assert usage["usage"] == whole.json()["usage"]
    contents = {c["index"]: c["message"]["content"] for c in whole.json()["choices"]}
    assert joined(chunks, "delta") == contents
    for choice in whole.json()["choices"]:
        entries = [
            entry
            for chunk in chunks
            for piece in chunk["choices"]
            if piece["index"] == choice["index"] and piece["logprobs"]
            for entry in piece["logprobs"]["content"]
        ]
        assert entries == (choice["logprobs"]["content"] if logprobs else [])


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["", "a", "bc", "<s>"]), min_size=1, max_size=8),
    cut=st.integers(0, 12),
    reason=st.sampled_from(ENDS),
    data=st.data(),
)
def test_entries_stand_for_the_text_that_was_shown(
    pieces: list[str], cut: int, reason: FinishReason, data: st.DataObject
) -> None:
    if reason is FinishReason.EOS_TOKEN:
        pieces[-1] = "<s>"
    written = ["" if piece == "<s>" else piece for piece in pieces]
    text = "".join(written)
    shown = text[:cut] if reason is FinishReason.STOP_SEQUENCE else text
    queue, entries, out = ScoreQueue(3), [], 0
    for place, piece in enumerate(pieces):
        certain = len("".join(written[: place + 1]))
        until = len(shown) if place == len(pieces) - 1 else data.draw(
            st.integers(min(out, len(shown)), min(certain, len(shown)))
        )  # fmt: skip
        step = Step(
            id=place, piece=piece, special=piece == "<s>", text=shown[out:until], logprob=-1.0
        )
        out = until
        entries += queue.push(step)
    entries += queue.finish(reason)
    assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
    ids = {entry.id for entry in entries}
    starts = [len("".join(written[:place])) for place in range(len(pieces))]
    assert all(entry.offset == starts[entry.id] + 3 for entry in entries)
    for place, piece in enumerate(pieces):
        if written[place] and starts[place] < len(shown):
            assert place in ids, f"{piece!r} is shown and has no entry"
        if written[place] and starts[place] >= len(shown):
            assert place not in ids, f"{piece!r} is not shown and has one"
    if reason is FinishReason.EOS_TOKEN:
        assert len(pieces) - 1 not in ids
    if reason is FinishReason.LENGTH:
        assert len(entries) == len(pieces)


def test_a_token_has_one_name_wherever_it_stands() -> None:
    words = tokenizer()
    half = next(i for i in range(1000) if words.token_bytes(i) == b"\xc3")
    assert token_text(words, half) == r"bytes:\xc3"
    assert token_text(words, words.encode("Hello")[0]) == "Hello"
    assert token_text(words, 10**6) == "\ufffd"  # a padded vocabulary has ids without text


def test_impossible_tokens_have_a_finite_logprob() -> None:
    def answer(request: Any, n: int) -> list[Any]:
        engine = ScriptedEngine(tokenizer())
        step = Step(id=70, piece="x", special=False, text="x", logprob=float("-inf"), top=())
        return [step, engine.finished(request, 1, FinishReason.LENGTH, seed=1, stop=None)]

    body = {"prompt": "x", "logprobs": 0}
    scores = post(serving(answer), "/v1/completions", body).json()["choices"][0]["logprobs"]
    assert scores["token_logprobs"] == [-9999.0]


def test_the_prompts_bos_takes_no_room_in_the_echo() -> None:
    words = tokenizer()
    ids = words.encode("Hello you")
    tokens = [PromptToken(id=token_id, logprob=-1.0) for token_id in ids]
    assert [s.offset for s in prompt_scores(words, tokens, "Hello you")] == [0, 5]


def test_logprobs_of_the_prompt_are_given_only_if_the_operator_says_so() -> None:
    body = {"prompt": "a b", "echo": True, "logprobs": 1}
    refused = post(serving(), "/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert "--enable-prefill-logprobs" in refused.json()["error"]["message"]
    assert post(serving(), "/v1/completions", {**body, "logprobs": None}).status_code == 200


def test_max_tokens_0_gives_the_echo_and_its_scores_alone() -> None:
    served = serving(says("never shown"), enable_prefill_logprobs=True)
    body = {"prompt": "a b c", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = post(served, "/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "a b c"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert joined(events(post(served, "/v1/completions", {**body, "stream": True})))[0] == "a b c"


def test_an_absent_length_is_16_for_completions_and_the_rest_of_the_context_for_chats() -> None:
    served = serving()
    engine: Any = served.service
    posts(served, "/v1/completions", [{"prompt": "x"}, {"prompt": [9] * 505}])
    post(served, "/v1/chat/completions", {"messages": HI})
    lengths = [one.params.max_new_tokens for one in engine.seen]
    assert lengths == [16, 7, 512 - len(engine.seen[-1].prompt_ids)]


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "status"),
    [(511, 1, 200), (511, 2, 400), (512, None, 400), (510, 2, 200), (1, 511, 200), (1, 512, 400)],
)
def test_the_context_holds_exactly_what_it_holds(
    prompt_len: int, max_tokens: int | None, status: int
) -> None:
    body = {"prompt": [9] * prompt_len, "max_tokens": max_tokens}
    response = post(serving(), "/v1/completions", body)
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 512 tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (509, 509), (-1, 509)])
def test_a_prompt_is_cut_only_on_request_and_the_answer_says_so(keep: int, kept: int) -> None:
    served = serving(context=512)
    ids = list(range(100, 700))
    body = {"prompt": ids, "truncate_prompt_tokens": keep, "max_tokens": 3, "echo": True}
    response = post(served, "/v1/completions", body)
    engine: Any = served.service
    assert engine.seen[-1].prompt_ids == tuple(ids[-kept:])
    assert response.headers["x-longwing-truncated-tokens"] == str(600 - kept)
    assert response.json()["usage"]["prompt_tokens"] == kept
    assert "x-longwing-truncated-tokens" not in post(serving(), "/v1/completions", {
        "prompt": [1], "truncate_prompt_tokens": 3}).headers  # fmt: skip


def test_special_tokens_are_read_in_prompts_and_are_text_in_messages() -> None:
    served = serving()
    engine: Any = served.service
    words = tokenizer()
    end = words.id_of("<|im_end|>")
    post(served, "/v1/completions", {"prompt": "a<|im_end|>"})
    assert engine.seen[-1].prompt_ids[-1] == end
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    post(served, "/v1/chat/completions", {"messages": messages})
    assert engine.seen[-1].prompt_ids.count(end) == 1
    assert "a<|im_end|>b" in words.decode(engine.seen[-1].prompt_ids, skip_special=False)


def test_messages_may_have_parts_names_and_a_developer() -> None:
    served = serving()
    engine: Any = served.service
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": t} for t in "xy"]},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}
        | {"content": "ok", "function_call": None, "audio": None},
    ]
    response = post(served, "/v1/chat/completions", {"messages": messages})
    assert response.status_code == 200
    prompt = tokenizer().decode(engine.seen[-1].prompt_ids, skip_special=False)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt
    assert "<|im_start|>user\nx\ny<|im_end|>" in prompt


def test_an_answer_can_go_on_with_the_last_message() -> None:
    served = serving()
    engine: Any = served.service
    messages = [*HI, {"role": "assistant", "content": "The answer is "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert post(served, "/v1/chat/completions", body).status_code == 200
    prompt = tokenizer().decode(engine.seen[-1].prompt_ids, skip_special=False)
    assert prompt.endswith("<|im_start|>assistant\nThe answer is ")
    body["messages"] = HI
    refused = post(served, "/v1/chat/completions", body)
    assert refused.json()["error"]["param"] == "continue_final_message"


def test_a_model_without_a_chat_template_says_so() -> None:
    response = post(serving(template=""), "/v1/chat/completions", {"messages": HI})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_prompts_are_cached_for_their_own_key_and_salt() -> None:
    from longwing.server.app import make_app

    served = serving(api_keys=("one", "two"))
    engine: Any = served.service
    app = make_app(served)

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for key in ("one", "two", "one"):
                for salt in (None, "s"):
                    await client.post(
                        "/v1/completions",
                        json={"prompt": "x", "cache_salt": salt},
                        headers={"Authorization": f"Bearer {key}"},
                    )
            nobody = await client.post("/v1/completions", json={"prompt": "x"})
            assert nobody.status_code == 401
            assert nobody.json()["error"]["type"] == "AuthenticationError"

    asyncio.run(run())
    salts = [request.salt for request in engine.seen]
    assert len(set(salts)) == 4
    assert salts[:2] == salts[4:]


def test_an_error_inside_a_stream_is_its_last_event() -> None:
    def answer(request: Any, n: int) -> list[Any]:
        said = ScriptedEngine(tokenizer()).say(request, tokenizer().encode("Hello you all"))
        return [*said[:3], Failed(kind="generation", message="out of luck")]

    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": HI})):
        *chunks, last = events(post(serving(answer), f"/v1/{path}", {**body, "stream": True}))
        assert last["error"]["message"] == "out of luck"
        assert last["error"]["type"] == "InternalServerError"
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def test_what_the_server_did_not_expect_is_told_without_its_text() -> None:
    def answer(request: Any, n: int) -> Any:
        yield from ScriptedEngine(tokenizer()).say(request, [100, 200])[:2]
        raise ValueError("/secret/path")

    *_, last = events(post(serving(answer), "/v1/completions", {"prompt": "x", "stream": True}))
    assert last["error"]["code"] == 500
    assert "secret" not in json.dumps(last)


def test_an_answer_that_was_broken_off_is_an_error_not_an_end() -> None:
    def answer(request: Any, n: int) -> list[Any]:
        engine = ScriptedEngine(tokenizer())
        return [engine.finished(request, 1, FinishReason.CANCELLED, seed=1, stop=None)]

    assert post(serving(answer), "/v1/completions", {"prompt": "x"}).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_who_leaves_frees_the_engine(stream: bool, path: str) -> None:
    """Before the first token, and in the middle; without waiting for either."""

    async def run(num_steps: int) -> None:
        gates = [asyncio.Event() for _ in range(3)]

        def answer(request: Any, n: int) -> list[Any]:
            said = ScriptedEngine(tokenizer()).say(request, tokenizer().encode("Hello you all"))
            reading, *steps = said
            waits = [gate.wait for gate in gates]
            return [reading, *(item for pair in zip(waits, steps, strict=False) for item in pair)]

        served = serving(answer)
        engine: Any = served.service
        left, sent = asyncio.Event(), []
        body = json.dumps({"stream": stream, "prompt": "x"} if path == "completions" else {
            "stream": stream, "messages": HI}).encode()  # fmt: skip
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": f"/v1/{path}", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("localhost", 80), "client": ("localhost", 1),
            "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.4"},
        }  # fmt: skip
        call = asyncio.create_task(app_of(served)(scope, receive, send))
        for gate in gates[:num_steps]:
            gate.set()
        while not engine.at_work:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert engine.at_work
        left.set()
        await call
        assert not engine.at_work
        assert engine.num_cancelled == 1
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    for num_steps in (0, 2):
        asyncio.run(run(num_steps))


def test_metrics_count_each_call_once() -> None:
    def fails(request: Any, n: int) -> list[Any]:
        return [Failed(kind="generation", message="no")]

    def shown(served: Serving) -> str:
        service = served.service
        return served.metrics.exposition(service.info, service.stats, "ready").decode()

    good, bad = serving(), serving(fails)
    posts(
        good,
        "/v1/completions",
        [{"prompt": ["a", "b"], "n": 2, "stream": s} for s in (0 > 1, 1 > 0)],
    )
    assert "tgi_request_success 2.0" in shown(good)
    posts(bad, "/v1/chat/completions", [{"messages": HI}, {"messages": HI, "model": "other"}])
    assert 'tgi_request_failure{err="generation"} 1.0' in shown(bad)
    assert 'tgi_request_failure{err="validation"} 1.0' in shown(bad)


def test_sagemakers_route_takes_both_bodies() -> None:
    from longwing.server.app import make_app

    served = serving(says("Yes."))
    app = make_app(served)
    bodies = [{"messages": HI}, {"prompt": "x"}, {"prompt": "x", "max_tokens": -1}]
    chat, completion, refused = posts(served, "/invocations", bodies, app=app)
    assert chat.json()["choices"][0]["message"]["content"] == "Yes."
    assert completion.json()["choices"][0]["text"] == "Yes."
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"


def test_an_echo_with_its_scores_is_the_streams_first_piece() -> None:
    served = serving(says("Yes."), enable_prefill_logprobs=True)
    body = {"prompt": "a b", "echo": True, "logprobs": 0, "stream": True}
    chunks = events(post(served, "/v1/completions", body))
    assert [c["choices"][0]["text"] for c in chunks[:-1]][:1] == ["a b"]
    assert joined(chunks)[0] == "a bYes."
