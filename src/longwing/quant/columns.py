"""The two loops over columns: round each in order, and round each again, given all others.

Holds what takes most of the time on a GPU. What H is, in which order to go and what comes of it is
`gptq.py`'s business; symbols are explained there. A paper's column is a row here, W is (K, N).

The one idea: both loops have the same inside. The value of column j is a base, made by one matrix
product for a whole block, plus what the columns of the same block have changed since. So there is
one inner loop (`_round_part`), and a faster one would serve both.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from longwing.quant.grid import Grid, fit, storable
from longwing.quant.spec import QuantSpec

_HAS_TRITON = find_spec("triton") is not None

_FUSED_COLUMNS = 128
"""The kernel keeps a part in registers, which hold no more columns than these."""

Rows = slice | Tensor
"""The columns of one group: a run of them, or their numbers."""


def round_in_order(
    T: Tensor,
    R: Tensor,
    M: Tensor | None,
    grid: Grid | None,
    group_of: Tensor,
    spec: QuantSpec,
    min_zero: int,
) -> tuple[Tensor, Tensor, Grid]:
    """Round the columns one after another, each with what the ones before it did wrong.

    Args:
        T: (K, N) the weights to come close to.
        R: (K, K) the factor of H.
        M: (K, K) how the value of a column (row) moves those after it, times R; for GPTAQ.
        grid: of all groups, or None to fit each when its first column is reached; then groups must
            be runs of K.
        group_of: (K,) the group of each column.
        spec: the settings.
        min_zero: as in `solve`.

    Returns:
        c = q − zero (K, N), the values that were rounded (K, N), and the grid of all groups.
    """
    K, N = T.shape
    G, d = spec.num_groups(K), R.diagonal()[:, None]
    fitted = grid is not None
    grid = grid or Grid(scale_GO=T.new_ones(G, N), zero_GO=T.new_zeros(G, N))
    c, V, E = torch.empty_like(T), torch.empty_like(T), torch.empty_like(T)
    fed = torch.zeros_like(T)  # Σ E_i R_ij + V_i M_ij over columns i that are done with
    for block, parts in _blocks(K, spec, fitted):
        for part in parts:
            _feed(fed, slice(block.start, part.start), part, E, R, V, M)
            if not fitted and part.start % (K // G) == 0:
                _fit_group(grid, slice(part.start, part.start + K // G), T, R, fed, spec, min_zero)
            _round_part(
                T[part] + fed[part] / d[part],
                T[part],
                grid,
                group_of[part],
                spec.bits,
                R[part, part] / d[part].T,
                None if M is None else M[part, part] / d[part].T,
                (c[part], V[part], E[part]),
            )
        _feed(fed, block, slice(block.stop, K), E, R, V, M)
    return c, V, grid


def _feed(
    fed: Tensor, done: slice, to: slice, E: Tensor, R: Tensor, V: Tensor, M: Tensor | None
) -> None:
    """Tell the columns `to` what the columns `done` did."""
    fed[to].addmm_(R[done, to].T, E[done])
    if M is not None:
        fed[to].addmm_(M[done, to].T, V[done])


def _blocks(K: int, spec: QuantSpec, fitted: bool) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of columns, each with its parts. A group that is yet to be fitted starts a part.

    All remaining columns are brought up to date after a block, and a part before it begins: so a
    group is fitted to weights that have seen every error before it, however small it is. (AutoGPTQ
    fits groups smaller than its block to weights of before the block.)
    """
    size = K if fitted else K // spec.num_groups(K)
    if size >= spec.block_size:
        for first in range(0, K, size):
            for start in range(first, first + size, spec.block_size):
                block = slice(start, min(start + spec.block_size, first + size))
                yield block, [block]
    else:
        stride = spec.block_size // size * size
        for start in range(0, K, stride):
            stop = min(start + stride, K)
            yield slice(start, stop), [slice(i, i + size) for i in range(start, stop, size)]


def _fit_group(
    grid: Grid, group: slice, T: Tensor, R: Tensor, fed: Tensor, spec: QuantSpec, min_zero: int
) -> None:
    """Fit the group that begins here, to its weights as GPTQ has updated them by now.

    Those are T + fed R⁻¹, and as R is triangular, the group's own part of it is enough.
    """
    now = torch.linalg.solve_triangular(R[group, group].T, fed[group], upper=False).add_(T[group])
    one = fit(now[None], R.diagonal()[None, group].square(), spec, min_zero=min_zero)
    g = group.start // (group.stop - group.start)
    grid.scale_GO[g], grid.zero_GO[g] = one.scale_GO[0], one.zero_GO[0]


def descend(
    T: Tensor, H: Tensor, c: Tensor, grid: Grid, groups: list[Rows], spec: QuantSpec
) -> None:
    """Lower ‖(T − Ŵ) X‖² by coordinate descent on scales and whole numbers, in place.

    A sweep takes group after group, sets its scales to their best values given everything else, and
    rounds each of its columns again, given all others; no step raises the objective. H comes
    without damping: it is the true objective, and on held-out inputs, too, it did better than a
    damped one, even with less than three tokens per column.

    Args:
        T: (K, N) the weights to come close to.
        H: (K, K) undamped, in the order of the columns of T.
        c: (K, N), changed: the whole numbers q − zero.
        grid: its scales are changed.
        groups: the columns of each group.
        spec: `sweeps` of them.

    Cost: 2 N K² flop a sweep, and the inner loop.
    """
    E = torch.empty_like(T)
    for g, rows in enumerate(groups):
        E[rows] = T[rows] - grid.scale_GO[g] * c[rows]
    for _ in range(spec.sweeps):
        for g, rows in enumerate(groups):
            slope, H_gg, c_g, E_g = H[rows] @ E, H[rows][:, rows], c[rows], E[rows]
            change = _rescale(grid.scale_GO[g], slope, H_gg, c_g) * c_g
            E_g -= change
            slope -= H_gg @ change
            _round_again(slope, T[rows], H_gg, c_g, E_g, grid, g, spec)
            c[rows], E[rows] = c_g, E_g


def _rescale(scale: Tensor, slope: Tensor, H_gg: Tensor, c: Tensor) -> Tensor:
    """Set the scales of one group, (N,), to their best; returns by how much they grew.

    The objective is a parabola in each scale: Ŵ moves along c, so that its slope is −2 (H E)·c and
    its curvature 2 c·(H c). Where float16 would make the best scale a worse one, the old one stays.
    """
    slope, curvature = (slope * c).sum(0), ((H_gg @ c) * c).sum(0)
    step = storable(scale + slope / torch.where(curvature > 0, curvature, 1)) - scale
    step = torch.where(step * (2 * slope - step * curvature) > 0, step, 0)
    scale += step
    return step


def _round_again(
    slope: Tensor, T: Tensor, H: Tensor, c: Tensor, E: Tensor, grid: Grid, g: int, spec: QuantSpec
) -> None:
    """Round the columns of group g, each given all others; c, E and slope = H E are changed.

    H, T and the like are those of the group alone.
    """
    d = H.diagonal()[:, None]
    live, d = d > 0, d.clamp(min=torch.finfo(d.dtype).tiny)
    for start in range(0, len(T), spec.block_size):
        block = slice(start, min(start + spec.block_size, len(T)))
        W_hat = T[block] - E[block]
        # Down the slope; but a column without input has none, and goes to the nearest point.
        base = torch.where(live[block], W_hat + slope[block] / d[block], T[block])
        values, change = torch.empty_like(base), torch.empty_like(base)
        _round_part(
            base,
            W_hat,
            grid,
            torch.full((len(base),), g, device=T.device),
            spec.bits,
            H[block, block] / d[block].T,
            None,
            (c[block], values, change),
        )
        E[block] += change
        slope[block.stop :].addmm_(H[block.stop :, block], change)


def _round_part(
    base: Tensor,
    T: Tensor,
    grid: Grid,
    group_of: Tensor,
    bits: int,
    L: Tensor,
    P: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The loop over columns: 5 small operations each, all rows at once, and no waiting.

    On CUDA one kernel does it all, for parts that are not too long. Its sums are in another order.

    Args:
        base: (B, N) the columns' values but for what happens inside this part.
        T: (B, N) what the errors are measured from.
        grid: of all groups.
        group_of: (B,) the group of each column.
        bits: of the whole numbers.
        L: (B, B) how the error of column i (row) moves the value of column j; read above the
            diagonal.
        P: likewise how the value of column i moves that of column j, for GPTAQ.
        out: three (B, N) that are written: whole numbers without the zero point; the values that
            were rounded; T less what they were rounded to.
    """
    scale, zero = grid.scale_GO[group_of], grid.zero_GO[group_of]
    low, high = -zero, 2**bits - 1 - zero
    if _HAS_TRITON and T.is_cuda and T.dtype == torch.float32 and len(T) <= _FUSED_COLUMNS:
        from longwing.quant.fused import round_columns

        round_columns(base, T, (scale, low, high), L, P, out)
        return
    c, V, E = out
    for j in range(len(T)):
        torch.addmv(base[j], E[:j].T, L[:j, j], out=V[j])
        if P is not None:
            V[j].addmv_(V[:j].T, P[:j, j])
        torch.clamp((V[j] / scale[j]).round_(), low[j], high[j], out=c[j])
        torch.addcmul(T[j], c[j], scale[j], value=-1, out=E[j])
