"""`solve`: one linear layer to whole numbers, with the least error at its output.

Holds the algorithms GPTQ (Frantar et al., arXiv:2210.17323), GPTAQ (Li et al., arXiv:2504.02692)
and Qronos (Zhang et al., arXiv:2505.11695), and rounding to nearest as what they are measured by.
Where the inputs come from, and what becomes of the result, is left to others. Pure functions: the
tensors stay on the device that has them, and nothing is remembered.

The papers' symbols: W weights, H = X Xᵀ, D = (X_fp − X) Xᵀ, q a rounded column, E = W − Q. Here a
paper's column is a row, W is (I, O): what is rounded together then lies together in memory.

The one idea: GPTQ needs no inverse of H. With H = R Rᵀ, R upper triangular, the paper's Cholesky
factor of the inverse is R⁻¹, and the value that column j has when its turn comes is

    w_j + (Σ_{i<j} E_i R_ij) / R_jj

(LDLQ; QuIP, arXiv:2307.13304, proves the equivalence). One factorisation of K³/3 flop does the
work of three steps of 4/3 K³, and the least stable of them is gone, factorising a computed inverse.
It also shows what rounding costs: the objective is Σ_j R_jj² (value − q_j)², so R_jj² is the weight
with which an error of column j counts when scales are searched.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.errors import CheckpointError
from longwing.kernels.wna16 import PackedWeight, dequantize, pack
from longwing.quant.columns import Rows, descend, round_in_order
from longwing.quant.grid import MAX_SCALE, Grid, centred, fit
from longwing.quant.spec import QuantSpec
from longwing.quant.statistics import Statistics

log = logging.getLogger(__name__)

_PANEL = 2048

_GIVE_UP = 1.0
"""Damping beyond which a factorisation that still fails is no matter of rounding."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """One quantised layer.

    Attributes:
        weight: what a file will hold; scales are float16.
        error: ‖(W − Ŵ) X‖² / ‖W X‖², measured on the packed weights; None without statistics.
        added_error: (‖W X_fp − Ŵ X‖² − ‖W X_fp − W X‖²) / ‖W X‖²: what quantising this layer adds
            to the drift of its output; below 0 if it takes some away. None without D.
        damp_percent: the damping that it took, as in the spec or higher.
        notes: what was unusual about the layer, for people to read.
    """

    weight: PackedWeight
    error: float | None
    added_error: float | None
    damp_percent: float
    notes: tuple[str, ...]

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that a reader of the file gets, (O, I)."""
        return dequantize(self.weight, dtype).T


@torch.no_grad()
def solve(W_OI: Tensor, stats: Statistics | None, spec: QuantSpec, *, min_zero: int = 0) -> Solved:
    """Quantise one linear layer.

    Layers that share their input (q, k and v) may be stacked along O: rows do not see each other.

    Args:
        W_OI: the weights, on the device of the statistics.
        stats: of the layer's inputs; None only for "rtn".
        spec: the settings.
        min_zero: smallest zero point that the file format can hold, 0 for gptq_v2, 1 for gptq.

    Returns:
        The same result, bit for bit, for the same arguments on the same device.

    Cost, with N = O and K = I, in flop: K³/3 for the factor; N K² for each of 1 + refits rounds of
    rounding; 2 N K² for each sweep, and for the report; 4 N K² for "qronos"; K³ more for "gptaq".
    On a GPU the search for scales and the inner loop take about as long, without Triton 100 µs more
    for each column and pass. Memory on top of the arguments: the larger of 4 (2 K² + N K) and
    4 (K² + 6 N K) bytes; "gptaq" needs 4 K² more.

    Raises:
        ConfigError: the spec does not fit the layer's shape.
        CheckpointError: a NaN, an infinity or an absurd value among the weights; or no damping up
            to 1 makes H positive definite.
        ValueError: statistics are missing or of another width, or lack D.
    """
    O, I = W_OI.shape  # noqa: E741
    spec.check_layer(I, O)
    _check_weights(W_OI)
    _check_statistics(stats, spec, I)
    W = W_OI.to(torch.promote_types(W_OI.dtype, torch.float32)).T.contiguous()
    H = None if stats is None else stats.H.to(W.dtype)
    D = None if stats is None or stats.D is None else stats.D.to(W.dtype)
    damp_percent, notes = 0.0, []
    if H is None or spec.method == "rtn":
        weight = _round_to_nearest(W, H, spec, min_zero)
    else:
        weight, damp_percent = _feed_back(W, H, D, spec, min_zero)
        if damp_percent > spec.damp_percent:
            notes.append(f"damping raised from {spec.damp_percent:g} to {damp_percent:g}")
    num_dead = 0 if H is None else int((H.diagonal() == 0).sum())
    if num_dead:
        notes.append(f"{num_dead} of {I} input features were 0 throughout the calibration")
    error, added_error = _errors(W, weight, H, D)
    return Solved(
        weight=weight,
        error=error,
        added_error=added_error,
        damp_percent=damp_percent,
        notes=tuple(notes),
    )


def _round_to_nearest(W: Tensor, H: Tensor | None, spec: QuantSpec, min_zero: int) -> PackedWeight:
    """Each weight to its nearest grid point; H, if known, only helps to choose the grid."""
    K, N = W.shape
    G = spec.num_groups(K)
    h = W.new_ones(K) if H is None else H.diagonal().clone()
    W_GIO = W.view(G, K // G, N)
    grid = fit(W_GIO, h.view(G, -1), spec, min_zero=min_zero)
    scale_G1O, zero_G1O = grid.scale_GO[:, None], grid.zero_GO[:, None]
    q_GIO = centred(W_GIO, scale_G1O, zero_G1O, spec.bits) + zero_G1O
    return _packed(q_GIO.view(K, N), grid, None, spec)


def _feed_back(
    W: Tensor, H: Tensor, D: Tensor | None, spec: QuantSpec, min_zero: int
) -> tuple[PackedWeight, float]:
    """GPTQ, GPTAQ or Qronos. Returns the weights and the damping that it took."""
    K, N = W.shape
    G = spec.num_groups(K)
    natural = torch.arange(K, device=W.device)
    # Stable, so that equal diagonals fall into the same order everywhere.
    ranks = torch.argsort(H.diagonal(), descending=True, stable=True)
    order = ranks if spec.act_order else natural
    R, damp_percent = _factorise(H, order, spec.damp_percent)
    T, goal, M = _targets(W, D, R, order, spec)
    ahead = spec.static_groups or G == 1
    group_of = (order if ahead else natural) // (K // G)
    members = torch.argsort(group_of, stable=True)
    h = R.diagonal().square()

    def fit_to(values: Tensor) -> Grid:
        return fit(values[members].view(G, -1, N), h[members].view(G, -1), spec, min_zero=min_zero)

    grid = fit_to(T) if ahead else None
    c, values, grid = round_in_order(T, R, M, grid, group_of, spec, min_zero)
    for _ in range(spec.refits):
        grid = fit_to(values)
        del c, values  # each as large as W: the next ones need the room
        c, values, grid = round_in_order(T, R, M, grid, group_of, spec, min_zero)
    back = torch.argsort(order)
    c, goal, g_idx_K = c[back], goal[back], group_of[back]
    del T, R, M, values
    if spec.sweeps:
        descend(goal, H, c, grid, _groups(g_idx_K, G, spec), spec)
    q_KN = c.add_(grid.zero_GO[g_idx_K])
    return _packed(q_KN, grid, g_idx_K if spec.desc_act else None, spec), damp_percent


def _targets(
    W: Tensor, D: Tensor | None, R: Tensor, order: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What to round towards at first, what at last, and M: how values move later columns, times R.

    All three are in `order`; W and D are not.

    GPTQ comes close to W. Qronos minimises ‖W X_fp − Ŵ X‖², which is ‖(T − Ŵ) X‖² and a constant,
    with T = W + W D H⁻¹: it is GPTQ towards T. (Of the paper's steps only the first differs: it
    rounds the first column as if the others were to stay.) GPTAQ makes up for the drift of each
    column by the columns after it, through its matrix P = M R⁻¹; its objective is the same.
    """
    if D is None or not spec.needs_drift:
        T = W[order]
        return T, T, None
    # In this order, because what a solver returns lies in memory column by column.
    with _tensor_cores():
        drift = D.T @ W
    T = W[order].add_(_least_squares(R, drift[order]), alpha=spec.correction)
    if spec.method == "qronos":
        return T, T, None
    D = _permuted(D, order).mul_(spec.correction)
    return W[order], T, torch.linalg.solve_triangular(R.T, D, upper=False, left=False).triu_(1)


def _factorise(H: Tensor, order: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """R with R Rᵀ = H + damp * mean(diag H) * I, columns in `order`, and the damping that it took.

    A column that never saw an input is coupled to no other. Any value on its diagonal leaves it
    rounded to nearest, neither spoilt nor made 0: what calibration never excited, a text may.

    In exact arithmetic no pivot R_jj² is below the damping. One that is shows that float32 has lost
    it, as surely as a negative one does.
    """
    backwards = order.flip(0)
    A = _permuted(H, backwards)
    diagonal = A.diagonal()
    live = diagonal > 0
    mean = diagonal.sum() / live.sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal.copy_(torch.where(live, diagonal, mean))
    lowest, added = 16 * torch.finfo(A.dtype).eps, 0.0
    while True:
        diagonal += (damp_percent - added) * mean
        added = damp_percent
        L, info = torch.linalg.cholesky_ex(A)
        lost = L.diagonal().square().min() < max(lowest, damp_percent / 2) * mean
        if not (bool(info) or bool(lost)):
            del A, diagonal  # flipping needs room for one more
            return L.flip(0, 1), damp_percent
        if damp_percent >= _GIVE_UP:
            raise CheckpointError(
                f"the Hessian is not positive definite even with {damp_percent:g} of its mean "
                "diagonal added",
                remedy="verify the model's files, and calibrate on other or more text",
            )
        damp_percent = min(max(2 * damp_percent, 1e-4), _GIVE_UP)
        log.warning("Cholesky factorisation failed; damping raised to %g", damp_percent)


def _permuted(A: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in `order`."""
    # A[order[:, None], order] would first make two tensors of 8-byte indices, each as large as A.
    return A.index_select(0, order).index_select(1, order)


def _least_squares(R: Tensor, B: Tensor) -> Tensor:
    """(R Rᵀ)⁻¹ B."""
    half = torch.linalg.solve_triangular(R, B, upper=True)
    whole: Tensor = torch.linalg.solve_triangular(R.T, half, upper=False)
    return whole


def _groups(g_idx_K: Tensor, G: int, spec: QuantSpec) -> list[Rows]:
    """The columns of each group, in natural order."""
    size = len(g_idx_K) // G
    if spec.desc_act:
        return list(torch.split(torch.argsort(g_idx_K, stable=True), size))
    return [slice(start, start + size) for start in range(0, len(g_idx_K), size)]


def _packed(q_KN: Tensor, grid: Grid, g_idx_K: Tensor | None, spec: QuantSpec) -> PackedWeight:
    return PackedWeight(
        bits=spec.bits,
        group_size=spec.group_size,
        qweight_WN=pack(q_KN.to(torch.uint8), spec.bits, dim=0),
        zeros_GN=grid.zero_GO.to(torch.uint8),
        scales_GN=grid.scale_GO.to(torch.float16),
        g_idx_K=None if g_idx_K is None else g_idx_K.to(torch.int32),
    )


def _errors(
    W: Tensor, weight: PackedWeight, H: Tensor | None, D: Tensor | None
) -> tuple[float | None, float | None]:
    """`Solved.error` and `Solved.added_error`."""
    if H is None:
        return None, None
    E = W - dequantize(weight, W.dtype)
    with _tensor_cores():
        total = _energy(H, W) or 1.0  # a layer without weight or input has no error either
        error = _energy(H, E)
        if D is None:
            return error / total, None
        return error / total, (error + 2 * float(((D.T @ W) * E).sum())) / total


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Multiply with 10 bits of mantissa on CUDA, six times as fast, where that is plenty.

    That is for the drift, which came of 16-bit activations, and for figures that people read.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _energy(H: Tensor, A: Tensor) -> float:
    """tr(Aᵀ H A), with half the work since H is symmetric."""
    total = A.new_zeros(())
    for start in range(0, len(A), _PANEL):
        panel = slice(start, start + _PANEL)
        total += 2 * ((H[panel, :start] @ A[:start]) * A[panel]).sum()
        total += ((H[panel, panel] @ A[panel]) * A[panel]).sum()
    return float(total)


def _check_statistics(stats: Statistics | None, spec: QuantSpec, in_features: int) -> None:
    if stats is None:
        if spec.method != "rtn":
            raise ValueError(f"{spec.method} needs statistics of the layer's inputs")
        return
    if stats.in_features != in_features:
        raise ValueError(f"statistics of {stats.in_features} inputs for a layer of {in_features}")
    if spec.needs_drift and stats.D is None:
        raise ValueError(f"{spec.method} needs statistics made with drift=True")


def _check_weights(W_OI: Tensor) -> None:
    num_bad = W_OI.numel() - int(torch.isfinite(W_OI).sum())
    if num_bad:
        raise CheckpointError(
            f"{num_bad} of {W_OI.numel()} weights are NaN or infinite",
            remedy="verify the model's files, and download them again",
        )
    largest = float(W_OI.abs().max())
    if largest > MAX_SCALE:
        raise CheckpointError(
            f"the largest weight is {largest:g}; scales are stored in float16, which ends at "
            f"{MAX_SCALE:g}"
        )
