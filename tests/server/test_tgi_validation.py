"""TGI's validation: its texts to the letter, its order, its boundaries."""

from typing import Any

import pytest
from server_of import ask, serving_of

from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer

SAMPLED = {"do_sample": True}


@pytest.fixture(scope="module")
def tight(byte_tokenizer: Tokenizer) -> Serving:
    """TGI's own test limits: 5 tokens in, 6 in all."""
    return serving_of(byte_tokenizer, max_input_len=5, max_total_len=6, max_top_n_tokens=4)


@pytest.fixture(scope="module")
def roomy(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer)


def refusal(serving: Serving, inputs: str = "H", path: str = "/generate", **parameters: Any) -> str:
    """What a refused call says, without TGI's beginning; it is a 422 of the validation kind."""
    answer = ask(serving, path, {"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 422, answer.text
    told = answer.json()
    assert set(told) == {"error", "error_type"}
    assert told["error_type"] == "validation"
    assert told["error"].startswith("Input validation error: ")
    return told["error"].removeprefix("Input validation error: ")


def accepted(serving: Serving, inputs: str = "H", **parameters: Any) -> dict[str, Any]:
    answer = ask(serving, "/generate", {"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "seed": 1, **SAMPLED}, "`seed` must not be set when `best_of` > 1"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"frequency_penalty": -2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": -1}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 100. Given: 0"),
        ({"truncate": 101}, "`truncate` must be strictly positive and less than 100. Given: 101"),
        (
            {"max_new_tokens": 120},
            "`inputs` tokens + `max_new_tokens` must be <= 120. "
            "Given: 1 `inputs` tokens and 120 `max_new_tokens`",
        ),
        ({"grammar": {"type": "json", "value": 5}}, "grammar is not supported"),
        (
            {"grammar": {"type": "json", "value": {"type": "object"}}},
            "grammar is not valid: Grammar must have a 'properties' field",
        ),
    ],
)
def test_each_fault_is_told_in_tgis_words(
    roomy: Serving, parameters: dict[str, Any], text: str
) -> None:
    assert refusal(roomy, **parameters) == text


def test_tgis_own_cases_come_out_as_in_tgi(tight: Serving) -> None:
    total = "`inputs` tokens + `max_new_tokens` must be <= 6. Given: 1 `inputs` tokens and 10 "
    assert refusal(tight, "H", max_new_tokens=10) == total + "`max_new_tokens`"
    assert refusal(tight, best_of=2, max_new_tokens=1) == (
        "you must use sampling when `best_of` is > 1"
    )
    assert refusal(tight, top_p=1.0, max_new_tokens=5) == "`top_p` must be > 0.0 and < 1.0"
    accepted(tight, top_p=0.99, max_new_tokens=5)
    accepted(tight, max_new_tokens=1)
    assert refusal(tight, top_n_tokens=5, max_new_tokens=5) == (
        "`top_n_tokens` must be >= 0 and <= 4. Given: 5"
    )
    for top_n_tokens in (4, 0, None):
        accepted(tight, top_n_tokens=top_n_tokens, max_new_tokens=5)


def test_no_sampling_parameter_means_its_neutral_value(roomy: Serving) -> None:
    accepted(roomy)
    params = roomy.service.seen[-1].params  # type: ignore[attr-defined]
    assert (params.top_p, params.typical_p, params.top_k, params.temperature) == (1.0, 1.0, 0, 0.0)
    assert params.max_new_tokens == 20


def test_a_prompt_as_long_as_the_limit_passes_and_one_more_does_not(
    byte_tokenizer: Tokenizer,
) -> None:
    serving = serving_of(byte_tokenizer, max_input_len=5, max_total_len=50)
    accepted(serving, "x" * 5)
    assert refusal(serving, "x" * 6) == "`inputs` must have less than 5 tokens. Given: 6"
    accepted(serving, "x" * 60, truncate=5)


def test_the_sum_is_checked_before_the_prompt_and_as_a_whole(tight: Serving) -> None:
    assert refusal(tight, "x" * 7, max_new_tokens=1).startswith("`inputs` tokens + `max_new")
    assert refusal(tight, "x", max_new_tokens=2**32 - 1).startswith("`inputs` tokens + `max_new")


ORDER = [
    {"best_of": 9},
    {"temperature": 0},
    {"repetition_penalty": 0},
    {"frequency_penalty": 3},
    {"top_p": 1},
    {"typical_p": 1},
    {"top_k": 0},
    {"max_new_tokens": 0},
    {"stop": ["a"] * 5},
    {"top_n_tokens": 6},
    {"inputs": ""},
    {"truncate": 0},
]


@pytest.mark.parametrize("place", range(len(ORDER) - 1))
def test_of_several_faults_tgis_first_is_told(roomy: Serving, place: int) -> None:
    alone = refusal(roomy, **ORDER[place])
    rest: dict[str, Any] = {}
    for more in reversed(ORDER[place:]):
        rest |= more
    assert refusal(roomy, **rest) == alone


def test_best_of_needs_sampling_in_its_widest_sense(roomy: Serving) -> None:
    for parameters in (SAMPLED, {"temperature": 1.0}, {"top_k": 1}, {"top_p": 0.5}):
        accepted(roomy, best_of=2, **parameters)
    accepted(roomy, best_of=1)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2, **SAMPLED}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ],
)
@pytest.mark.parametrize("path", ["/generate_stream", "/"])
def test_in_a_stream_a_fault_is_an_event_of_a_200(
    roomy: Serving, path: str, parameters: dict[str, Any], text: str
) -> None:
    answer = ask(roomy, path, {"inputs": "H", "stream": True, "parameters": parameters})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = f'data:{{"error":"Input validation error: {text}","error_type":"validation"}}\n\n'
    assert answer.text == told


def test_what_would_be_ignored_is_refused_instead(roomy: Serving) -> None:
    assert refusal(roomy, watermark=True) == "`watermark` == true is not supported"
    assert "`adapter_id` is not supported" in refusal(roomy, adapter_id="mine")
    assert "--enable-prefill-logprobs" in refusal(roomy, decoder_input_details=True)


def test_null_is_the_same_as_absent_and_unknown_fields_are_ignored(roomy: Serving) -> None:
    nulls = dict.fromkeys(
        ["best_of", "temperature", "top_k", "truncate", "stop", "do_sample", "details", "grammar",
         "max_new_tokens", "seed", "return_full_text", "watermark", "adapter_id"]
    )  # fmt: skip
    assert accepted(roomy, use_cache=True, **nulls) == accepted(roomy)
    assert ask(roomy, "/generate", {"inputs": "H", "parameters": None}).status_code == 200


VALUES: list[Any] = [
    -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1e308, 0.5, 5.0,
    -2.0, "1", True, False, None, [], {},
]  # fmt: skip
"""Tried in every field."""
TAKEN: dict[str, list[Any]] = {
    "best_of": [1, None],
    "temperature": [1, 0.5, 5.0, None],
    "repetition_penalty": [1, 0.5, 5.0, None],
    "frequency_penalty": [-1, 0, 1, 0.5, -2.0, None],
    "top_k": [1, 2**31 - 1, None],
    "top_p": [0.5, None],
    "typical_p": [0.5, None],
    "do_sample": [True, False, None],
    "max_new_tokens": [1, None],
    "return_full_text": [True, False, None],
    "stop": [[], None],
    "truncate": [1, None],
    "watermark": [False, None],
    "details": [True, False, None],
    "decoder_input_details": [False, None],
    "seed": [0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, None],
    "top_n_tokens": [0, 1, None],
    "grammar": [None],
    "adapter_id": [None],
}
"""Of these, what each takes; everything else is a 422."""


@pytest.mark.parametrize("field", TAKEN)
def test_every_field_takes_its_values_and_no_others(roomy: Serving, field: str) -> None:
    for value in VALUES:
        taken = any(type(value) is type(one) and value == one for one in TAKEN[field])
        answer = ask(roomy, "/generate", {"inputs": "H", "parameters": {field: value}})
        assert answer.status_code == (200 if taken else 422), (value, answer.text)
        if not taken:
            assert answer.json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b'{"inputs": NaN}', 400),
        (b'{"inputs": "\\ud800"}', 400),
        (b'{"inputs": "\xff"}', 400),
        (b'{"inputs": "a", "parameters": {"temperature": 1e400}}', 400),
        (b'{"inputs": "a", "parameters": {"temperature": NaN}}', 400),
        (b"[" * 100_000, 400),
        (b'{"inputs": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}", 400),
        (b'{"inputs": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", 200),
        (b'{"inputs": "a", "x": [' + b"[]," * 60_000 + b"0]}", 400),
        (b'{"inputs": "' + b'[\\"' * 60_000 + b'"}', 422),  # in a text, they are text
        (b"[]", 422),
        (b'"text"', 422),
        (b"null", 422),
        (b'{"inputs": null}', 422),
        (b'{"inputs": ["a"]}', 422),
        (b'{"inputs": "a\\u0000b"}', 200),
        (b'{"inputs": "a", "parameters": []}', 422),
    ],
)
def test_a_body_that_is_no_request_gets_its_exact_status(
    roomy: Serving, raw: bytes, status: int
) -> None:
    answer = ask(roomy, "/generate", raw)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert set(answer.json()) == {"error", "error_type"}


def test_a_body_that_is_not_called_json_is_refused(roomy: Serving) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = ask(roomy, "/generate", b'{"inputs":"H"}', headers={"content-type": kind})
        assert answer.status_code == 415, kind
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        answer = ask(roomy, "/generate", b'{"inputs":"H"}', headers={"content-type": kind})
        assert answer.status_code == 200, kind


def test_a_hundred_thousand_wrong_stop_strings_are_one_error(roomy: Serving) -> None:
    told = refusal(roomy, stop=[1] * 100_000)
    assert told == "`parameters.stop.0`: Input should be a valid string"


def test_grammars_reach_the_engine_as_they_were_meant(roomy: Serving) -> None:
    schema = {"properties": {"a": {"type": "integer"}}}
    for grammar in (
        {"type": "json", "value": schema},
        {"type": "json", "value": '{"properties":{"a":{"type":"integer"}}}'},
        {"type": "json_schema", "value": {"name": "x", "schema": schema}},
    ):
        accepted(roomy, grammar=grammar)
        sent = roomy.service.seen[-1].grammar  # type: ignore[attr-defined]
        assert sent.kind == "json_schema"
        assert sent.source == '{"properties":{"a":{"type":"integer"}}}'
    accepted(roomy, grammar={"type": "regex", "value": "[0-9]+"})
    assert roomy.service.seen[-1].grammar.source == "[0-9]+"  # type: ignore[attr-defined]


def test_grammars_beyond_the_limits_are_refused(roomy: Serving, byte_tokenizer: Tokenizer) -> None:
    wide = {"properties": {f"field{n}": {"type": "string"} for n in range(5000)}}
    assert "at most 65536" in refusal(roomy, grammar={"type": "json", "value": wide})
    assert "at most 8192" in refusal(roomy, grammar={"type": "regex", "value": "a" * 9000})
    without = serving_of(byte_tokenizer, disable_grammar_support=True)
    told = refusal(without, grammar={"type": "regex", "value": "a"})
    assert told == "grammar is not supported"
