"""Multiplication by streamed weights of many tokens: a slice made dense, then cuBLAS.

The device code is in `dense_device.py`. Imported only where there is Triton.

Shape key: T tokens, K in features, N out features (padding counted).
"""

import math
from itertools import pairwise

import torch
import triton.language as tl
from torch import Tensor

from longwing.kernels.dense_device import make_dense
from longwing.kernels.fused_triton import activate_
from longwing.kernels.streamed import CELL_OUT, TILE_OUT, StreamedWeight
from longwing.kernels.wna16_after import After

DENSE_SLICE = 2**27
"""Weights made dense at once: 256 MiB."""

SLICE_ROWS = 256
"""A slice's rows are a multiple: whole tiles for cuBLAS."""

TOKENS_AT_ONCE = 12_000
"""As many as cuBLAS is given at once, on average and within half: of 24,000 each takes 4% longer
than of two times 12,000 (H200)."""

NUMBERS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

MAGIC = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
"""The power of two whose lowest mantissa bit counts 1, in both halves of a word."""


def dequantize(weight: StreamedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start to stop of the dense (N, K) matrix, its inputs in the weight's order.

    Args:
        weight: any streamed weight.
        start: a multiple of TILE_OUT.
        stop: another; None for the end of all padding.

    Returns:
        In the type of the activations; equal to what `wna16.dequantize` gives in that type.
    """
    stop = weight.starts[-1] if stop is None else stop
    N, chunks = weight.starts[-1], weight.words.shape[1]
    dense_NK = weight.scales_GN.new_empty(stop - start, weight.in_features, dtype=weight.dtype)
    groups, chunks_per_group = weight.cell_groups
    with torch.cuda.device_of(dense_NK):
        make_dense[(chunks, (stop - start) // TILE_OUT)](
            *(weight.words, weight.scales_GN, weight.any_zeros, dense_NK),
            *(weight.in_features, N, chunks, chunks_per_group),
            *(start // TILE_OUT, MAGIC[dense_NK.dtype]),
            bits=weight.bits,
            number=NUMBERS[dense_NK.dtype],
            groups=groups,
            sym=weight.zeros is None,
            R=TILE_OUT // CELL_OUT,
            num_warps=TILE_OUT // CELL_OUT,
        )
    return dense_NK


def multiply_dense(x_TK: Tensor, weight: StreamedWeight, after: After, out_TN: Tensor) -> None:
    """Slice by slice: dense, then cuBLAS straight into the result."""
    for first, end in pairwise(weight.starts):
        num_slices = math.ceil((end - first) * weight.in_features / DENSE_SLICE)
        rows = math.ceil((end - first) / num_slices / SLICE_ROWS) * SLICE_ROWS
        for start in range(first, end, rows):
            stop = min(start + rows, end)
            # Never named here: while the next slice is made, this one would still be there.
            _multiply_slice(
                x_TK, dequantize(weight, start, stop), after, start, out_TN[:, start:stop]
            )


def _multiply_slice(
    x_TK: Tensor, dense_NK: Tensor, after: After, start: int, slice_TN: Tensor
) -> None:
    """A slice's product, its outputs from `start` on; rows beyond the result are padding."""
    T, N = slice_TN.shape
    dense_KN = dense_NK[:N].T
    step = math.ceil(T / max(round(T / TOKENS_AT_ONCE), 1))
    for first in range(0, T, step):
        some = slice(first, first + step)
        more_TN = None if after.more_TN is None else after.more_TN[some, start : start + N]
        _multiply_some(x_TK[some], dense_KN, after, start, more_TN, slice_TN[some])


def _multiply_some(
    x_TK: Tensor,
    dense_KN: Tensor,
    after: After,
    start: int,
    more_TN: Tensor | None,
    out_TN: Tensor,
) -> None:
    """The product of some tokens and a slice, with what comes after it."""
    if more_TN is not None and after.bias_N is None and not after.act:
        torch.addmm(more_TN, x_TK, dense_KN, out=out_TN)
    elif more_TN is None:
        torch.mm(x_TK, dense_KN, out=out_TN)
        _finish(out_TN, after, start)
    else:  # the result may lie where the residual does
        product_TN = x_TK @ dense_KN
        _finish(product_TN, after, start)
        torch.add(product_TN, more_TN, out=out_TN)


def _finish(slice_TN: Tensor, after: After, start: int) -> None:
    """Bias and activation of a slice that begins at `start`, in place."""
    if after.bias_N is not None:
        slice_TN += after.bias_N[start : start + slice_TN.shape[1]]
    if after.act:
        activate_(slice_TN, after.act)
