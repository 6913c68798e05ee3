"""SamplingParams accepts what its bounds say, and tells a person what is wrong with the rest."""

import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from longwing.engine.request import MAX_SEED, MAX_TOKENS, FinishReason, SamplingParams
from longwing.errors import SamplingError

BOUNDS = {  # field: (values inside, values outside)
    "max_new_tokens": ([None, 1, MAX_TOKENS], [0, -1, MAX_TOKENS + 1]),
    "min_new_tokens": ([0, MAX_TOKENS], [-1, MAX_TOKENS + 1, None]),
    "temperature": ([0, 0.0, 5e-324, 1, 100], [-1e-9, 100.1, 1e308, None]),
    "top_k": ([0, 1, MAX_TOKENS], [-1, MAX_TOKENS + 1, 2**63, None]),
    "top_p": ([5e-324, 0.5, 1, 1.0], [0, 0.0, 1.0001, -0.1, None]),
    "min_p": ([0, 1, 0.5], [-0.01, 1.01, None]),
    "typical_p": ([5e-324, 0.2, 1.0], [0.0, 1.0001, None]),
    "repetition_penalty": ([0.01, 1, 100], [0, 0.009, 101, None]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.01, 2.01, None]),
    "presence_penalty": ([-2, 0, 2.0], [-2.01, 2.01, None]),
    "seed": ([None, 0, MAX_SEED], [-1, MAX_SEED + 1]),
    "logprobs": ([None, 0, 20], [-1, 21, 2**31]),
}
NUMBERS = sorted(BOUNDS)
WHOLE = ["logprobs", "max_new_tokens", "min_new_tokens", "seed", "top_k"]


def test_the_defaults_are_greedy_and_change_no_logit():
    params = SamplingParams()
    assert params.is_greedy
    assert not params.has_penalties
    assert params.without_effect == ()


def test_bounds_are_tested_for_every_number():
    assert [f.name for f in fields(SamplingParams) if "low" in f.metadata] == list(BOUNDS)


@pytest.mark.parametrize("name", NUMBERS)
def test_values_at_the_bounds_are_accepted(name):
    for value in BOUNDS[name][0]:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", NUMBERS)
def test_values_outside_are_refused_by_name_and_value(name):
    for value in BOUNDS[name][1]:
        with pytest.raises(SamplingError, match=rf"^{name} must be .*, is "):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", [1], 1j])
def test_what_is_not_a_finite_number_is_no_number(name, value):
    with pytest.raises(SamplingError, match=f"^{name} must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_not_a_float(name):
    with pytest.raises(SamplingError, match=f"^{name} must be a whole number, is 2.0"):
        SamplingParams(**{name: 2.0})


def test_a_refusal_tells_value_and_limit():
    with pytest.raises(SamplingError) as refusal:
        SamplingParams(top_p=1.5)
    assert str(refusal.value) == "top_p must be above 0 and at most 1, is 1.5"


def test_a_refusal_stays_short_whatever_was_sent():
    for settings in ({"temperature": "9" * 10**6}, {"stop": ["x" * 10**6]}, {"top_k": 10**4000}):
        with pytest.raises(SamplingError) as refusal:
            SamplingParams(**settings)
        assert len(str(refusal.value)) < 200


def test_fewest_tokens_above_most_tokens_are_refused():
    with pytest.raises(
        SamplingError, match="min_new_tokens is 3, above max_new_tokens, which is 2"
    ):
        SamplingParams(min_new_tokens=3, max_new_tokens=2)
    assert SamplingParams(min_new_tokens=2, max_new_tokens=2).max_new_tokens == 2


@pytest.mark.parametrize(
    "stop",
    ["text", ["a"], ("a", 1), ("",), ("a",) * 33, ("x" * 257,), None],
    ids=["a string", "a list", "a number inside", "empty", "too many", "too long", "none"],
)
def test_stop_strings_are_a_short_tuple_of_short_texts(stop):
    with pytest.raises(SamplingError, match=r"^stop "):
        SamplingParams(stop=stop)


def test_stop_strings_at_their_limits_are_accepted():
    assert len(SamplingParams(stop=("x" * 256,) * 32).stop) == 32


@pytest.mark.parametrize(
    "ids",
    [{1}, (1,), frozenset({-1}), frozenset({2**31}), frozenset({True}), frozenset({1.0}),
     frozenset(range(257)), None],
)  # fmt: skip
def test_stop_token_ids_are_a_small_frozenset_of_ids(ids):
    with pytest.raises(SamplingError, match=r"^stop_token_ids "):
        SamplingParams(stop_token_ids=ids)


@pytest.mark.parametrize("value", [1, 0, None, "false"])
def test_ignore_eos_is_a_bool(value):
    with pytest.raises(SamplingError, match=r"^ignore_eos must be True or False"):
        SamplingParams(ignore_eos=value)


def test_params_cannot_be_changed_and_replace_checks_again():
    params = SamplingParams(temperature=0.5)
    with pytest.raises(FrozenInstanceError):
        params.temperature = 2.0
    with pytest.raises(SamplingError, match="temperature"):
        replace(params, temperature=-1.0)


def test_every_field_has_help_for_the_command_line():
    for setting in fields(SamplingParams):
        assert setting.metadata["help"], setting.name


def test_settings_that_greedy_ignores_are_named():
    greedy = SamplingParams(top_k=5, top_p=0.9, seed=1, repetition_penalty=1.1, logprobs=2)
    assert greedy.without_effect == ("top_k", "top_p", "seed")
    assert replace(greedy, temperature=1.0).without_effect == ()


def test_finish_reasons_read_as_tgi_writes_them():
    assert [str(reason) for reason in FinishReason] == [
        "length",
        "eos_token",
        "stop_sequence",
        "cancelled",
    ]
