"""Bounds against floors worked out by hand: ms a decode step (4 bits, group 128), s a prompt."""

import pytest
from tiny_models import CONFIGS, config

from longwing.errors import RequestError
from longwing.models import ModelConfig
from longwing.plan import (
    BANDWIDTH,
    bytes_per_step,
    decode_bound,
    known_config,
    plan,
    prefill_bound,
    prefill_flops,
)

FLOORS_40B = [
    # batch, cache, card, {context: ms}
    (1, "bfloat16", "H200", {1024: 5.20, 8192: 5.41, 24_576: 5.88, 131_072: 8.92}),
    (1, "fp8", "H200", {1024: 5.19, 8192: 5.29, 24_576: 5.53, 131_072: 7.05}),
    (1, "int4", "H200", {1024: 5.18, 8192: 5.24, 24_576: 5.37, 131_072: 6.23}),
    (8, "bfloat16", "H200", {1024: 5.41, 8192: 7.05, 24_576: 10.79, 131_072: 35.1}),
    (8, "fp8", "H200", {1024: 5.29, 8192: 6.11, 24_576: 7.98, 131_072: 20.2}),
    (32, "int4", "H200", {1024: 5.44, 8192: 7.28, 24_576: 11.5, 131_072: 38.9}),
    (1, "bfloat16", "A10G", {1024: 37.3, 8192: 38.8, 24_576: 42.1, 131_072: 63.9}),
    (1, "bfloat16", "RTX 4090", {1024: 22.2, 8192: 23.1, 24_576: 25.1, 131_072: 38.0}),
]


@pytest.mark.parametrize(("batch", "kv_dtype", "card", "floors"), FLOORS_40B)
def test_falcon_40b_has_its_known_decode_floors(batch, kv_dtype, card, floors):
    for context, ms in floors.items():
        planned = plan(
            known_config("falcon-40b"), context=context, bits=4, batch=batch, kv_dtype=kv_dtype
        )
        step_ms = 1e3 * batch / decode_bound(planned, BANDWIDTH[card])
        # The floors leave out norms, and have three digits: 0.05 of 20.2 is a quarter of a percent.
        assert step_ms == pytest.approx(ms, rel=2.5e-3)


def test_an_embedding_that_is_not_the_head_is_not_read_whole():
    tied, untied = (plan(config(kind), context=64) for kind in ("llama, tied", "llama"))
    assert untied.weights.total > tied.weights.total
    assert bytes_per_step(untied) == bytes_per_step(tied)


MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
}


@pytest.mark.parametrize(("window", "tokens_per_s"), [(4096, 226), (None, 122)])
def test_mistral_7b_at_32k_is_bounded_by_what_its_window_reads(window, tokens_per_s):
    """4 bits at 1 TB/s: 3.9 GB of weights and 131,072 B for each of 4,096 or of 32,768 tokens."""
    mistral = ModelConfig.from_hf({**MISTRAL_7B, "sliding_window": window})
    planned = plan(mistral, context=32_768, bits=4)
    assert planned.kv_bytes_read_per_step == 131_072 * (window or 32_768)
    assert round(decode_bound(planned, 1e12)) == tokens_per_s


def test_windows_are_counted_layer_by_layer_and_for_every_sequence():
    raw = {**CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 16}
    mixed = ModelConfig.from_hf({**raw, "max_window_layers": 1})
    assert mixed.windows == (None, 16)
    planned = plan(mixed, context=100, batch=3)
    one_layer = planned.kv_bytes_per_token // 2
    assert planned.kv_bytes_read_per_step == 3 * one_layer * (100 + 16)
    assert planned.kv_bytes == 3 * one_layer * (100 + 100)


def test_a_window_longer_than_the_context_saves_nothing():
    planned = plan(config("mistral, windowed"), context=15)
    assert planned.kv_bytes_read_per_step == planned.kv_bytes


def test_group_indices_need_not_be_read():
    planned = plan(config("llama"), context=64, bits=4, group_size=32)
    assert planned.weights.g_idx > 0
    without = planned.weights.total - planned.weights.g_idx - planned.weights.embedding
    assert bytes_per_step(planned) == without + planned.kv_bytes


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan")])
def test_a_bandwidth_must_be_above_zero(bandwidth):
    with pytest.raises(RequestError):
        decode_bound(plan(config("llama"), context=64), bandwidth)


PREFILL_FLOORS = [
    # name, operations a second, {tokens: s}
    ("falcon-40b", 790e12, {2048: 0.213, 8192: 0.914, 24_576: 3.23, 131_072: 34.3}),
    ("falcon-40b", 125e12, {2048: 1.346, 8192: 5.775, 24_576: 20.44}),
    ("falcon-7b", 790e12, {2048: 0.0348, 8192: 0.157, 24_576: 0.615}),
]


@pytest.mark.parametrize(("name", "rate", "floors"), PREFILL_FLOORS)
def test_falcons_have_their_known_prefill_floors(name, rate, floors):
    for tokens, seconds in floors.items():
        assert prefill_bound(known_config(name), tokens, rate) == pytest.approx(seconds, rel=0.015)


def test_a_window_saves_the_pairs_beyond_it():
    """Of 4 tokens under a window of 2, seven pairs see each other, without one ten.

    In the last layer, where only the last token's pairs count, two and four.
    """
    shape = {**MISTRAL_7B, "num_hidden_layers": 2}
    whole, narrow = (
        prefill_flops(ModelConfig.from_hf({**shape, "sliding_window": window}), 4)
        for window in (None, 2)
    )
    assert whole - narrow == (3 + 2) * 4 * 4096


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_matrix_rate_must_be_above_zero(rate):
    with pytest.raises(RequestError, match="not above 0"):
        prefill_bound(config("llama"), 16, rate)
