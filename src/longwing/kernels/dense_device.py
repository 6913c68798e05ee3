# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the GPU runs to make streamed weights dense, in Triton. Launched by `wna16_dense.py`.

How words become operands is in `wna16_cells.py`; the layout is `streamed.py`'s.

Shape key: K in features, N out features, R panels of 32 outputs in a tile (one a warp).
"""

import triton
import triton.language as tl

from longwing.kernels.wna16_cells import as_operand, operand_rows, read_cells, row_scales


@triton.jit
def _store_group(
    q,
    k,
    K,
    row,
    dense_ptr,
    row_ptr,
    panel,
    R: tl.constexpr,
    width: tl.constexpr,
    number: tl.constexpr,
):
    """One group of a cell to rows of the dense matrix. A lane holds inputs 32 j + 8 t to + 7."""
    w = as_operand(q, R, width, False).to(tl.float32).reshape(32 * R, width // 32, 4, 8)
    w = (w * row_scales(row_ptr, panel, R)[:, None, :, None]).reshape(32 * R, width)
    inputs = k + tl.arange(0, width)[None, :]
    tl.store(dense_ptr + row.to(tl.int64)[:, None] * K + inputs, w.to(number), mask=inputs < K)


@triton.jit(do_not_specialize=["chunks", "first_tile", "magic"])
def make_dense(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    dense_ptr,
    K,
    N,
    chunks,
    chunks_per_group,
    first_tile,
    magic,
    bits: tl.constexpr,
    number: tl.constexpr,
    groups: tl.constexpr,
    sym: tl.constexpr,
    R: tl.constexpr,
):
    """One chunk of a tile to the rows of a dense (N', K) matrix that begins at `first_tile`.

    Programs: (chunks, tiles).
    """
    c, tile = tl.program_id(0), tl.program_id(1) + first_tile
    panel = tile * R + tl.arange(0, R)[:, None]
    g = c // chunks_per_group * max(groups, 1)
    q = read_cells(
        words_ptr, zeros_ptr, panel, c, chunks, g, N, magic, bits, number, groups, sym, R
    )
    row = operand_rows(tile - first_tile, R)
    s = scales_ptr + g * N
    k = c * 128
    if groups < 2:
        _store_group(q, k, K, row, dense_ptr, s, panel, R, 128, number)
    elif groups == 2:
        q0, q1 = tl.split(q)
        _store_group(q0, k, K, row, dense_ptr, s, panel, R, 64, number)
        _store_group(q1, k + 64, K, row, dense_ptr, s + N, panel, R, 64, number)
    else:
        low, high = tl.split(q)
        q0, q1 = tl.split(low)
        q2, q3 = tl.split(high)
        _store_group(q0, k, K, row, dense_ptr, s, panel, R, 32, number)
        _store_group(q1, k + 32, K, row, dense_ptr, s + N, panel, R, 32, number)
        _store_group(q2, k + 64, K, row, dense_ptr, s + 2 * N, panel, R, 32, number)
        _store_group(q3, k + 96, K, row, dense_ptr, s + 3 * N, panel, R, 32, number)
