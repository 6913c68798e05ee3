"""Cache bytes, what fits, and the plan as JSON and as a table."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, config

from longwing.errors import CapacityError, ConfigError, RequestError
from longwing.kernels import KVPages
from longwing.models import ModelConfig
from longwing.plan import KNOWN, KV_FORMATS, explain, known_config, kv_bytes_per_token, plan
from longwing.plan.memory import LONGEST, require_fit

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "kv_dtype", "expected"),
    [
        ("falcon-7b", "bfloat16", 8_192),
        ("falcon-7b", "fp8", 4_096),
        ("falcon-7b", "int8", 4_352),
        ("falcon-7b", "int4", 2_304),
        ("falcon-40b", "bfloat16", 122_880),
        ("falcon-40b", "float16", 122_880),
        ("falcon-40b", "fp8", 61_440),
        ("falcon-40b", "int8", 65_280),
        ("falcon-40b", "int4", 34_560),
        ("falcon-180b", "bfloat16", 163_840),
        ("falcon-180b", "fp8", 81_920),
        ("falcon-180b", "int8", 87_040),
        ("falcon-180b", "int4", 46_080),
        ("falcon2-11b", "bfloat16", 245_760),
    ],
)
def test_falcons_have_their_known_cache_bytes_per_token(name, kv_dtype, expected):
    assert kv_bytes_per_token(known_config(name), kv_dtype) == expected


@pytest.mark.parametrize(("kv_dtype", "gb"), [("bfloat16", 3.02), ("fp8", 1.51), ("int8", 1.60)])
def test_falcon_40b_at_24k_has_its_known_cache(kv_dtype, gb):
    planned = plan(known_config("falcon-40b"), context=24_576, kv_dtype=kv_dtype)
    assert round(planned.kv_bytes / 1e9, 2) == gb


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_planned_cache_is_the_bytes_of_the_pages(kind):
    model = config(kind)
    shape = (3, 16, model.num_kv_heads, model.head_dim)
    layer = KVPages(
        keys_PBKH=torch.empty(shape, dtype=torch.bfloat16),
        values_PBKH=torch.empty(shape, dtype=torch.bfloat16),
    )
    planned = plan(model, context=3 * 16)
    assert planned.kv_bytes == layer.nbytes * model.num_layers


def test_a_batch_takes_a_cache_for_every_sequence_and_weights_once():
    one, eight = (plan(config("llama"), context=512, batch=batch) for batch in (1, 8))
    assert eight.kv_bytes == 8 * one.kv_bytes
    assert eight.weights == one.weights
    assert eight.workspace.logits == 8 * one.workspace.logits


def test_the_cache_is_kept_in_the_activations_dtype_unless_told():
    assert plan(config("llama"), context=1, dtype="float32").kv_dtype == "float32"
    assert plan(config("llama"), context=1, dtype="float32", kv_dtype="int4").kv_dtype == "int4"


def test_without_a_memory_nothing_is_said_to_fit():
    planned = plan(known_config("falcon-40b"), context=24_576, bits=4)
    assert planned.fits is planned.headroom_bytes is planned.longest_context is None
    require_fit(planned)


@pytest.mark.parametrize(
    ("bits", "group_size", "kv_dtype", "chunk", "longest"),
    [
        (4, 128, "bfloat16", 2048, 13_140),
        (4, 128, "int8", 2048, 24_690),
        (4, -1, "int8", 2048, 36_700),
        (3, 128, "bfloat16", 2048, 54_850),
        (3, 128, "int8", 2048, 103_050),
    ],
)
def test_falcon_40b_has_its_known_contexts_on_24_gib(bits, group_size, kv_dtype, chunk, longest):
    """Of a 4-bit Falcon-40B in groups of 128, 24,576 tokens fit with an 8-bit cache alone."""
    planned = plan(
        known_config("falcon-40b"),
        context=24_576,
        bits=bits,
        group_size=group_size,
        kv_dtype=kv_dtype,
        prefill_chunk=chunk,
        memory=24 * GIB,
    )
    assert planned.longest_context == pytest.approx(longest, rel=0.02)
    assert planned.fits == (planned.longest_context >= 24_576)
    assert planned.longest_context_note.startswith("beyond the 2,048") == (longest > 2048)


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [(name, "bfloat16") for name in KNOWN] + [("falcon-7b", kv_dtype) for kv_dtype in KV_FORMATS],
)
def test_the_longest_context_fits_and_one_token_more_does_not(name, kv_dtype):
    def at(context):
        return plan(
            known_config(name), context=context, kv_dtype=kv_dtype, memory=400 * GIB, batch=3
        )

    longest = at(1).longest_context
    assert 1 < longest < LONGEST
    assert at(longest).fits
    assert not at(longest + 1).fits


tiny = st.sampled_from(sorted(CONFIGS))


@settings(max_examples=40, deadline=None)
@given(kind=tiny, memory=st.integers(1, 4 * GIB), bits=st.sampled_from([None, 2, 3, 4, 8]))
def test_the_longest_context_is_maximal(kind, memory, bits):
    def at(context):
        return plan(config(kind), context=context, bits=bits, group_size=32, memory=memory)

    longest = at(1).longest_context
    assert longest == 0 or at(longest).fits
    assert not at(longest + 1).fits


@settings(max_examples=40, deadline=None)
@given(kind=tiny, memory=st.integers(1, 4 * GIB), more=st.integers(0, GIB))
def test_more_memory_never_shortens_the_longest_context(kind, memory, more):
    less = plan(config(kind), context=1, memory=memory).longest_context
    assert plan(config(kind), context=1, memory=memory + more).longest_context >= less


@settings(max_examples=40, deadline=None)
@given(kind=tiny, context=st.integers(1, 100_000), more=st.integers(1, 100_000))
def test_a_longer_context_never_needs_less(kind, context, more):
    shorter = plan(config(kind), context=context)
    assert plan(config(kind), context=context + more).peak_bytes > shorter.peak_bytes


def test_a_ladder_of_rope_tables_is_planned_for():
    raw = {**CONFIGS["llama"], "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    planned = plan(ModelConfig.from_hf(raw), context=8_000)
    assert planned.workspace.rope_tables == (2_048 + 4_096 + 8_000) * 32 * 4


def test_a_context_within_the_claim_carries_no_note():
    planned = plan(config("llama"), context=1, memory=1032 * 2**20)
    assert 0 < planned.longest_context <= planned.claimed_context
    assert planned.longest_context_note == ""


def test_a_model_that_does_not_fit_is_refused_with_what_would():
    planned = plan(
        known_config("falcon-40b"), context=65_536, bits=3, memory=24 * GIB, name="falcon-40b"
    )
    with pytest.raises(CapacityError) as error:
        require_fit(planned)
    assert "falcon-40b at 65,536 tokens needs" in str(error.value)
    assert f"a context of {planned.longest_context:,} or less fits" in str(error.value)


def test_a_model_that_fits_at_no_context_is_refused():
    planned = plan(known_config("falcon-180b"), context=1, memory=24 * GIB)
    assert planned.longest_context == 0
    assert planned.longest_context_note == "not even one token fits beside weights and workspace"
    with pytest.raises(CapacityError, match="no context fits"):
        require_fit(planned)


@pytest.mark.parametrize(
    "wrong",
    [
        {"context": 0},
        {"context": LONGEST + 1},
        {"context": 2.5},
        {"batch": 0},
        {"batch": True},
        {"prefill_chunk": 0},
        {"memory": 0},
        {"dtype": "int8"},
        {"head_dtype": "fp8"},
        {"kv_dtype": "int2"},
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError):
        plan(config("llama"), **{"context": 16, **wrong})


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="falcon-rw-1b, falcon-7b, falcon2-11b, falcon-40b"):
        known_config("falcon-13b")


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_say_nothing_that_the_reader_does_not_know(name):
    assert known_config(name.upper()).unknown == ()


@pytest.mark.parametrize("bits", [None, 4])
def test_json_is_flat_survives_a_round_trip_and_adds_up(bits):
    planned = plan(config("llama"), context=300, bits=bits, group_size=64, memory=GIB)
    facts = planned.to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(value, int | str | None) for value in facts.values())
    weights = ("qweight", "scales", "zeros", "g_idx", "linears", "embedding", "head")
    parts = sum(facts[f"{part}_bytes"] for part in (*weights, "norms_and_biases"))
    assert parts == facts["weight_bytes"]
    working = sum(
        size
        for part, size in facts.items()
        if part.startswith("workspace_") and part != "workspace_bytes"
    )
    assert working == facts["workspace_bytes"]
    assert parts + facts["kv_bytes"] + working == facts["peak_bytes"]
    assert facts["peak_bytes"] + facts["headroom_bytes"] == facts["memory_bytes"]


def test_the_table_names_every_part_and_the_verdict():
    planned = plan(known_config("falcon-40b"), context=24_576, bits=3, memory=20 * GIB, batch=2)
    rows = {label.strip(): (value, note) for label, value, note in explain(planned)}
    assert rows["context"] == ("24,576 tokens", "beyond the 2,048 that the model claims")
    assert rows["qweight"][0] == "14.24 GiB"
    assert rows["KV cache"] == ("5.62 GiB", "122,880 B a token in bfloat16, 2 sequences")
    assert rows["memory"][1].startswith("does not fit: ")
    assert "longest context" in rows
    assert "matrices" not in rows
