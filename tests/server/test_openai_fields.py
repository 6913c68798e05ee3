"""Every field at its borders, and bodies that mean harm: the right status, and never a 5xx."""

import json
import random
from typing import Any

import pytest
from openai_app import app_of, posts, says, serving

from longwing.engine.request import MAX_SEED, MAX_TOKENS
from longwing.server.openai_refusals import REFUSED
from longwing.server.openai_schema import ChatBody, CompletionBody

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"prompt": "Hi"}
PATHS = {"chat": ("/v1/chat/completions", CHAT), "text": ("/v1/completions", TEXT)}

RIGHT_TYPE: dict[str, tuple[type, ...]] = {"whole": (int,), "number": (int, float)}
BORDERS: dict[str, tuple[str, float, float, bool]] = {
    # name: kind, lowest, highest, whether the lowest is itself refused
    "n": ("whole", 1, 128, False),
    "seed": ("whole", -(2**63), MAX_SEED, False),
    "temperature": ("number", 0, 100, False),
    "top_p": ("number", 0, 1, True),
    "top_k": ("whole", -1, MAX_TOKENS, False),
    "min_p": ("number", 0, 1, False),
    "typical_p": ("number", 0, 1, True),
    "repetition_penalty": ("number", 0.01, 100, False),
    "presence_penalty": ("number", -2, 2, False),
    "frequency_penalty": ("number", -2, 2, False),
}
LENGTHS = {"chat": ("max_tokens", "max_completion_tokens"), "text": ("max_tokens",)}


def values(low: float, high: float) -> list[Any]:
    """min-1, min, max, max+1 and what is never a number in range; NaN only fits in raw JSON."""
    edges = [low - 1, low, high, high + 1]
    return [*edges, 0, -1, 2**31, 2**63, 1e308, None, "1", True, [], {}]


def expected(name: str, value: Any) -> int:
    kind, low, high, is_above = BORDERS[name]
    if value is None:
        return 200
    if isinstance(value, bool) or not isinstance(value, RIGHT_TYPE[kind]):
        return 400
    return 400 if not low <= value <= high or (is_above and value == low) else 200


@pytest.mark.parametrize("route", PATHS)
def test_every_number_is_taken_within_its_bounds_and_nowhere_else(route: str) -> None:
    path, body = PATHS[route]
    served = serving(says("ok"))
    cases = [
        (name, value) for name, (_, low, high, _) in BORDERS.items() for value in values(low, high)
    ]
    bodies = [{**body, name: value} for name, value in cases]
    for (name, value), response in zip(cases, posts(served, path, bodies), strict=True):
        assert response.status_code == expected(name, value), (name, value, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["param"] == name, response.text


@pytest.mark.parametrize("route", PATHS)
def test_lengths_are_taken_as_far_as_the_context_goes(route: str) -> None:
    path, body = PATHS[route]
    served = serving(says("ok"), context=64)
    prompt_len = 1 if route == "text" else 8
    for name in (*LENGTHS[route], "min_tokens", "truncate_prompt_tokens"):
        for value in values(1, MAX_TOKENS):
            (response,) = posts(served, path, [{**body, name: value}])
            is_whole = type(value) is int
            room = {"min_tokens": 16 if route == "text" else 64 - prompt_len}.get(name, 64)
            fits = is_whole and 1 <= value <= (room if name == "min_tokens" else 64 - prompt_len)
            if name == "truncate_prompt_tokens":
                fits = is_whole and value != 0 and -1 <= value <= MAX_TOKENS
            fits = fits or value is None or (name == "min_tokens" and is_whole and value == 0)
            assert response.status_code == (200 if fits else 400), (name, value, response.text)


@pytest.mark.parametrize("route", PATHS)
def test_nan_and_infinity_are_no_json(route: str) -> None:
    path, body = PATHS[route]
    for word in ("NaN", "Infinity", "-Infinity", "1e999", "01", "+1", "1" * 400):
        raw = json.dumps({**body, "temperature": 7.25}).replace("7.25", word).encode()
        (response,) = posts(serving(), path, [raw])
        assert response.status_code == 400, (word, response.text)


@pytest.mark.parametrize(
    ("route", "name", "value", "status"),
    [
        ("text", "logprobs", 20, 200),
        ("text", "logprobs", 21, 400),
        ("text", "logprobs", True, 400),
        ("text", "best_of", 1, 200),
        ("text", "best_of", 2, 400),
        ("text", "echo", "yes", 400),
        ("text", "prompt", ["a"] * 4, 200),
        ("text", "prompt", ["a"] * 5, 400),
        ("text", "prompt", [], 400),
        ("text", "prompt", [[]], 400),
        ("text", "prompt", "", 400),
        ("text", "prompt", [1, "a"], 400),
        ("text", "prompt", [True], 400),
        ("text", "prompt", [-1], 400),
        ("text", "prompt", [65027], 200),
        ("text", "prompt", [65028], 400),
        ("text", "prompt", None, 400),
        ("text", "prompt", "a\0b", 200),
        ("text", "suffix", "", 200),
        ("text", "suffix", "x", 400),
        ("text", "max_tokens", 0, 400),
        ("text", "prompt_logprobs", 1, 400),
        ("text", "add_special_tokens", False, 200),
        ("chat", "logprobs", True, 200),
        ("chat", "logprobs", 1, 400),
        ("chat", "top_logprobs", 1, 400),
        ("chat", "stop", ["a"] * 4, 200),
        ("chat", "stop", ["a"] * 5, 400),
        ("chat", "stop", "", 400),
        ("chat", "stop", "a" * 257, 400),
        ("chat", "stop_token_ids", [0, MAX_TOKENS], 200),
        ("chat", "stop_token_ids", [MAX_TOKENS + 1], 400),
        ("chat", "stop_token_ids", [1] * 257, 400),
        ("chat", "logit_bias", {}, 200),
        ("chat", "logit_bias", {"1": 1}, 400),
        ("chat", "stream_options", {"include_usage": True, "include_obfuscation": False}, 200),
        ("chat", "stream_options", {"include_usage": 1}, 400),
        ("chat", "messages", [{"role": "user", "content": ""}], 200),
        ("chat", "messages", [{"role": "root", "content": "x"}], 400),
        ("chat", "messages", [{"role": "user", "content": [{"type": "image_url"}]}], 400),
        ("chat", "messages", [{"role": "user", "content": [{"type": "text"}]}], 400),
        ("chat", "messages", [{"role": "user", "content": []}], 200),
        ("chat", "messages", [{"role": "assistant", "function_call": {"name": "f"}}], 400),
        ("chat", "skip_special_tokens", True, 200),
        ("chat", "skip_special_tokens", False, 400),
        ("chat", "modalities", ["text"], 200),
        ("chat", "modalities", ["audio"], 400),
        ("chat", "store", False, 200),
        ("chat", "store", True, 400),
        ("chat", "some_future_field", {"a": 1}, 200),
        ("chat", "priority", 3, 200),
        ("chat", "cache_salt", "", 400),
        ("chat", "max_completion_tokens", 2, 200),
    ],
)
def test_a_field_is_taken_or_refused(route: str, name: str, value: Any, status: int) -> None:
    path, body = PATHS[route]
    (response,) = posts(serving(says("ok")), path, [{**body, name: value}])
    assert response.status_code == status, response.text
    if status == 400:
        assert response.json()["error"]["param"].split(".")[0] == name


def test_two_names_of_one_setting_must_agree() -> None:
    both = {**CHAT, "max_tokens": 2, "max_completion_tokens": 3}
    assert posts(serving(), PATHS["chat"][0], [both])[0].status_code == 400


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_longwing_cannot_do_is_refused_with_a_remedy_and_null_passes(name: str) -> None:
    kind, route = (
        (ChatBody, "chat") if name not in ChatBody.model_fields else (CompletionBody, "text")
    )
    assert name not in kind.model_fields
    path, body = PATHS[route]
    asked, absent = posts(serving(says("ok")), path, [{**body, name: "x"}, {**body, name: None}])
    assert asked.status_code == 400, asked.text
    assert asked.json()["error"] == {
        "message": f"{name} is not supported: {REFUSED[name]}",
        "type": "BadRequestError", "param": name, "code": 400,
    }  # fmt: skip
    assert absent.status_code == 200, absent.text


def test_every_integer_of_the_api_has_both_bounds() -> None:
    def numbers(schema: Any, place: str) -> Any:
        if isinstance(schema, dict):
            if schema.get("type") in ("integer", "number"):
                yield place, schema
            for name, member in schema.items():
                yield from numbers(member, f"{place}/{name}")
        elif isinstance(schema, list):
            for member in schema:
                yield from numbers(member, place)

    schemas = app_of(serving()).openapi()["components"]["schemas"]
    bodies = {name: schema for name, schema in schemas.items() if "Error" not in name}
    found = list(numbers(bodies, ""))
    assert len(found) > 20
    for place, schema in found:
        assert {"minimum", "exclusiveMinimum"} & set(schema), place
        assert "maximum" in schema, place


def hostile(rng: random.Random) -> bytes:
    """A body made of pieces that have broken parsers before."""
    leaves: list[Any] = [
        None, True, False, 0, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, -0.0, 1e-320, "", "\0",
        "\ud800", "1", "a" * 5000, "<|im_end|>", "𓀀𓀁", "\u202e", "{{ 7*7 }}", "../../etc/passwd",
        [], {}, [[]], {"$ref": "#"}, {"type": "object"}, "((((a+)+)+)+)$", "start: start",
    ]  # fmt: skip

    def value(depth: int) -> Any:
        kind = rng.random()
        if depth > 4 or kind < 0.6:
            return rng.choice(leaves)
        if kind < 0.8:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(names): value(depth + 1) for _ in range(rng.randrange(4))}

    names = [*ChatBody.model_fields, *CompletionBody.model_fields, *REFUSED]
    names += ["role", "content", "type", "text", "function", "name", "arguments", "parameters"]
    names += ["schema", "json", "regex", "choice", "grammar", "$defs", "$ref", "id", "\ud800", ""]
    body = dict(rng.choice([CHAT, TEXT, {}]))
    for _ in range(rng.randrange(1, 5)):
        body[rng.choice(names)] = value(0)
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.1:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif kind < 0.2:
        place = rng.randrange(len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    return raw


@pytest.mark.parametrize("route", PATHS)
def test_a_thousand_hostile_bodies_never_make_a_server_error(route: str) -> None:
    rng = random.Random(7)
    bodies = [hostile(rng) for _ in range(1000)]
    bodies += [b"[" * 100_000, b'{"a":' * 100_000, b"", b"null", b"\xff", b'"x"', b"[]", b"1"]
    taken = 0
    for raw, response in zip(
        bodies, posts(serving(says("ok")), PATHS[route][0], bodies), strict=True
    ):
        assert response.status_code in (200, 400, 404), (raw[:300], response.text[:300])
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        taken += response.status_code == 200
    assert taken > 10
