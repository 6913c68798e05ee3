"""The solver against naive versions of the papers, written with loops and float64."""

from itertools import product

import pytest
import torch
from quant_layers import make_drift, make_inputs, make_weights, output_error, statistics
from torch import Tensor

from longwing.quant import QuantSpec, solve
from longwing.quant.grid import fit

PLAIN = QuantSpec(method="gptq", grid="minmax", refits=0, sweeps=0, block_size=48)
"""GPTQ as published; the block size divides nothing."""


def naive_grid(W: Tensor, h: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point, (O, 1), of one group W (O, I); the search is tested elsewhere."""
    if spec.grid == "mse":
        grid = fit(W.T.contiguous()[None], h[None], spec)
        return grid.scale_GO.T, grid.zero_GO.T
    maxq = 2**spec.bits - 1
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    if spec.sym:
        scale = (2 * torch.maximum(-low, high) / maxq).half().double()
        return scale, torch.full_like(scale, 2 ** (spec.bits - 1))
    scale = ((high - low) / maxq).half().double()
    return scale, torch.round(-low / scale).clamp(0, maxq)


def naive_gptq(W: Tensor, H: Tensor, spec: QuantSpec, D: Tensor | None = None) -> Tensor:
    """GPTQ, and with D GPTAQ: one column at a time, all others updated at once. W is (O, I)."""
    I = len(H)  # noqa: E741
    size = I if spec.group_size == -1 else spec.group_size
    order = torch.argsort(H.diagonal(), descending=True) if spec.act_order else torch.arange(I)
    W, H = W[:, order].clone(), H[order][:, order].clone()
    H += spec.damp_percent * H.diagonal().mean() * torch.eye(I)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    h = 1 / U.diagonal() ** 2
    P = torch.zeros_like(H) if D is None else (D[order][:, order] @ U.T).triu(1) @ U
    ahead = []
    if spec.static_groups:
        for start in range(0, I, size):
            columns = torch.tensor(
                [int((order == k).nonzero()) for k in range(start, start + size)]
            )
            ahead.append(naive_grid(W[:, columns], h[columns], spec))
    W_hat = torch.empty_like(W)
    for i in range(I):
        if spec.static_groups:
            scale, zero = ahead[int(order[i]) // size]
        elif i % size == 0:
            scale, zero = naive_grid(W[:, i : i + size], h[i : i + size], spec)
        w = W[:, i : i + 1].clone()
        q = (torch.round(w / scale) + zero).clamp(0, 2**spec.bits - 1)
        W_hat[:, order[i]] = (scale * (q - zero))[:, 0]
        error = (w - scale * (q - zero)) / U[i, i]
        W[:, i:] += w @ P[i : i + 1, i:] - error @ U[i : i + 1, i:]
    return W_hat


@pytest.mark.parametrize(
    ("bits", "group_size", "sym"), [*product((2, 3, 4, 8), (-1, 32, 64), (True, False))]
)
def test_solver_equals_the_naive_one(bits: int, group_size: int, sym: bool) -> None:
    W, x = make_weights(32, 128, seed=bits), make_inputs(400, 128)
    stats = statistics(x)
    for act_order, static_groups, grid in product((False, True), (False, True), ("minmax", "mse")):
        spec = QuantSpec(
            method="gptq",
            bits=bits,
            group_size=group_size,
            sym=sym,
            act_order=act_order,
            static_groups=static_groups,
            grid=grid,
            refits=0,
            sweeps=0,
            block_size=48,
        )
        W_hat = solve(W, stats, spec).dequantised(torch.float64)
        torch.testing.assert_close(W_hat, naive_gptq(W, stats.H, spec), rtol=0, atol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_gptaq_equals_the_naive_one(act_order: bool, static_groups: bool) -> None:
    W, x_fp = make_weights(8, 128), make_inputs(400, 128)
    stats = statistics(make_drift(x_fp, 0.1), x_fp)
    spec = QuantSpec(
        method="gptaq",
        correction=1,
        group_size=32,
        act_order=act_order,
        static_groups=static_groups,
        refits=0,
        sweeps=0,
        block_size=48,
    )
    W_hat = solve(W, stats, spec).dequantised(torch.float64)
    torch.testing.assert_close(W_hat, naive_gptq(W, stats.H, spec, stats.D), rtol=0, atol=1e-5)


def test_qronos_gives_every_column_its_least_squares_value() -> None:
    W, x_fp = make_weights(8, 32), make_inputs(200, 32)
    x = make_drift(x_fp, 0.2)
    spec = QuantSpec(
        method="qronos",
        correction=1,
        group_size=-1,
        act_order=False,
        damp_percent=0,
        refits=0,
        sweeps=0,
    )
    solved = solve(W, statistics(x, x_fp), spec)
    W_hat = solved.dequantised(torch.float64)
    scale = solved.weight.scales_GN[0].double()
    for i in range(32):
        rest = x_fp @ W.T - x[:, :i] @ W_hat[:, :i].T
        value = torch.linalg.lstsq(x[:, i:], rest).solution[0]
        q = torch.round(value / scale).clamp(-8, 7)
        torch.testing.assert_close(W_hat[:, i], scale * q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_without_drift_the_result_is_plain_gptqs_to_the_bit(method: str) -> None:
    W, x = make_weights(32, 192).float(), make_inputs(500, 192).float()
    spec = QuantSpec(method="gptq", bits=3, group_size=64)
    plain = solve(W, statistics(x), spec)
    other = solve(W, statistics(x, x), QuantSpec(bits=3, group_size=64, method=method))
    assert torch.equal(plain.weight.qweight_WN, other.weight.qweight_WN)
    assert torch.equal(plain.weight.scales_GN, other.weight.scales_GN)
    assert other.added_error == other.error


@pytest.mark.parametrize("sweeps", [0, 2])
def test_knowing_the_drift_lowers_its_objective(sweeps: int) -> None:
    mean = dict.fromkeys(("gptq", "gptaq", "qronos"), 0.0)
    for seed in range(4):
        W, x_fp = make_weights(16, 128, seed), make_inputs(600, 128, seed)
        x = make_drift(x_fp, 0.1, seed)
        for method in mean:
            spec = QuantSpec(method=method, group_size=32, sweeps=sweeps)
            solved = solve(W, statistics(x, x_fp), spec)
            W_hat = solved.dequantised(torch.float64)
            error = output_error(W, W_hat, x, x_fp)
            mean[method] += error / 4
            added = error - output_error(W, W, x, x_fp)
            assert solved.added_error == pytest.approx(added, rel=1e-6)
    assert mean["qronos"] < mean["gptaq"] < 0.9 * mean["gptq"]


def test_correction_0_is_plain_gptq() -> None:
    W, x_fp = make_weights(8, 64), make_inputs(300, 64)
    x = make_drift(x_fp, 0.1)
    spec = QuantSpec(method="gptq", group_size=32)
    off = QuantSpec(group_size=32, method="qronos", correction=0)
    plain, other = solve(W, statistics(x), spec), solve(W, statistics(x, x_fp), off)
    assert torch.equal(plain.weight.qweight_WN, other.weight.qweight_WN)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_beyond_rounding_pays(bits: int, seed: int) -> None:
    W, x = make_weights(32, 256, seed), make_inputs(1000, 256, seed)
    stats = statistics(x)
    plain = {"bits": bits, "grid": "minmax", "static_groups": False, "refits": 0, "sweeps": 0}
    specs = [
        QuantSpec(**plain, method="rtn"),
        QuantSpec(**plain, method="gptq"),
        QuantSpec(method="gptq", bits=bits, refits=0, sweeps=0),
        QuantSpec(method="gptq", bits=bits, refits=1, sweeps=2),
    ]
    errors = [solve(W, stats, spec).error or 0 for spec in specs]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", ["gptq", "qronos"])
@pytest.mark.parametrize("static_groups", [False, True])
def test_sweeps_never_raise_the_objective(method: str, static_groups: bool) -> None:
    W, x_fp = make_weights(16, 96), make_inputs(300, 96)
    x = make_drift(x_fp, 0.1)
    stats = statistics(x, x_fp)
    objectives = []
    for sweeps in (0, 1, 2, 8):
        spec = QuantSpec(
            bits=2, group_size=32, method=method, static_groups=static_groups, sweeps=sweeps
        )
        W_hat = solve(W, stats, spec).dequantised(torch.float64)
        objectives.append(output_error(W, W_hat, x, x_fp if method == "qronos" else None))
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0]


def test_after_many_sweeps_no_single_weight_can_do_better() -> None:
    W, x = make_weights(8, 32), make_inputs(200, 32)
    solved = solve(W, statistics(x), QuantSpec(method="gptq", group_size=-1, sweeps=60))
    W_hat, scale = solved.dequantised(torch.float64), solved.weight.scales_GN[0].double()
    for o, i, step in product(range(8), range(32), (-1, 1)):
        moved = W_hat.clone()
        moved[o, i] += step * scale[o]
        if -8 <= torch.round(moved[o, i] / scale[o]) <= 7:
            assert output_error(W, moved, x) >= output_error(W, W_hat, x) - 1e-12


def test_neither_block_size_nor_company_changes_a_row() -> None:
    W, x = make_weights(24, 192), make_inputs(500, 192)
    stats = statistics(x)
    whole = solve(W, stats, QuantSpec(method="gptq", group_size=32)).dequantised()
    for block_size in (1, 20, 64, 1000):
        spec = QuantSpec(method="gptq", group_size=32, block_size=block_size)
        assert torch.equal(solve(W[8:], stats, spec).dequantised(), whole[8:])


def test_float32_is_as_good_as_float64() -> None:
    W, x = make_weights(32, 384), make_inputs(1500, 384)
    exact = solve(W, statistics(x), QuantSpec(method="gptq", group_size=64)).error
    single = solve(W.float(), statistics(x.float()), QuantSpec(method="gptq", group_size=64)).error
    assert single == pytest.approx(exact, rel=0.01)


def test_same_arguments_give_the_same_bits() -> None:
    W, stats = make_weights(16, 192).float(), statistics(make_inputs(500, 192).float())
    one, two = (
        solve(W, stats, QuantSpec(method="gptq", group_size=64, sym=False)).weight for _ in range(2)
    )
    for name in ("qweight_WN", "zeros_GN", "scales_GN"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_arguments_are_left_as_they_were() -> None:
    W, x_fp = make_weights(8, 64), make_inputs(200, 64)
    stats = statistics(make_drift(x_fp, 0.1), x_fp)
    before = [W.clone(), stats.H.clone(), stats.D.clone()]
    for method in ("rtn", "gptq", "gptaq", "qronos"):
        solve(W, stats, QuantSpec(group_size=32, method=method))
    for tensor, copy in zip((W, stats.H, stats.D), before, strict=True):
        assert torch.equal(tensor, copy)
