# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the GPU runs to multiply by streamed weights, in Triton. Launched by `wna16_triton.py`.

How words become operands is in `wna16_cells.py`, and for few tokens in `wna16_bytes.py`; the layout
is `streamed.py`'s.

Shape key: T tokens, K in features, N out features, R panels of 32 outputs in a tile (one a warp);
`q` and `w` are cells as whole numbers and as operands, `sums` (32 R, tokens) float32.

The one idea: a tile's inputs are shared out over several programs, and whichever is the last to
leave its sums adds all of them up, in a fixed order, and does there what comes after the product:
norm, bias, activation, residual, and what the next norm needs. So no launch waits for another.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from longwing.kernels.digits_device import leave_digits
from longwing.kernels.fused_device import activate, arranged
from longwing.kernels.wna16_bytes import sum_by_bytes
from longwing.kernels.wna16_cells import (
    as_operand,
    operand_rows,
    read_cells,
    row_scales,
    scaled_rows,
)


@triton.jit
def _add_group(
    sums,
    q,
    x_ptr,
    t,
    T,
    k,
    K,
    row_ptr,
    panel,
    R: tl.constexpr,
    width: tl.constexpr,
    even: tl.constexpr,
    grouped: tl.constexpr,
):
    """Sums plus the products over inputs k to k + width, scaled unless one scale serves all."""
    w = as_operand(q, R, width, True)
    scales = row_scales(row_ptr, panel, R) if grouped else 1.0  # on its way before the product is
    inputs = k + tl.arange(0, width)[:, None]
    valid = (t < T)[None, :]
    at = x_ptr + t.to(tl.int64)[None, :] * K + inputs
    x = tl.load(at, mask=valid if even else valid & (inputs < K), other=0.0)
    if grouped:
        return sums + scaled_rows(tl.dot(w, x), scales)
    else:
        return tl.dot(w, x, sums)


@triton.jit
def _leave(sums, n, t, T, N, at_ptr):
    tl.store(at_ptr + t.to(tl.int64)[None, :] * N + n[:, None], sums, mask=(t < T)[None, :])


@triton.jit
def _total(x):
    """The sum of each column. In float64, so that the order does not show in float32."""
    return tl.sum(x.to(tl.float64), axis=0)


@triton.jit
def _asked(
    n,
    t,
    T,
    width,
    stats_ptr,
    level_ptr,
    input_tiles,
    bias_ptr,
    more_ptr,
    more_stride,
    norm_ptr,
    second_norm_ptr,
    STATS_BLOCK: tl.constexpr,
):
    """What `_give` needs besides the sums, on its way: 0 where there is none of it.

    Sums of each tile of the inputs, and of their squares; level; bias; what there was before; and
    the weights of the norms that follow.
    """
    totals, squares, level, bias, more, first, second = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    there = n < width
    if stats_ptr is not None:
        tile = tl.arange(0, STATS_BLOCK)
        at = (tile[:, None] * T + t[None, :]) * 2
        valid = (tile < input_tiles)[:, None] & (t < T)[None, :]
        totals = tl.load(stats_ptr + at, mask=valid, other=0.0)
        squares = tl.load(stats_ptr + at + 1, mask=valid, other=0.0)
        level = tl.load(level_ptr + n, mask=there, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=there, other=0.0)
    if more_ptr is not None:
        at = t.to(tl.int64)[None, :] * more_stride + n[:, None]
        more = tl.load(more_ptr + at, mask=there[:, None] & (t < T)[None, :], other=0.0)
    if norm_ptr is not None:
        first = tl.load(norm_ptr + n, mask=there, other=0.0)
    if second_norm_ptr is not None:
        second = tl.load(second_norm_ptr + n, mask=there, other=0.0)
    return totals, squares, level, bias, more, first, second


@triton.jit
def _moments(totals, squares, K, eps, there: tl.constexpr):
    """Each token's mean, and the inverse of its deviation, from sums of its tiles, if any."""
    if there:
        mean = _total(totals) / K
        variance = _total(squares) / K - mean * mean
        return mean.to(tl.float32), tl.rsqrt(variance.to(tl.float32) + eps)
    else:
        return 0.0, 1.0


@triton.jit
def _leave_digits(x, tile, t, T, width, digits_ptr, steps_ptr):
    """A tile's (128, tokens) results as a block of each token's digits."""
    block = tile + tl.zeros(t.shape, tl.int32)
    leave_digits(tl.trans(x), block, t, t < T, T, tl.cdiv(width, 128), digits_ptr, steps_ptr)


@triton.jit
def _scale_for(
    weight, digits_ptr, steps_ptr, x, tile, t, T, width, number: tl.constexpr
):  # fmt: skip
    scaled = (x * weight.to(tl.float32)[:, None]).to(number).to(tl.float32)
    _leave_digits(scaled, tile, t, T, width, digits_ptr, steps_ptr)


@triton.jit
def _give(
    sums,
    asked,
    moments,
    n,
    t,
    T,
    tile,
    width,
    stats_ptr,
    bias_ptr,
    more_ptr,
    out_ptr,
    out_stride,
    digits_ptr,
    steps_ptr,
    norm_ptr,
    second_norm_ptr,
    next_stats_ptr,
    number: tl.constexpr,
    act: tl.constexpr,
    arrange: tl.constexpr,
):
    """Sums to results: normed, plus a bias, through the activation, plus what was there before.

    And, for few tokens, what the products that follow will want. Products of what only has its
    norm's weights become those of the norm; see `norm_fold.py`.
    """
    _, _, level, bias, more, first, second = asked
    valid = (t < T)[None, :] & (n < width)[:, None]
    if stats_ptr is not None:
        mean, scale = moments
        sums = (sums - mean[None, :] * level[:, None]) * scale[None, :]
    if bias_ptr is not None:
        sums += bias.to(tl.float32)[:, None]
    sums = activate(sums, act)
    if more_ptr is not None:
        sums += more.to(tl.float32)
    place = arranged(n) if arrange else n
    at = t.to(tl.int64)[None, :] * out_stride + place[:, None]
    rounded = sums.to(number)
    tl.store(out_ptr + at, rounded, mask=valid)
    if digits_ptr is not None:
        x = tl.where(valid, rounded.to(tl.float32), 0.0)
        if norm_ptr is None:
            _leave_digits(x, tile, t, T, width, digits_ptr, steps_ptr)
        else:
            _scale_for(first, digits_ptr, steps_ptr, x, tile, t, T, width, number)
            if second_norm_ptr is not None:
                blocks = tl.cdiv(width, 128)
                digits_ptr += 3 * T.to(tl.int64) * blocks * 128
                steps_ptr += T.to(tl.int64) * blocks
                _scale_for(second, digits_ptr, steps_ptr, x, tile, t, T, width, number)
            at = (tile * T + t) * 2
            tl.store(next_stats_ptr + at, _total(x).to(tl.float32), mask=t < T)
            tl.store(next_stats_ptr + at + 1, _total(x * x).to(tl.float32), mask=t < T)


@triton.jit
def _merged(n, t, T, N, splits, partial_ptr, at_once: tl.constexpr):
    """What the splits left, added from first to last, whichever came last.

    Some loads at a time, where registers allow: each would wait for the one before. Those beyond
    the last bring zeros, for a loop over what is left would wait for each again.
    """
    at = t.to(tl.int64)[None, :] * N + n[:, None]
    valid = (t < T)[None, :]
    stride = T.to(tl.int64) * N
    sums = tl.load(partial_ptr + at, mask=valid, other=0.0)
    for first in tl.range(1, splits, at_once):
        for i in tl.static_range(at_once):
            there = valid & (first + i < splits)
            sums += tl.load(partial_ptr + (first + i) * stride + at, mask=there, other=0.0)
    return sums


@triton.jit
def _sum_by_numbers(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    panel,
    t,
    T,
    K,
    N,
    begin,
    end,
    chunks,
    chunks_per_group,
    magic,
    bits: tl.constexpr,
    number: tl.constexpr,
    groups: tl.constexpr,
    sym: tl.constexpr,
    even: tl.constexpr,
    R: tl.constexpr,
    tokens: tl.constexpr,
    stages: tl.constexpr,
):
    """(32 R, tokens) float32 sums over the chunks from begin to end, by 16-bit tensor cores."""
    width: tl.constexpr = 128 // max(groups, 1)
    sums = tl.zeros((32 * R, tokens), tl.float32)
    for c in tl.range(begin, end, num_stages=stages):
        g = c // chunks_per_group * max(groups, 1)
        q = read_cells(
            words_ptr, zeros_ptr, panel, c, chunks, g, N, magic, bits, number, groups, sym, R
        )
        k = c * 128
        s = scales_ptr + g * N
        if groups < 2:
            sums = _add_group(sums, q, x_ptr, t, T, k, K, s, panel, R, width, even, groups > 0)
        elif groups == 2:
            q0, q1 = tl.split(q)
            sums = _add_group(sums, q0, x_ptr, t, T, k, K, s, panel, R, 64, even, True)
            k += 64
            s += N
            sums = _add_group(sums, q1, x_ptr, t, T, k, K, s, panel, R, 64, even, True)
        else:
            low, high = tl.split(q)
            q0, q1 = tl.split(low)
            q2, q3 = tl.split(high)
            sums = _add_group(sums, q0, x_ptr, t, T, k, K, s, panel, R, 32, even, True)
            k += 32
            s += N
            sums = _add_group(sums, q1, x_ptr, t, T, k, K, s, panel, R, 32, even, True)
            k += 32
            s += N
            sums = _add_group(sums, q2, x_ptr, t, T, k, K, s, panel, R, 32, even, True)
            k += 32
            s += N
            sums = _add_group(sums, q3, x_ptr, t, T, k, K, s, panel, R, 32, even, True)
    if groups == 0:
        sums = scaled_rows(sums, row_scales(scales_ptr, panel, R))
    return sums


@triton.jit(
    do_not_specialize=[
        "T",
        "first_split",
        "all_splits",
        "out_width",
        "more_stride",
        "out_stride",
        "chunks",
        "magic",
        "two",
        "input_tiles",
    ]
)
def multiply(
    x_ptr,
    x_steps_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    stats_ptr,
    level_ptr,
    bias_ptr,
    more_ptr,
    out_ptr,
    digits_ptr,
    steps_ptr,
    norm_ptr,
    second_norm_ptr,
    next_stats_ptr,
    partial_ptr,
    arrivals_ptr,
    T,
    K,
    N,
    first_split,
    all_splits,
    out_width,
    more_stride,
    out_stride,
    chunks,
    chunks_per_group,
    magic,
    two,
    eps,
    input_tiles,
    bits: tl.constexpr,
    number: tl.constexpr,
    groups: tl.constexpr,
    sym: tl.constexpr,
    even: tl.constexpr,
    act: tl.constexpr,
    arrange: tl.constexpr,
    lone: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    split_up: tl.constexpr,
    R: tl.constexpr,
    tokens: tl.constexpr,
    wide: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr,
    lets: tl.constexpr,
):
    """A tile of 32 R outputs by `tokens`, over one of several runs of the inputs.

    Programs: (tiles, splits, tiles of tokens). The last program of a tile to arrive adds up.

    What is not plain from the names:

    - x_ptr, x_steps_ptr: wide, (T, K) and None; else `Digits` of the inputs.
    - stats_ptr: (input tiles, T, 2) float32 sums and sums of squares of what the inputs were before
      a norm's weights, and level_ptr: (N,) float32 products of those; or None.
    - bias_ptr: (N,), added before the activation; or None.
    - more_ptr: (T, out_width), rows more_stride apart, added after it; or None. May be out_ptr.
    - out_ptr: (T, out_width), rows out_stride apart.
    - digits_ptr, steps_ptr: results as `Digits`, too; or None.
    - norm_ptr, second_norm_ptr: (out_width,) weights of the norms that follow, or None. If there
      are any, those digits are of the results times these, of one norm behind those of the other,
      and sums of the results go to next_stats_ptr.
    - partial_ptr: (all_splits, T, N) float32, if split.
    - arrivals_ptr: a zero for each tile, if split; zero again afterwards.
    - first_split, all_splits: where this launch's sums lie among those of the launches whose
      products are added. The last program to arrive may belong to any of them.
    - arrange: results are to be the inputs of a wide product.
    - lone: T is 1; what the splits left is added by all lanes, many loads at once.
    - groups: scales of a row in a cell: 1, 2 or 4; 0 where one scale serves all inputs.
    - even: K is a multiple of 128.
    - early: what the input waits for may still be running (`launch.starts_early`).
    - lets: what comes next may begin when no program multiplies any more.
    """
    tile, split, block_T = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    panel = tile * R + tl.arange(0, R)[:, None]
    t = block_T * tokens + tl.arange(0, tokens)
    own_t = tl.arange(0, 1) if lone and split_up else t
    # The panels of a warp side by side by bytes, as they are numbered: lanes keep what they have.
    n = operand_rows(tile, R) if wide else tile * (32 * R) + tl.arange(0, 32 * R)
    begin, end = chunks * split // splits, chunks * (split + 1) // splits
    few: tl.constexpr = tokens == 2
    at_once: tl.constexpr = 64 // tokens if wide else 16 if lone else 8
    if early:
        gdc.gdc_wait()
    if few:
        # Few registers, and nobody waits for it when the sums are there.
        asked = _asked(
            n, own_t, T, out_width, stats_ptr, level_ptr, input_tiles, bias_ptr,
            more_ptr, more_stride, norm_ptr, second_norm_ptr, STATS_BLOCK,
        )  # fmt: skip
    if wide:
        sums = _sum_by_numbers(
            x_ptr, words_ptr, scales_ptr, zeros_ptr, panel, t, T, K, N, begin, end,
            chunks, chunks_per_group, magic, bits, number, groups, sym, even, R, tokens, stages,
        )  # fmt: skip
    else:
        sums = sum_by_bytes(
            x_ptr, x_steps_ptr, words_ptr, scales_ptr, zeros_ptr, panel, block_T, T, N, begin, end,
            chunks, chunks_per_group, two, bits, groups, sym, R, tokens, stages,
        )  # fmt: skip
        sums = sums.reshape(2, R, 16, tokens).permute(1, 0, 2, 3).reshape(32 * R, tokens)
    if lets:
        gdc.gdc_launch_dependents()
    arrival = arrivals_ptr + block_T * tl.num_programs(0) + tile
    if split_up:
        _leave(sums, n, t, T, N, partial_ptr + (first_split + split) * (T.to(tl.int64) * N))
    if few:
        moments = _moments(asked[0], asked[1], K, eps, stats_ptr is not None)
    last = True
    if split_up:
        # All lanes of this program have stored before one of them counts it.
        tl.debug_barrier()
        last = tl.atomic_add(arrival, 1, sem="acq_rel") == all_splits - 1
    if last:
        if split_up:
            tl.debug_barrier()
            results = _merged(n, own_t, T, N, all_splits, partial_ptr, at_once)
        else:
            results = sums
        if not few:
            asked = _asked(
                n, own_t, T, out_width, stats_ptr, level_ptr, input_tiles, bias_ptr,
                more_ptr, more_stride, norm_ptr, second_norm_ptr, STATS_BLOCK,
            )  # fmt: skip
            moments = _moments(asked[0], asked[1], K, eps, stats_ptr is not None)
        _give(
            results, asked, moments, n, own_t, T, tile, out_width, stats_ptr, bias_ptr, more_ptr,
            out_ptr, out_stride, digits_ptr, steps_ptr, norm_ptr, second_norm_ptr, next_stats_ptr,
            number, act, arrange,
        )  # fmt: skip
        if split_up:
            tl.store(arrival, 0)
