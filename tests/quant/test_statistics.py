"""The sums over calibration tokens, against their definition."""

import pytest
import torch
from quant_layers import make_drift, make_inputs

from longwing.errors import CheckpointError
from longwing.quant import Statistics, statistics


@pytest.mark.parametrize("panel", [7, 16, 40, 2048])
def test_sums_equal_their_definition(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_PANEL", panel)
    x_fp = make_inputs(90, 40)
    x = make_drift(x_fp, 0.1)
    stats = Statistics(40, drift=True, dtype=torch.float64)
    for start in range(0, 90, 30):
        batch = slice(start, start + 30)
        stats.add(x[batch].view(2, 15, 40), x_fp[batch].view(2, 15, 40))
        torch.testing.assert_close(stats.H, x[: batch.stop].T @ x[: batch.stop])
    torch.testing.assert_close(stats.D, (x_fp - x).T @ x)
    assert stats.num_tokens == 90


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = make_inputs(3000, 40).to(dtype)
    stats = Statistics(40)
    for batch in x.split(100):
        stats.add(batch)
    exact = x.double().T @ x.double()
    size = exact.diagonal().sqrt()
    assert torch.all((stats.H - exact).abs() <= 2e-6 * size[:, None] * size)


def test_without_drift_its_sum_is_exactly_zero() -> None:
    x = make_inputs(50, 40).bfloat16()
    stats = Statistics(40, drift=True)
    stats.add(x, x.clone())
    assert stats.D is not None
    assert not stats.D.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_no_numbers_are_counted_and_not_added(value: float) -> None:
    x = make_inputs(50, 40)
    bad = x.clone()
    bad[3, :5] = bad[7, 0] = value
    stats = Statistics(40, drift=True)
    with pytest.raises(CheckpointError, match=r"6 of 2000 values .* in 2 of 50 tokens; calibrate"):
        stats.add(bad, x)
    with pytest.raises(CheckpointError, match=r"6 of 2000 values .* full precision are NaN"):
        stats.add(x, bad)
    assert stats.num_tokens == 0
    assert not stats.H.any()


def test_float16_overflow_is_found() -> None:
    x = (make_inputs(50, 40) * 1e5).half()
    with pytest.raises(CheckpointError, match="calibrate in bfloat16 or float32"):
        Statistics(40).add(x)


def test_what_does_not_fit_is_refused() -> None:
    x = make_inputs(50, 40)
    with pytest.raises(ValueError, match="40 input features were given, not 64"):
        Statistics(64).add(x)
    with pytest.raises(ValueError, match="needed with drift, and only then"):
        Statistics(40).add(x, x)
    with pytest.raises(ValueError, match="needed with drift, and only then"):
        Statistics(40, drift=True).add(x)
    with pytest.raises(ValueError, match=r"is \(49, 40\), not \(50, 40\)"):
        Statistics(40, drift=True).add(x, x[1:])
