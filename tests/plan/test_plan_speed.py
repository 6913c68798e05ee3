"""Decode bounds against floors worked out by hand (ms a step; weights at 4 bits, groups of 128)."""

import pytest
from tiny_models import config

from longwing.errors import RequestError
from longwing.plan import BANDWIDTH, bytes_per_step, decode_bound, known_config, plan

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
        # The floors leave out norms and group indices, 18 MB of 22 GB.
        step_ms = 1e3 * batch / decode_bound(planned, BANDWIDTH[card])
        assert step_ms == pytest.approx(ms, rel=2e-3)


def test_an_embedding_that_is_not_the_head_is_not_read_whole():
    tied, untied = (plan(config(kind), context=64) for kind in ("llama, tied", "llama"))
    assert untied.weights.total > tied.weights.total
    assert bytes_per_step(untied) == bytes_per_step(tied)


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan")])
def test_a_bandwidth_must_be_above_zero(bandwidth):
    with pytest.raises(RequestError):
        decode_bound(plan(config("llama"), context=64), bandwidth)
