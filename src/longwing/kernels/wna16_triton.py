"""Multiplication by streamed weights on a GPU: which kernel, and cut how.

The meaning is `wna16.packed_matmul`. The layout is in `streamed.py`, the device code in
`wna16_device.py`. Imported only where there is Triton.

Shape key: T tokens, K in features, N out features (padding counted), X inputs of stacked weights.

The one idea: few tokens stream the packed weights once, and time is bytes; many make a slice of
them dense and leave the rest to cuBLAS. In between, tiles of 64 tokens stream them again for each
tile. What cuts a launch up is taken from shapes alone: nothing is tried out or read back at run
time, so every launch can be captured in a CUDA graph.

What is the same to the last bit: a row alone and in any batch of up to 16 tokens; any run and the
next. Between up to 16, up to 256 and more tokens, sums differ as float32 sums in another order do.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longwing.kernels.streamed import (
    CELL_IN,
    CELL_OUT,
    TILE_OUT,
    TOKEN_TILES,
    StreamedWeight,
)
from longwing.kernels.wna16_device import make_dense, multiply

NARROW_TOKENS = 16
"""Up to here mma.sync takes tokens in blocks of 8; above, wgmma takes 32 or 64."""

STREAM_TOKENS = 256
"""Above this a dense slice and cuBLAS are faster (measured on an H200, bench/kernels.py)."""

NARROW_PROGRAMS = 528
"""Programs that a narrow launch aims at: four on each of an H200's 132 multiprocessors."""

WIDE_PROGRAMS = 264
"""Wide programs that run at once: two on each multiprocessor, by their registers."""

DENSE_SLICE = 2**26
"""Weights made dense at once: 128 MiB."""

NUMBERS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

MAGIC = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
"""The power of two whose lowest mantissa bit counts 1, in both halves of a word."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a launch is cut up.

    Attributes:
        tokens: columns of a program's tile: 8 or 16 narrow, 32 or 64 wide.
        splits: programs that share a tile's inputs.
        stages: chunks in flight for each program.
    """

    tokens: int
    splits: int
    stages: int


def packed_matmul(x_TK: Tensor, weight: StreamedWeight, cut: Cut | None = None) -> Tensor:
    """X @ weight, (T, K) -> (T, N), for a weight of one part; sums in float32.

    Args:
        x_TK: in the type that the weight was laid out for.
        weight: on the same device.
        cut: None for the one that shapes call for.

    Raises:
        ValueError: shapes or types that do not match, or a weight of several parts.
    """
    if len(weight.parts) != 1:
        raise ValueError(f"a weight of {len(weight.parts)} parts: use packed_matmul_many")
    return packed_matmul_many(x_TK, weight, cut)[0]


def packed_matmul_many(
    x: Tensor, weight: StreamedWeight, cut: Cut | None = None
) -> tuple[Tensor, ...]:
    """One launch for weights that share an input, or for two with an input each.

    Args:
        x: (T, K), or (2, T, K) for two parts: Falcon-40B's attention and MLP have a norm each.
        weight: as for `packed_matmul`.
        cut: as for `packed_matmul`.

    Returns:
        For each part its (T, N): views of one tensor, their rows contiguous, not the whole.
    """
    T, K = x.shape[-2:]
    if x.dtype != weight.scales_GN.dtype or weight.in_features != K:
        raise ValueError(
            f"input of {K} features in {x.dtype}; the weight was laid out for "
            f"{weight.in_features} in {weight.scales_GN.dtype}"
        )
    if x.ndim not in (2, 3) or (x.ndim == 3 and not len(x) == len(weight.parts) == 2):
        raise ValueError(
            f"{tuple(x.shape)} inputs for {len(weight.parts)} parts: one, or two for two"
        )
    out_TN = x.new_empty(T, weight.starts[-1])
    if cut is None and T > STREAM_TOKENS:
        _multiply_dense(_ordered(x, weight.order_K), weight, out_TN)
    elif T > 0:
        _multiply_streamed(x, weight, cut or choose_cut(weight, T), out_TN)
    starts = weight.starts
    return tuple(out_TN[:, at : at + part] for at, part in zip(starts, weight.parts, strict=False))


def choose_cut(weight: StreamedWeight, num_tokens: int) -> Cut:
    """The best of those that bench/kernels.py tries. Narrow splits do not depend on the tokens."""
    tiles, chunks = weight.starts[-1] // TILE_OUT, weight.words.shape[1]
    if num_tokens <= NARROW_TOKENS:
        splits = min(max(round(NARROW_PROGRAMS / tiles), 1), chunks)
        return Cut(tokens=8 if num_tokens <= 8 else 16, splits=splits, stages=3)
    tokens = 32 if num_tokens <= 32 else 64
    token_tiles = triton.cdiv(num_tokens, tokens)
    if token_tiles > TOKEN_TILES:
        return Cut(tokens=tokens, splits=1, stages=3)
    programs = tiles * token_tiles
    splits = min(range(1, min(chunks, 8) + 1), key=lambda splits: _waves(programs, splits))
    return Cut(tokens=tokens, splits=splits, stages=3)


def _waves(programs: int, splits: int) -> float:
    """Rounds that a wide launch takes, in those of whole inputs; a split costs a tenth of one."""
    return math.ceil(programs * splits / WIDE_PROGRAMS) / splits * (1 + splits / 10)


def dequantize(weight: StreamedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start to stop of the dense (N, K) matrix, its inputs in the weight's order.

    Args:
        weight: any streamed weight.
        start: a multiple of TILE_OUT.
        stop: another; None for the end of all padding.

    Returns:
        In the type of the scales; equal to what `wna16.dequantize` gives in that type, if the
        checkpoint's scales have it too. (float16 scales laid out for bfloat16 are rounded once.)
    """
    stop = weight.starts[-1] if stop is None else stop
    N, chunks = weight.starts[-1], weight.words.shape[1]
    dense_NK = weight.scales_GN.new_empty(stop - start, weight.in_features)
    groups, chunks_per_group = _groups(weight)
    with torch.cuda.device_of(dense_NK):
        make_dense[(chunks, (stop - start) // TILE_OUT)](
            *(weight.words, weight.scales_GN, _zeros(weight), dense_NK),
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


def _multiply_streamed(x: Tensor, weight: StreamedWeight, cut: Cut, out_TN: Tensor) -> None:
    wide = cut.tokens > NARROW_TOKENS
    x = _ordered(x, weight.order_K)
    if wide:  # the order in which wgmma takes inputs, see wna16_device._operand
        x = x.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
    x = x.contiguous()
    T, K = x.shape[-2:]
    N, chunks = out_TN.shape[1], weight.words.shape[1]
    token_tiles = triton.cdiv(T, cut.tokens)
    split_up = cut.splits > 1
    partial = x.new_empty(cut.splits, T, N, dtype=torch.float32) if split_up else out_TN
    groups, chunks_per_group = _groups(weight)
    with torch.cuda.device_of(x):
        multiply[(N // TILE_OUT, cut.splits, token_tiles)](
            *(x, weight.words, weight.scales_GN, _zeros(weight), out_TN, partial, weight.arrivals),
            *(T, K, N, chunks, chunks_per_group),
            *(weight.starts[1] if x.ndim == 3 else N, MAGIC[x.dtype]),
            bits=weight.bits,
            number=NUMBERS[x.dtype],
            groups=groups,
            sym=weight.zeros is None,
            even=K % CELL_IN == 0,
            split_up=split_up,
            R=TILE_OUT // CELL_OUT,
            tokens=cut.tokens,
            pair=cut.tokens == NARROW_TOKENS,
            wide=wide,
            stages=cut.stages,
            num_warps=TILE_OUT // CELL_OUT,
        )


def _multiply_dense(x: Tensor, weight: StreamedWeight, out_TN: Tensor) -> None:
    rows = max(DENSE_SLICE // weight.in_features // TILE_OUT, 1) * TILE_OUT
    for part, (first, end) in enumerate(zip(weight.starts[:-1], weight.starts[1:], strict=True)):
        x_TK = x[part] if x.ndim == 3 else x
        for start in range(first, end, rows):
            stop = min(start + rows, end)
            dense_NK = dequantize(weight, start, stop)
            if stop - start == out_TN.shape[1]:
                torch.mm(x_TK, dense_NK.T, out=out_TN)
            else:
                out_TN[:, start:stop] = F.linear(x_TK, dense_NK)


def _ordered(x: Tensor, order_K: Tensor | None) -> Tensor:
    return x if order_K is None else x.index_select(-1, order_K)


def _groups(weight: StreamedWeight) -> tuple[int, int]:
    """Scales of a row in a cell, 0 for one in all; and chunks that share one."""
    if weight.group_size == weight.in_features:
        return 0, weight.words.shape[1]
    if weight.group_size < CELL_IN:
        return CELL_IN // weight.group_size, 1
    return 1, weight.group_size // CELL_IN


def _zeros(weight: StreamedWeight) -> Tensor:
    """Zero points; without any, a tensor of their type that no kernel will read."""
    return weight.words if weight.zeros is None else weight.zeros
