"""Adapters by name over HTTP: who is listed, who answers, and what unknown names are told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_engine import MODEL_ID as LIVE_ID
from live_engine import serving as live_serving
from scripted import INFO
from server_of import MODEL_ID, ask, engine_of, serving_of

from adapter_folders import write_random_adapter
from longwing.client import Client, RefusedError
from longwing.engine.generator import load
from longwing.errors import ConfigError
from longwing.server.app import serving_for
from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer

HOSTILE = [
    "x" * 10_000,
    "../one",
    "one\0",
    "ONE",
    " one",
    "one\n",
    "<script>",
    "\u202eeno",
]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
]


@pytest.fixture(scope="module")
def served(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer, engine={"info": replace(INFO, adapters=("one", "two"))})


def test_adapters_are_listed_beside_their_parent_and_found_by_name(served: Serving) -> None:
    listed = ask(served, "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [MODEL_ID, "one", "two"]
    assert [model.get("parent") for model in listed] == [None, MODEL_ID, MODEL_ID]
    assert ask(served, "/v1/models/two").json() == listed[2]
    assert ask(served, "/v1/models/three").status_code == 404
    assert ask(served, "/info").json()["adapters"] == ["one", "two"]


def test_openais_model_picks_the_adapter(served: Serving) -> None:
    path, body = ROUTES[0]
    prints = set()
    for name, adapter in (("one", "one"), ("two", "two"), (MODEL_ID, ""), ("tgi", "")):
        answer = ask(served, path, {**body, "model": name})
        assert answer.status_code == 200, answer.text
        assert engine_of(served).seen[-1].adapter == adapter
        assert answer.json()["model"] == (adapter or MODEL_ID)
        prints.add(answer.json()["system_fingerprint"])
    assert len(prints) == 3
    streamed = ask(served, path, {**body, "model": "two", "stream": True})
    assert '"model":"two"' in streamed.text


def test_tgis_adapter_id_picks_the_adapter(served: Serving) -> None:
    for path in ("/generate", "/generate_stream", "/", "/invocations"):
        for name in ("one", None):
            body = {"inputs": "H", "parameters": {"adapter_id": name, "max_new_tokens": 2}}
            assert ask(served, path, body).status_code == 200
            assert engine_of(served).seen[-1].adapter == (name or "")


@pytest.mark.parametrize("name", ["three", *HOSTILE])
def test_unknown_name_is_refused_in_each_dialect_and_told_those_there_are(
    name: str, served: Serving
) -> None:
    before = len(engine_of(served).seen)
    for path, body in ROUTES:
        answer = ask(served, path, {**body, "model": name})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'one', 'two'" in error["message"]
        assert len(error["message"]) < 600
    answer = ask(served, "/generate", {"inputs": "H", "parameters": {"adapter_id": name}})
    assert answer.status_code == 422
    told = answer.json()
    assert told["error_type"] == "validation"
    assert told["error"].startswith(
        "Input validation error: `adapter_id` must be one of one, two. Given: "
    )
    assert len(told["error"]) < 300
    assert len(engine_of(served).seen) == before


def test_server_without_adapters_knows_none(byte_tokenizer: Tokenizer) -> None:
    bare = serving_of(byte_tokenizer)
    assert [model["id"] for model in ask(bare, "/v1/models").json()["data"]] == [MODEL_ID]
    assert ask(bare, "/info").json()["adapters"] == []
    answer = ask(bare, "/generate", {"inputs": "H", "parameters": {"adapter_id": "one"}})
    assert "`adapter_id` is not supported: this server has no adapters" in answer.json()["error"]


@pytest.mark.parametrize("name", ["tiny", "tgi", "dummy"])
def test_adapter_that_goes_by_a_name_of_the_model_is_refused(name: str, served: Serving) -> None:
    service = engine_of(
        serving_of(served.tokenizer, engine={"info": replace(INFO, adapters=(name,))})
    )
    with pytest.raises(ConfigError, match=f'"{name}" goes by a name of the model, "owner/tiny"'):
        serving_for(service, served.tokenizer, served.options, model_id="owner/tiny")


def test_a_real_engine_answers_each_client_with_the_adapter_it_asked_for(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_folder("llama3")
    found = {
        name: write_random_adapter(tmp_path / name, folder, seed=ord(name[0]))
        for name in ("a", "b")
    }
    prompt, want = "The quick brown fox", {"max_new_tokens": 6}
    expected = {
        name: load(folder, adapter=found.get(name)).generate(prompt, **want).text
        for name in ("", "a", "b")
    }
    assert len(set(expected.values())) == 3
    with (
        live_serving(
            folder, engine={"adapters": tuple(f"{n}={p}" for n, p in found.items())}
        ) as live,
        Client(live.url) as client,
    ):
        assert client.models() == [LIVE_ID, "a", "b"]
        for name, text in expected.items():
            own = {"adapter": name or None}
            assert client.generate(prompt, **own, **want).text == text
            streamed = "".join(token.text for token in client.stream(prompt, **own, **want))
            assert streamed == text
            completed = client.completion(prompt, **own, max_tokens=6, temperature=0)
            assert (completed.text, completed.model) == (text, name or LIVE_ID)
        with pytest.raises(RefusedError, match=r"one of a, b\. Given: c"):
            client.generate(prompt, adapter="c", max_new_tokens=2)
