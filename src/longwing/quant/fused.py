"""The inner loop over columns as one Triton kernel. What it computes is said in `columns.py`.

Imported only where there is a CUDA device and Triton. Without it, a column costs five launches,
some 100 µs; with it, 1 µs.

The one idea: output features are independent, so each thread takes one and keeps its values of all
columns of a part in registers. Triton cannot index registers by a loop variable; the value of
column j is taken out as a sum over columns in which all others are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

_LANES = 32


def round_columns(
    base: Tensor,
    T: Tensor,
    grid: tuple[Tensor, Tensor, Tensor],
    L: Tensor,
    P: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`columns._round_part` on CUDA, in float32.

    Raises:
        ValueError: a tensor to be written is not contiguous.
    """
    B, N = T.shape
    if not all(tensor.is_contiguous() for tensor in out):
        raise ValueError("the kernel writes to contiguous tensors only")
    base, T, *grid_BN = (tensor.contiguous() for tensor in (base, T, *grid))
    L = L.contiguous()
    P = L if P is None else P.contiguous()
    with torch.cuda.device(T.device):
        _kernel[(triton.cdiv(N, _LANES),)](
            *(base, T, *grid_BN, L, P, *out),
            *(B, N),
            has_P=P is not L,
            rows=triton.next_power_of_2(B),
            lanes=_LANES,
            num_warps=1,
        )


def _round_columns(
    base: tl.tensor,
    T: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    L: tl.tensor,
    P: tl.tensor,
    c: tl.tensor,
    V: tl.tensor,
    E: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    has_P: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    n = tl.program_id(0) * lanes + tl.arange(0, lanes)
    inside = n < N
    i = tl.arange(0, rows)
    values = tl.load(base + i[:, None] * N + n, mask=(i < B)[:, None] & inside, other=0.0)
    for j in range(B):
        at = j * N + n
        s = tl.load(scale + at, mask=inside, other=1.0)
        lowest = tl.load(low + at, mask=inside, other=0.0)
        highest = tl.load(high + at, mask=inside, other=0.0)
        t = tl.load(T + at, mask=inside, other=0.0)
        l_j = tl.load(L + j * B + i, mask=(i > j) & (i < B), other=0.0)
        w = tl.sum(tl.where(i[:, None] == j, values, 0.0), axis=0)
        # Both bounds are whole: to clamp before rounding is to clamp after it.
        q = libdevice.rint(tl.minimum(tl.maximum(tl.div_rn(w, s), lowest), highest))
        e = t - q * s
        values += l_j[:, None] * e
        if has_P:
            p_j = tl.load(P + j * B + i, mask=(i > j) & (i < B), other=0.0)
            values += p_j[:, None] * w
        tl.store(c + at, q, mask=inside)
        tl.store(V + at, w, mask=inside)
        tl.store(E + at, e, mask=inside)


_kernel = triton.jit(_round_columns)
