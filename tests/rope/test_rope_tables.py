"""The ladder, the tables, and what `longwing inspect` says about both."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_examples import ALL

from longwing.errors import ConfigError, ContextLengthError, RequestError
from longwing.rope import RopeConfig, RotaryTables, explain, frequencies, ladder, rung_for
from longwing.rope.config import LONGEST

FOLLOWS_LENGTH = ("dynamic", "falconlite", "longrope")


def dynamic(trained_len: int = 2048, head_dim: int = 8) -> RopeConfig:
    return RopeConfig(
        method="dynamic",
        head_dim=head_dim,
        theta=1e4,
        trained_len=trained_len,
        max_len=trained_len,
        factor=1.0,
    )


@pytest.mark.parametrize(
    ("context", "rungs"),
    [
        (1, (1,)),
        (2047, (2047,)),
        (2048, (2048,)),
        (2049, (2048, 2049)),
        (12001, (2048, 4096, 8192, 12001)),
        (24576, (2048, 4096, 8192, 16384, 24576)),
        (32768, (2048, 4096, 8192, 16384, 32768)),
    ],
)
def test_the_ladder_doubles_from_the_trained_length_to_the_context(context, rungs):
    assert ladder(dynamic(), context) == rungs
    assert ladder(ALL["falconlite"].config(), context) == rungs


def test_longrope_has_a_rung_only_where_its_frequencies_change():
    cfg = ALL["longrope"].config()
    assert ladder(cfg, 131072) == (4096, 131072)
    assert ladder(cfg, 4096) == (4096,)
    assert ladder(cfg, 100) == (100,)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(FOLLOWS_LENGTH)])
def test_methods_that_ignore_the_length_have_one_rung(name):
    cfg = ALL[name].config()
    assert ladder(cfg, 100_000) == (100_000,)
    assert torch.equal(frequencies(cfg, 1)[0], frequencies(cfg, 100_000)[0])


lengths = st.integers(2, 2**20)


@given(trained_len=lengths, context=lengths, name=st.sampled_from(["dynamic", "longrope"]))
def test_a_ladder_rises_to_the_context_and_no_further(trained_len, context, name):
    cfg = replace(ALL[name].config(), trained_len=trained_len)
    rungs = ladder(cfg, context)
    assert rungs[-1] == context
    assert list(rungs) == sorted(set(rungs))
    assert all(rung >= min(trained_len, context) for rung in rungs)
    assert len(rungs) <= 21


@given(
    trained_len=lengths,
    context=lengths,
    prompt_len=st.integers(0, 2**20),
    max_new=st.integers(0, 2**20),
)
def test_a_sequence_gets_the_lowest_rung_that_holds_it_or_is_told_the_limit(
    trained_len, context, prompt_len, max_new
):
    rungs = ladder(dynamic(trained_len), context)
    need = prompt_len + max_new
    if need > context:
        with pytest.raises(ContextLengthError) as refusal:
            rung_for(rungs, prompt_len, max_new)
        for number in (prompt_len, max_new, context):
            assert str(number) in str(refusal.value)
    else:
        rung = rung_for(rungs, prompt_len, max_new)
        assert need <= rung <= context
        assert all(lower < need for lower in rungs if lower < rung)


@pytest.mark.parametrize("context", [0, -1, LONGEST + 1])
def test_a_context_that_cannot_be_meant_is_refused(context):
    with pytest.raises(ConfigError, match=f"context {context} "):
        ladder(dynamic(), context)


@settings(max_examples=40, deadline=None)
@given(
    trained_len=st.integers(2, 400),
    context=st.integers(2, 6000),
    needs=st.lists(st.floats(0, 1), max_size=6),
    data=st.data(),
)
def test_a_table_that_grew_has_the_rows_of_one_made_at_once(trained_len, context, needs, data):
    cfg = dynamic(trained_len)
    grown, whole = RotaryTables(cfg, context), RotaryTables(cfg, context)
    rung = data.draw(st.sampled_from(grown.rungs))
    all_cos_LF, all_sin_LF = whole.table(rung)
    assert len(all_cos_LF) == len(all_sin_LF) == rung
    for share in needs:
        need = int(share * rung)
        cos_LF, sin_LF = grown.table(rung, need)
        assert need <= len(cos_LF) == len(sin_LF) <= rung
        assert torch.equal(cos_LF, all_cos_LF[: len(cos_LF)])
        assert torch.equal(sin_LF, all_sin_LF[: len(sin_LF)])


def test_a_short_request_on_a_long_context_pays_for_few_rows():
    tables = RotaryTables(ALL["llama3"].config(), 131072)
    assert len(tables.table(131072, 10)[0]) == 1024
    assert len(tables.table(131072, 1025)[0]) == 2048
    assert len(tables.table(131072, 5000)[0]) == 5000


def test_growing_leaves_the_old_pair_as_it_was():
    tables = RotaryTables(dynamic(), 8192)
    old_cos_LF, _ = tables.table(8192, 100)
    before = old_cos_LF.clone()
    tables.table(8192)
    assert torch.equal(old_cos_LF, before)


def test_rows_are_picked_by_position_in_any_order():
    tables = RotaryTables(dynamic(), 4096)
    positions_T = torch.tensor([4095, 0, 7, 7, 2048])
    cos_LF, sin_LF = tables.table(4096)
    cos_TF, sin_TF = tables.rows(4096, positions_T)
    assert torch.equal(cos_TF, cos_LF[positions_T])
    assert torch.equal(sin_TF, sin_LF[positions_T])
    assert cos_TF.dtype == sin_TF.dtype == torch.float32


def test_no_positions_give_no_rows():
    cos_TF, sin_TF = RotaryTables(dynamic(), 4096).rows(4096, torch.empty(0, dtype=torch.long))
    assert cos_TF.shape == sin_TF.shape == (0, 4)


def test_each_rung_rotates_by_its_own_base():
    cfg = dynamic()
    tables = RotaryTables(cfg, 8192)
    for rung in tables.rungs:
        inv_freq_F, _ = frequencies(cfg, rung)
        cos_TF, _ = tables.rows(rung, torch.tensor([1]))
        torch.testing.assert_close(cos_TF[0], inv_freq_F.cos().float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("position", [2048, 2049, 4096, 10**9])
def test_a_position_beyond_its_rung_is_refused_and_never_wrapped(position):
    tables = RotaryTables(dynamic(), 8192)
    with pytest.raises(RequestError, match=f"position {position} .*2048"):
        tables.rows(2048, torch.tensor([0, position]))


def test_a_negative_position_is_refused_and_never_wrapped():
    with pytest.raises(RequestError, match="position -1 "):
        RotaryTables(dynamic(), 8192).rows(2048, torch.tensor([-1, 3]))


def test_a_length_that_is_no_rung_is_refused():
    with pytest.raises(RequestError, match="3000 is no rung"):
        RotaryTables(dynamic(), 8192).table(3000)


def test_tables_made_while_serving_can_be_used_in_training():
    tables = RotaryTables(dynamic(), 4096)
    with torch.inference_mode():
        tables.table(4096, 10)
        tables.table(4096, 2000)
    cos_LF, _ = tables.table(4096)
    weight = torch.ones(4, requires_grad=True)
    (weight * cos_LF[:3]).sum().backward()
    assert weight.grad is not None


def test_settings_and_rung_make_a_key():
    cfg = ALL["longrope"].config()
    assert {(cfg, 4096): "pages"}[(ALL["longrope"].config(), 4096)] == "pages"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_on_a_gpu_are_those_of_the_cpu():
    here, there = RotaryTables(dynamic(), 8192), RotaryTables(dynamic(), 8192, device="cuda")
    there.table(8192, 10)
    for on_cpu, on_gpu in zip(here.table(8192), there.table(8192), strict=True):
        assert on_gpu.is_cuda
        assert torch.equal(on_cpu, on_gpu.cpu())
    cos_TF, _ = there.rows(8192, torch.tensor([1, 8191]))
    assert torch.equal(cos_TF.cpu(), here.rows(8192, torch.tensor([1, 8191]))[0])


@pytest.mark.parametrize("name", ALL)
def test_explain_names_every_setting_and_every_rung(name):
    cfg = ALL[name].config()
    rows = dict(explain(cfg, 24576))
    assert rows["method"].startswith(cfg.method)
    assert all(text for text in rows.values())
    for field in ("theta", "trained_len", "factor", "alpha", "beta_fast", "long_factor"):
        assert (field in rows) == (getattr(cfg, field) is not None)
    for rung in ladder(cfg, 24576):
        assert f"up to {rung:,}" in rows


def test_explain_gives_the_base_of_each_rung_and_warns_beyond_the_claim():
    rows = dict(explain(ALL["falconlite"].config(), 32768))
    assert rows["ladder"] == "2,048 / 4,096 / 8,192 / 16,384 / 32,768"
    assert "base 85,550.4;" in rows["up to 4,096"]
    assert "base 731,886.7;" in rows["up to 32,768"]
    assert "32,768 is beyond the 24,576" in rows["warning"]
    assert "warning" not in dict(explain(ALL["falconlite"].config(), 24576))
    assert (
        "1.13863, logits times 1.29648" in dict(explain(ALL["yarn"].config(), 9))["attention scale"]
    )
