"""Grids: the scale and zero point of each group of weights, before anything is rounded.

Holds two ways to fit them: over the whole range, or by search for the least weighted error. Which
weights to fit them to, and when, is `gptq.py`'s business.

Shape key: G groups, I input features of one group, O output features, P proposals of a search.

The one idea: the file holds scales in float16 and zero points as small integers. Both are rounded
here, before a weight is: what the solver then rounds to is exactly what a reader of the file gets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.quant.spec import QuantSpec

MIN_SCALE = 2.0**-19
"""Smallest scale kept: float16 goes in steps of 3% there, and ever larger ones below."""

MAX_SCALE = 65504.0

_SHRINK, _NUM_SHRINKS = 0.93, 36
"""The search shrinks the range by 7% at a time, down to 8% of it: outliers stand far out. Steps of
1% would lower the weighted error by another 0.3% at 4 bits, and less at 2 and 3."""

_ELEMENTS = 2**22
"""Elements of one temporary of the search; it holds about four."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """w = scale * (q − zero) with q in [0, 2**bits), for G groups of O rows.

    Attributes:
        scale_GO: float16 values, in the dtype of the weights.
        zero_GO: whole numbers, likewise.
    """

    scale_GO: Tensor
    zero_GO: Tensor


def fit(W_GIO: Tensor, h_GI: Tensor, spec: QuantSpec, *, min_zero: int = 0) -> Grid:
    """The grid of each group and output feature.

    Args:
        W_GIO: the weights, finite.
        h_GI: what a squared error of each column costs, >= 0; only "mse" looks at it.
        spec: bits, sym and grid.
        min_zero: smallest zero point allowed with sym off.

    Cost of "mse": about 40 passes over the weights, 120 with sym off; memory is bounded.
    """
    num_rows = max(1, _ELEMENTS // max(1, W_GIO.shape[0] * W_GIO.shape[1]))
    grids = [_fit_some(W, h_GI, spec, min_zero) for W in torch.split(W_GIO, num_rows, dim=2)]
    return Grid(
        scale_GO=torch.cat([grid.scale_GO for grid in grids], 1),
        zero_GO=torch.cat([grid.zero_GO for grid in grids], 1),
    )


def _fit_some(W_GIO: Tensor, h_GI: Tensor, spec: QuantSpec, min_zero: int) -> Grid:
    """`fit`, of as many output features as go into memory together."""
    grid = _minmax(W_GIO, spec, min_zero)
    if spec.grid == "minmax":
        return grid
    h_GI1 = h_GI[:, :, None]
    grid = _best(W_GIO, h_GI1, _shrunk(W_GIO, grid, spec, min_zero), spec)
    for _ in range(2):
        grid = _best(W_GIO, h_GI1, _neighbours(W_GIO, h_GI1, grid, spec, min_zero), spec)
    return grid


def _minmax(W_GIO: Tensor, spec: QuantSpec, min_zero: int) -> Grid:
    """The narrowest grid that covers every weight and 0, ends rounded by half a step at most.

    With sym the range is [−a, a] whatever the signs: AutoGPTQ takes [0, a] for a row without
    negative weights but leaves the zero point at mid-range, which halves the range (its #293).
    """
    maxq = 2**spec.bits - 1
    low_GO, high_GO = W_GIO.amin(1).clamp(max=0), W_GIO.amax(1).clamp(min=0)
    if spec.sym:
        scale_GO = storable(2 * torch.maximum(-low_GO, high_GO) / maxq)
        return Grid(scale_GO=scale_GO, zero_GO=torch.full_like(scale_GO, (maxq + 1) // 2))
    # Where min_zero forbids zero point 0, the steps above it must do for the positive weights.
    scale_GO = torch.maximum((high_GO - low_GO) / maxq, high_GO / (maxq - min_zero))
    scale_GO = storable(scale_GO)
    zero_GO = torch.round(-low_GO / scale_GO).clamp(min_zero, maxq)
    return Grid(scale_GO=scale_GO, zero_GO=zero_GO)


def storable(scale: Tensor) -> Tensor:
    """The nearest scale that a file can hold and a kernel can use; 1 for a group of zeros."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.float16).to(scale.dtype)


def _shrunk(W_GIO: Tensor, grid: Grid, spec: QuantSpec, min_zero: int) -> Grid:
    """Proposals (P, G, O): the whole range, and ever smaller parts of it.

    With sym off a part may keep the lower end, the upper end, or cut both in proportion: one
    outlier should cost range on its own side only.
    """
    maxq = 2**spec.bits - 1
    low_GO, high_GO = W_GIO.amin(1).clamp(max=0), W_GIO.amax(1).clamp(min=0)
    shrink_P = _SHRINK ** torch.arange(_NUM_SHRINKS, device=W_GIO.device, dtype=W_GIO.dtype)
    if spec.sym:
        # One side has a step less, so an outlier there is kept by a scale wider than minmax's.
        widest_GO = torch.maximum(-low_GO, high_GO) / (maxq - maxq // 2 - 1)
        scale_PGO = storable(widest_GO * shrink_P[:, None, None])
        scale_PGO = torch.cat([grid.scale_GO[None], scale_PGO])
        return Grid(scale_GO=scale_PGO, zero_GO=grid.zero_GO.expand_as(scale_PGO))
    scale_PGO = storable((high_GO - low_GO) / maxq * shrink_P[:, None, None])
    zeros = [
        torch.round(-low_GO / scale_PGO),
        torch.round(maxq - high_GO / scale_PGO),
        grid.zero_GO.expand_as(scale_PGO),
    ]
    return Grid(
        scale_GO=torch.cat([grid.scale_GO[None], *[scale_PGO] * 3]),
        zero_GO=torch.cat([grid.zero_GO[None], *zeros]).clamp(min_zero, maxq),
    )


def _neighbours(W_GIO: Tensor, h_GI1: Tensor, grid: Grid, spec: QuantSpec, min_zero: int) -> Grid:
    """Proposals: the grid itself, and with the same zero point or one beside it, the best scale.

    Best for the whole numbers c that the weights round to now: least squares, Σ h w c / Σ h c².
    """
    maxq = 2**spec.bits - 1
    steps = (0,) if spec.sym else (0, -1, 1)
    zeros = [(grid.zero_GO + step).clamp(min_zero, maxq) for step in steps]
    scales = []
    for zero_GO in zeros:
        c_GIO = centred(W_GIO, grid.scale_GO[:, None], zero_GO[:, None], spec.bits)
        hc_GIO = h_GI1 * c_GIO
        norm_GO = (hc_GIO * c_GIO).sum(1)
        scale_GO = (hc_GIO * W_GIO).sum(1) / norm_GO
        scales.append(storable(torch.where(norm_GO > 0, scale_GO, grid.scale_GO)))
    return Grid(
        scale_GO=torch.stack([grid.scale_GO, *scales]),
        zero_GO=torch.stack([grid.zero_GO, *zeros]),
    )


def _best(W_GIO: Tensor, h_GI1: Tensor, proposals: Grid, spec: QuantSpec) -> Grid:
    """Of the proposals (P, G, O), the one with least Σ h (w − ŵ)² for each group; ties: the first.

    The errors are formed as they stand. Their expansion into sums of h w², h w c and h c² would be
    cheaper, and at 8 bits nothing but float32's rounding.
    """
    at_once = max(1, _ELEMENTS // max(1, W_GIO.numel()))
    errors = []
    for start in range(0, len(proposals.scale_GO), at_once):
        some = slice(start, start + at_once)
        scale_PGO, zero_PGO = proposals.scale_GO[some], proposals.zero_GO[some]
        scale_PG1O, zero_PG1O = scale_PGO[:, :, None], zero_PGO[:, :, None]
        error_PGIO = centred(W_GIO, scale_PG1O, zero_PG1O, spec.bits).mul_(scale_PG1O).sub_(W_GIO)
        errors.append(error_PGIO.square_().mul_(h_GI1).sum(2))
    best_1GO = torch.cat(errors).argmin(0, keepdim=True)
    return Grid(
        scale_GO=proposals.scale_GO.gather(0, best_1GO)[0],
        zero_GO=proposals.zero_GO.gather(0, best_1GO)[0],
    )


def centred(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Q − zero of the nearest grid point: whole numbers in [−zero, 2**bits − 1 − zero]."""
    return (W / scale).round_().clamp_(-zero, 2**bits - 1 - zero)
