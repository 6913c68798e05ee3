"""Layers that break quantisers: dead inputs, singular sums, odd rows, odd sizes, bad numbers."""

import logging

import pytest
import torch
from quant_layers import make_drift, make_inputs, make_weights, output_error, statistics

from longwing.checkpoint import packed
from longwing.errors import CheckpointError, ConfigError
from longwing.kernels import BITS, unpack
from longwing.quant import METHODS, QuantSpec, Statistics, solve
from longwing.quant.grid import MIN_SCALE


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
def test_the_reported_error_is_that_of_what_a_file_holds(
    bits: int, sym: bool, static_groups: bool
) -> None:
    W, x = make_weights(32, 128), make_inputs(400, 128)
    spec = QuantSpec(method="gptq", bits=bits, group_size=32, sym=sym, static_groups=static_groups)
    solved = solve(W, statistics(x), spec)
    weight = solved.weight
    assert weight.scales_GN.dtype == torch.float16
    assert (weight.g_idx_K is not None) == spec.desc_act == (not static_groups)
    q_KN = unpack(weight.qweight_WN, bits, 0).double()
    group_K = weight.group_of_row_K()
    assert torch.equal(torch.bincount(group_K), torch.full((4,), 32))
    W_hat = (weight.scales_GN.double()[group_K] * (q_KN - weight.zeros_GN.double()[group_K])).T
    assert torch.equal(solved.dequantised(torch.float64), W_hat)
    assert solved.error == pytest.approx(output_error(W, W_hat, x), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_are_rounded_to_nearest_and_told_of(method: str) -> None:
    W, x_fp = make_weights(16, 96), make_inputs(300, 96)
    x = make_drift(x_fp, 0.1)
    dead = torch.tensor([0, 31, 32, 95])
    x[:, dead] = 0
    solved = solve(W, statistics(x, x_fp), QuantSpec(group_size=32, method=method))
    scale = solved.weight.scales_GN.double()[dead // 32].T
    nearest = scale * torch.round(W[:, dead] / scale).clamp(-8, 7)
    torch.testing.assert_close(solved.dequantised(torch.float64)[:, dead], nearest)
    assert solved.notes == ("4 of 96 input features were 0 throughout the calibration",)
    assert solved.damp_percent == (0 if method == "rtn" else 0.05)


def test_a_layer_without_any_input_is_rounded_to_nearest() -> None:
    W = make_weights(16, 64)
    stats = statistics(torch.zeros(10, 64, dtype=torch.float64))
    spec = QuantSpec(method="gptq", group_size=32, grid="minmax", refits=0)
    solved = solve(W, stats, spec)
    rounded = solve(W, None, QuantSpec(group_size=32, grid="minmax", method="rtn"))
    assert torch.equal(solved.dequantised(), rounded.dequantised())
    assert solved.error == 0
    assert rounded.error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_rises_by_itself_until_a_singular_hessian_can_be_factored(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    W, x = make_weights(16, 128).to(dtype), make_inputs(20, 128).to(dtype)  # rank 20 of 128
    with caplog.at_level(logging.WARNING, logger="longwing.quant"):
        solved = solve(W, statistics(x), QuantSpec(method="gptq", group_size=32, damp_percent=0))
    assert 0 < solved.damp_percent <= 0.01
    assert solved.notes == (f"damping raised from 0 to {solved.damp_percent:g}",)
    assert caplog.messages[-1].endswith(f"damping raised to {solved.damp_percent:g}")
    rounded = solve(W, statistics(x), QuantSpec(group_size=32, method="rtn"))
    assert (solved.error or 0) < 0.1 * (rounded.error or 0)


def test_sums_that_no_inputs_can_have_are_refused() -> None:
    stats = statistics(torch.eye(32, dtype=torch.float64))
    stats.H[0, 1] = stats.H[1, 0] = 5
    with pytest.raises(CheckpointError, match="not positive definite even with 1 of its mean"):
        solve(make_weights(8, 32), stats, QuantSpec(method="gptq", group_size=-1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("grid", ["minmax", "mse"])
def test_rows_of_one_kind_keep_their_kind(bits: int, sym: bool, grid: str) -> None:
    W, x = make_weights(32, 64).abs(), make_inputs(300, 64)
    W[0] = 0
    W[1] = 0.25
    W[2] = -0.25
    W[3, :32] = 0
    W[4] = -W[4]
    spec = QuantSpec(bits=bits, group_size=32, sym=sym, grid=grid, method="rtn")
    weight = solve(W, statistics(x), spec).weight
    W_hat = solve(W, statistics(x), spec).dequantised(torch.float64)
    step = weight.scales_GN.double()
    assert torch.all(W_hat[0] == 0)
    assert torch.all(W_hat[3, :32] == 0)
    assert torch.all(step >= MIN_SCALE)
    if grid == "minmax":
        # Half a step everywhere, and what float16 takes from a scale. An all-positive
        # symmetric row does not lose half its range (AutoGPTQ's #293).
        half = 0.501 + 2.0 ** (bits - 12)
        assert torch.all((W_hat - W).abs() <= step.T.repeat_interleave(32, 1) * half)
        range_GN = W.abs().view(32, 2, 32).amax(2).T * (2 if sym else 1)
        assert torch.all(step[range_GN > 0] <= 1.001 * range_GN[range_GN > 0] / (2**bits - 1))
    if grid == "mse" or not sym:
        tolerance = 0.25 * 2**-11
        assert torch.all((W_hat[1] - 0.25).abs() <= tolerance)
        assert torch.all((W_hat[2] + 0.25).abs() <= tolerance)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_format_v1_gets_no_zero_point_of_zero(bits: int, method: str) -> None:
    W = make_weights(32, 64)
    W[:16] = W[:16].abs()
    spec = QuantSpec(bits=bits, group_size=32, sym=False, method=method)
    stats = statistics(make_inputs(300, 64))
    free, v1 = solve(W, stats, spec), solve(W, stats, spec, min_zero=1)
    assert int(free.weight.zeros_GN.min()) == 0
    assert int(v1.weight.zeros_GN.min()) >= 1
    assert packed.packed_tensors(v1.weight, "gptq")["qzeros"].shape == (2, bits)
    assert (v1.error or 0) < (4 if bits == 2 else 1.5) * (free.error or 0)


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e4])
def test_scales_stay_within_float16(scale: float) -> None:
    W, x = make_weights(16, 64) * scale, make_inputs(300, 64)
    for bits in (2, 8):
        solved = solve(
            W.float(), statistics(x.float()), QuantSpec(method="gptq", bits=bits, group_size=32)
        )
        scales = solved.weight.scales_GN.float()
        assert torch.isfinite(scales).all()
        assert float(scales.min()) >= MIN_SCALE
        assert (solved.error or 0) <= 1


@pytest.mark.parametrize(
    ("in_features", "group_size"), [(71 * 32, 32), (96, 48), (200, 200), (160, 8), (544, 272)]
)
@pytest.mark.parametrize("static_groups", [True, False])
def test_odd_sizes_are_no_trouble(in_features: int, group_size: int, static_groups: bool) -> None:
    W, x = make_weights(8, in_features).float(), make_inputs(150, in_features).float()
    spec = QuantSpec(method="gptq", group_size=group_size, static_groups=static_groups, sweeps=1)
    rounded = QuantSpec(group_size=group_size, method="rtn")
    stats = statistics(x)
    solved = solve(W, stats, spec)
    assert solved.weight.in_features == in_features
    assert (solved.error or 0) < 0.5 * (solve(W, stats, rounded).error or 0)


def test_groups_that_do_not_divide_are_refused_with_those_that_do() -> None:
    stats = Statistics(96)
    with pytest.raises(ConfigError, match="128 does not divide 96 input features; take 32 or -1"):
        solve(torch.zeros(8, 96), stats, QuantSpec(method="gptq", group_size=128))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_counted(value: float) -> None:
    W = make_weights(8, 32)
    W[1, 2] = W[3, 4] = value
    with pytest.raises(CheckpointError, match="2 of 256 weights are NaN or infinite"):
        solve(W, None, QuantSpec(method="rtn", group_size=32))


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the largest weight is 1e\+06"):
        solve(torch.full((8, 32), 1e6), None, QuantSpec(method="rtn", group_size=32))


def test_statistics_must_fit_the_method_and_the_layer() -> None:
    W = make_weights(8, 32)
    with pytest.raises(ValueError, match="gptq needs statistics"):
        solve(W, None, QuantSpec(method="gptq", group_size=32))
    with pytest.raises(ValueError, match="statistics of 64 inputs for a layer of 32"):
        solve(W, Statistics(64), QuantSpec(method="gptq", group_size=32))
    with pytest.raises(ValueError, match="qronos needs statistics made with drift=True"):
        solve(W, Statistics(32), QuantSpec(group_size=32, method="qronos"))
