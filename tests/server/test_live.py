"""A real engine behind the real server: each dialect gives the plain path's text."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from live_engine import MODEL_ID, LiveEngine, serving

from longwing import AsyncClient, Client
from longwing.engine.generator import Generator, load

PROMPTS = ("Hello", "The quick brown fox. " * 6, "naïve café 💥")


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Falcon that can chat."""
    copy = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_folder("falcon-40b"), copy)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (copy / "chat_template.jinja").write_text(template)
    return copy


@pytest.fixture(scope="module")
def plain(folder: Path) -> Generator:
    return load(folder)


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[LiveEngine]:
    with serving(folder, enable_prefill_logprobs=True) as server:
        yield server


@pytest.fixture(scope="module")
def sdk(live: LiveEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(plain: Generator, prompt: str, num: int = 24, **settings: Any) -> Any:
    ids = plain.tokenizer.encode(prompt, special_tokens=True)
    return plain.generate(ids, max_new_tokens=num, **settings)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_way_to_ask_gives_the_plain_paths_answer(
    prompt: str, live: LiveEngine, sdk: openai.OpenAI, plain: Generator
) -> None:
    answer = expected(plain, prompt)
    parameters = {"max_new_tokens": 24, "details": True}
    tgi = httpx.post(
        f"{live.url}/generate", json={"inputs": prompt, "parameters": parameters}
    ).json()
    assert tgi["generated_text"] == answer.text
    assert [token["id"] for token in tgi["details"]["tokens"]] == answer.token_ids

    client = InferenceClient(base_url=live.url)
    whole = client.text_generation(prompt, max_new_tokens=24, details=True)
    assert whole.generated_text == answer.text
    events = list(client.text_generation(prompt, max_new_tokens=24, details=True, stream=True))
    assert events[-1].generated_text == answer.text
    assert [event.token.id for event in events] == answer.token_ids
    pieces = "".join(event.token.text for event in events if not event.token.special)
    assert pieces == answer.text

    settings: dict[str, Any] = {"model": MODEL_ID, "max_tokens": 24, "temperature": 0}
    completion = sdk.completions.create(prompt=prompt, **settings)
    assert completion.choices[0].text == answer.text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(answer.token_ids)
    chunks = list(sdk.completions.create(prompt=prompt, stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.text

    with Client(live.url) as ours:
        assert ours.generate(prompt, max_new_tokens=24).text == answer.text


def test_seed_gives_the_same_text_in_every_dialect(
    live: LiveEngine, sdk: openai.OpenAI, plain: Generator
) -> None:
    answer = expected(plain, "Hello", temperature=1.0, seed=7)
    parameters = {"max_new_tokens": 24, "do_sample": True, "seed": 7}
    body = {"inputs": "Hello", "parameters": parameters}
    assert httpx.post(f"{live.url}/generate", json=body).json()["generated_text"] == answer.text
    completion = sdk.completions.create(model=MODEL_ID, prompt="Hello", max_tokens=24, seed=7)
    assert completion.choices[0].text == answer.text


def test_prompt_that_was_seen_before_is_told_as_cached(sdk: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL_ID, "prompt": "A long story. " * 8, "max_tokens": 2}
    first = sdk.completions.create(**settings).usage
    second = sdk.completions.create(**settings).usage
    assert first is not None
    assert second is not None
    assert second.prompt_tokens_details is not None
    assert second.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // 8 * 8


def test_answer_follows_its_schema(sdk: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "even": {"type": "boolean"}},
        "required": ["colour", "even"],
        "additionalProperties": False,
    }
    for seed in range(3):
        completion = sdk.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            max_tokens=100,
            seed=seed,
        )
        found = json.loads(completion.choices[0].message.content or "")
        assert found["colour"] in ("red", "green")
        assert isinstance(found["even"], bool)
        assert completion.choices[0].finish_reason == "stop"


def test_prompt_log_probabilities_are_those_of_the_model(
    live: LiveEngine, plain: Generator
) -> None:
    ids = plain.tokenizer.encode("Hello you", special_tokens=True)
    logprobs_TV = plain.logits(ids).double().log_softmax(-1)
    parameters = {"max_new_tokens": 1, "decoder_input_details": True}
    body = {"inputs": "Hello you", "parameters": parameters}
    prefill = httpx.post(f"{live.url}/generate", json=body).json()["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    for place, token in enumerate(prefill[1:]):
        assert token["logprob"] == pytest.approx(
            float(logprobs_TV[place, ids[place + 1]]), abs=1e-4
        )


def test_samples_of_one_prompt_differ_and_can_be_had_again(sdk: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL_ID, "prompt": "Hello", "max_tokens": 12, "seed": 3}
    first = [choice.text for choice in sdk.completions.create(n=3, **settings).choices]
    assert len(set(first)) == 3
    assert first == [choice.text for choice in sdk.completions.create(n=3, **settings).choices]


def test_best_of_two_is_one_of_them(live: LiveEngine) -> None:
    parameters = {"max_new_tokens": 8, "do_sample": True, "best_of": 2, "details": True}
    body = {"inputs": "Hello", "parameters": parameters}
    answer = httpx.post(f"{live.url}/generate", json=body).json()
    (other,) = answer["details"]["best_of_sequences"]

    def mean(tokens: list[dict[str, Any]]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    assert mean(answer["details"]["tokens"]) >= mean(other["tokens"])


OFFICIAL = """
import asyncio, json, sys
from text_generation import AsyncClient, Client
url, prompt = sys.argv[1:]
client = Client(url, timeout=60)
whole = client.generate(prompt, max_new_tokens=24)
stream = list(client.generate_stream(prompt, max_new_tokens=24))
falconlite = list(client.generate_stream(
    prompt, do_sample=True, max_new_tokens=24, typical_p=0.2, temperature=None, truncate=None,
    seed=1,
))

async def later():
    return (await AsyncClient(url, timeout=60).generate(prompt, max_new_tokens=24)).generated_text

print(json.dumps({
    "whole": whole.generated_text,
    "ids": [token.id for token in whole.details.tokens],
    "stream": stream[-1].generated_text,
    "pieces": "".join(part.token.text for part in stream if not part.token.special),
    "sampled": falconlite[-1].generated_text,
    "later": asyncio.run(later()),
}))
"""


@pytest.mark.slow
def test_official_tgi_client_gets_the_plain_paths_answer(
    live: LiveEngine, plain: Generator, official_python: Path
) -> None:
    answer = expected(plain, "Hello")
    command = [str(official_python), "-c", OFFICIAL, live.url, "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ids"] == answer.token_ids
    assert {told["whole"], told["stream"], told["pieces"], told["later"]} == {answer.text}
    assert told["sampled"] == expected(plain, "Hello", temperature=1.0, typical_p=0.2, seed=1).text


def test_metrics_count_what_was_done(live: LiveEngine) -> None:
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 3}}
    before = _metrics(live)
    httpx.post(f"{live.url}/generate", json=body).raise_for_status()
    after = _metrics(live)
    assert after["tgi_request_success"] == before.get("tgi_request_success", 0) + 1
    tokens = "longwing_generated_tokens_total"
    assert after[tokens] == before[tokens] + 3


def test_our_async_client_streams(live: LiveEngine, plain: Generator) -> None:
    async def main() -> str:
        async with AsyncClient(live.url) as client:
            return "".join(
                [token.text async for token in client.stream("Hello", max_new_tokens=24)]
            )

    assert asyncio.run(main()) == expected(plain, "Hello").text


def _metrics(live: LiveEngine) -> dict[str, float]:
    lines = httpx.get(f"{live.url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#" and "{" not in line)
    return {name: float(value) for name, value in pairs}
