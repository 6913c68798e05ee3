"""OpenAI's own SDK and huggingface_hub's client drive the routes over real sockets."""

import asyncio
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import openai
import pytest
from openai_app import MODEL, app_of, running, says, serving

from longwing.engine.events import Failed, Reading
from longwing.server.serving import Serving

TEXT = "Grüße, 世界 😀👩‍🚀 — done"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served() -> Serving:
    return serving(says(TEXT), enable_prefill_logprobs=True)


@pytest.fixture(scope="module")
def url(served: Serving) -> Iterator[str]:
    with running(app_of(served)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HI, **settings})


def test_the_model_is_listed_and_found_by_its_id(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed == client.models.retrieve(MODEL)
    assert (listed.id, listed.object) == (MODEL, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("name", [MODEL, "falcon-tiny", "tgi", "scripted", ""])
def test_the_model_goes_by_these_names(client: openai.OpenAI, name: str) -> None:
    assert chat(client, model=name).model == MODEL


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4") as caught:
        chat(client, model="gpt-4")
    assert caught.value.param == "model"


def test_a_chat_is_answered_whole(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=64, user="me", metadata={"a": "b"})
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("longwing-")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_chat_streams_the_same_with_role_first_and_usage_last(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client).usage
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == TEXT
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_can_come_with_every_chunk(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == chat(client).usage.completion_tokens


def test_the_sdks_own_stream_helper_gives_the_whole_message(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_an_answer_cut_short_says_length(client: openai.OpenAI) -> None:
    assert chat(client, max_tokens=2).choices[0].finish_reason == "length"
    *_, last = chat(client, max_tokens=2, stream=True)
    assert last.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ["世", ["nowhere", "世界"]])
def test_a_stop_string_ends_the_text_and_is_not_shown(client: openai.OpenAI, stop: Any) -> None:
    choice = chat(client, stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Grüße, ", "stop")
    pieces = chat(client, stop=stop, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Grüße, "
    kept = chat(client, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert "世" in kept.choices[0].message.content


def test_n_answers_have_their_own_seeds_and_places(client: openai.OpenAI, served: Serving) -> None:
    answer = chat(client, n=3, seed=40)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [one.params.seed for one in served.service.seen[-3:]] == [40, 41, 42]  # type: ignore[attr-defined]
    one = chat(client, seed=40).usage
    assert answer.usage.prompt_tokens == one.prompt_tokens
    assert answer.usage.completion_tokens == 3 * one.completion_tokens
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {TEXT}


def test_chat_logprobs_name_each_token_with_its_bytes(client: openai.OpenAI) -> None:
    entries = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == TEXT
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert entries[0].token == entries[0].top_logprobs[0].token
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries


def test_a_completion_is_answered_whole_and_streamed(client: openai.OpenAI) -> None:
    settings: Any = {"model": MODEL, "prompt": "Say", "max_tokens": 64}
    whole = client.completions.create(**settings)
    assert (whole.object, whole.choices[0].text) == ("text_completion", TEXT)
    assert whole.id.startswith("cmpl-")
    pieces = client.completions.create(**settings, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == TEXT


def test_several_prompts_are_answered_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b c"], n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["aGr", "aGr", "b c", "b c"]
    ids = client.completions.create(model=MODEL, prompt=[[100, 200], [300]], max_tokens=1)
    assert ids.usage is not None
    assert (len(ids.choices), ids.usage.prompt_tokens) == (2, 3)


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="one 😀 two", echo=True, logprobs=1, max_tokens=3
    )
    text, scores = answer.choices[0].text, answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.text_offset is not None
    assert scores.top_logprobs is not None
    assert text.startswith("one 😀 two")
    assert scores.token_logprobs[0] is None
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert text.startswith(token, offset) or token.startswith("bytes:")
    assert all(
        token in top for token, top in zip(scores.tokens[1:], scores.top_logprobs[1:], strict=True)
    )


def test_settings_that_the_sdk_lacks_come_in_extra_body(
    client: openai.OpenAI, served: Serving
) -> None:
    extra = {
        "top_k": 5, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 2,
        "ignore_eos": False, "stop_token_ids": [3], "cache_salt": "mine", "priority": 1,
    }  # fmt: skip
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, extra_body=extra, temperature=0, top_p=0.5, seed=1
    )
    asked = served.service.seen[-1]  # type: ignore[attr-defined]
    params = asked.params
    assert (params.top_k, params.min_p, params.typical_p, params.repetition_penalty) == (
        5, 0.1, 0.9, 1.1,
    )  # fmt: skip
    assert (params.min_new_tokens, params.stop_token_ids) == (2, frozenset([3]))
    assert asked.salt.endswith("mine")
    idle = set(answer.headers["x-longwing-without-effect"].split(", "))
    assert idle == {"priority", "top_k", "top_p", "min_p", "typical_p", "seed"}


def test_temperature_is_1_unless_given(client: openai.OpenAI, served: Serving) -> None:
    chat(client)
    chat(client, temperature=0)
    temperatures = [one.params.temperature for one in served.service.seen[-2:]]  # type: ignore[attr-defined]
    assert temperatures == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"stop": list("abcde")}, "stop"),
        ({"extra_body": {"chat_template": "{{ messages }}"}}, "chat_template"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, "chat_template_kwargs.x"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request_that_names_the_field(
    client: openai.OpenAI, settings: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param
    assert caught.value.type == "BadRequestError"


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_context_is_refused_and_told_the_limit(
    client: openai.OpenAI, stream: bool
) -> None:
    long: Any = [{"role": "user", "content": "word " * 600}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as e:
        chat(client, messages=long, stream=stream)
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        chat(client, max_tokens=512, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdk_raises_what_happened_to_the_engine(stream: bool) -> None:
    def fails(kind: str, begun: bool) -> Any:
        reading = [Reading(done=1, total=1, cached=0)] if begun else []
        return lambda request, n: [*reading, Failed(kind=kind, message="no luck")]

    cases: list[tuple[str, type[openai.APIError]]] = [
        ("request", openai.BadRequestError),
        ("generation", openai.InternalServerError),
        ("engine", openai.InternalServerError),
    ]
    for kind, error in cases:
        for begun in (False, True):
            with running(app_of(serving(fails(kind, begun)))) as address:
                client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
                # An error inside a stream has no status any more.
                expected = openai.APIError if begun and stream else error
                with client, pytest.raises(expected, match="no luck"):
                    list(chat(client, stream=stream))


def test_a_full_or_dead_engine_is_a_503_with_retry_after() -> None:
    served = serving()
    engine: Any = served.service
    with running(app_of(served)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with client:
            for stream in (False, True):
                engine.max_requests, engine.status = 0, "ready"
                with pytest.raises(openai.InternalServerError) as caught:
                    chat(client, stream=stream)
                assert caught.value.status_code == 503
                assert caught.value.response.headers["retry-after"] == "2"
                engine.status = "dead"
                with pytest.raises(openai.InternalServerError) as caught:
                    chat(client, stream=stream)
                assert caught.value.status_code == 503


def test_the_async_client_does_the_same(url: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=MODEL, messages=HI) for _ in range(8))
            )
            assert {answer.choices[0].message.content for answer in answers} == {TEXT}
            stream = await client.completions.create(
                model=MODEL, prompt="x", stream=True, max_tokens=64
            )
            assert "".join([piece.choices[0].text async for piece in stream]) == TEXT
            assert [model.id async for model in client.models.list()] == [MODEL]
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")

    asyncio.run(run())


def test_huggingface_hubs_client_chats(url: str) -> None:
    client = huggingface_hub.InferenceClient(base_url=url)
    whole = client.chat_completion(HI, max_tokens=64, seed=1, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].finish_reason == "stop"
    pieces = client.chat_completion(
        HI, stream=True, max_tokens=64, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for piece in pieces:
        text += "".join(choice.delta.content or "" for choice in piece.choices)
        usage = piece.usage or usage
    assert text == TEXT
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert client.chat.completions.create(HI, model=MODEL).choices[0].message.content == TEXT
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        client.chat_completion(HI, temperature=-1)
