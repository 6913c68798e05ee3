# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the GPU runs to multiply by streamed weights, in Triton. Launched by `wna16_triton.py`.

The layout, and the words cell, lane, pair and chunk, are `streamed.py`'s.

Shape key: T tokens, K in features, N out features, R panels of 32 outputs in a tile (one a warp).
Names of blocks: `q` whole numbers, (R, 128 lanes and words, h, then the four bits of the pair);
`w` the same as an operand, (32 R, inputs); `sums` (32 R, tokens) float32.

The one idea: a pair of values becomes two 16-bit floats by one AND-OR, which sets a power of two
above them as exponent, and one packed subtraction of that power and the zero point. The difference
is a small integer, exact; it is multiplied as such, and scales multiply the float32 sums of a
group. So no weight is rounded, and to unpack one costs 1.4 instructions at 4 bits.

Every block is written so that what a lane loads is what its tensor core wants: reshapes, permutes
and joins below only rename registers. That is Triton's to find out, and it holds for 3.6 and 3.7;
where it does not, results stay right and weights take a detour through shared memory.
"""

import triton
import triton.language as tl

from longwing.kernels.fused_device import activate, arranged


@triton.jit
def _halves(pairs, number: tl.constexpr):
    """(R, 128) words to (R, 128, 2) 16-bit floats of the same bits, low half first."""
    low = pairs.to(tl.int16).to(number, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(number, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _field(
    words,
    magic,
    zeros,
    place: tl.constexpr,
    bits: tl.constexpr,
    number: tl.constexpr,
    sym: tl.constexpr,
):
    """The pairs at one place of the words, less their zero points: (R, 128, 2).

    Fields share a shift where the mantissa has room for several: the one at its bit b counts 2**b
    times as much, so its exponent is set b lower.
    """
    mantissa: tl.constexpr = 10 if number == tl.float16 else 7
    b: tl.constexpr = place % ((mantissa - 1) // bits * bits)
    mask: tl.constexpr = (((1 << bits) - 1) << b) * 0x10001
    above: tl.constexpr = 1 << (mantissa - b)
    exponent = magic - (b << mantissa) * 0x10001
    values = (words >> (place - b)) & mask
    if sym:
        middle: tl.constexpr = 1 << (bits - 1)
        return _halves(values | exponent, number) - tl.full((), above + middle, number)
    else:
        # Half way up to the next power no zero point leads below: integers subtract it.
        half: tl.constexpr = (1 << (mantissa - 1)) * 0x10001
        pairs = values + (exponent + half - (zeros << b))
        return _halves(pairs, number) - tl.full((), above + above // 2, number)


@triton.jit
def _byte(words, magic, zeros, place: tl.constexpr, number: tl.constexpr, sym: tl.constexpr):
    """`_field` for 8 bits. bfloat16 has 7 below its exponent: the eighth is added as 2 * 64."""
    if number == tl.float16:
        return _field(words, magic, zeros, place, 8, number, sym)
    else:
        words = words >> place
        low = _halves((words & 0x7F007F) | magic, number)
        top = _halves((words & 0x800080) << 7, number) * tl.full((), 64, number)
        if sym:
            return (low - tl.full((), 256, number)) + top
        else:
            zero = (zeros & 0xFF).to(tl.float32).to(number)[:, :, None]
            return ((low - tl.full((), 128, number)) + top) - zero


@triton.jit
def _join4(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _four(
    words,
    magic,
    zeros,
    place: tl.constexpr,
    bits: tl.constexpr,
    number: tl.constexpr,
    sym: tl.constexpr,
):
    """Four pairs that follow each other in a word."""
    return _join4(
        _field(words, magic, zeros, place, bits, number, sym),
        _field(words, magic, zeros, place + bits, bits, number, sym),
        _field(words, magic, zeros, place + 2 * bits, bits, number, sym),
        _field(words, magic, zeros, place + 3 * bits, bits, number, sym),
    )


@triton.jit
def _four_bytes(a, b, magic, zeros, number: tl.constexpr, sym: tl.constexpr):
    return tl.join(
        tl.join(_byte(a, magic, zeros, 0, number, sym), _byte(a, magic, zeros, 8, number, sym)),
        tl.join(_byte(b, magic, zeros, 0, number, sym), _byte(b, magic, zeros, 8, number, sym)),
    )


@triton.jit
def _numbers(
    at, magic, z0, z1, z2, z3, bits: tl.constexpr, number: tl.constexpr, sym: tl.constexpr
):
    """Read a cell for each panel, as `q`, from (R, 128) addresses of the first words.

    `magic` is the exponent of 128 (bfloat16) or 1024 (float16) in both halves; an argument, since
    AND-OR with two constants in the code is two instructions. z0 to z3 are the zero points of the
    quarters of a cell's inputs, in both halves.
    """
    w0 = tl.load(at)
    w1 = tl.load(at + 128)
    if bits == 2:
        q0 = _four(w0, magic, z0, 0, 2, number, sym)
        q1 = _four(w0, magic, z1, 8, 2, number, sym)
        q2 = _four(w1, magic, z2, 0, 2, number, sym)
        q3 = _four(w1, magic, z3, 8, 2, number, sym)
    elif bits == 3:
        w2 = tl.load(at + 256)
        spare = (w0 >> 15) & 0x10001 | (w1 >> 14) & 0x20002 | (w2 >> 13) & 0x40004
        q0 = _four(w0, magic, z0, 0, 3, number, sym)
        q1 = _four(w1, magic, z1, 0, 3, number, sym)
        q2 = _four(w2, magic, z2, 0, 3, number, sym)
        q3 = _join4(
            _field(w0, magic, z3, 12, 3, number, sym),
            _field(w1, magic, z3, 12, 3, number, sym),
            _field(w2, magic, z3, 12, 3, number, sym),
            _field(spare, magic, z3, 0, 3, number, sym),
        )
    elif bits == 4:
        q0 = _four(w0, magic, z0, 0, 4, number, sym)
        q1 = _four(w1, magic, z1, 0, 4, number, sym)
        q2 = _four(tl.load(at + 256), magic, z2, 0, 4, number, sym)
        q3 = _four(tl.load(at + 384), magic, z3, 0, 4, number, sym)
    else:
        q0 = _four_bytes(w0, w1, magic, z0, number, sym)
        q1 = _four_bytes(tl.load(at + 256), tl.load(at + 384), magic, z1, number, sym)
        q2 = _four_bytes(tl.load(at + 512), tl.load(at + 640), magic, z2, number, sym)
        q3 = _four_bytes(tl.load(at + 768), tl.load(at + 896), magic, z3, number, sym)
    return _join4(q0, q1, q2, q3)


@triton.jit
def _row_scales(row_ptr, panel, R: tl.constexpr):
    """(32 R, 4) float32: the scale of each row, once for each lane that holds sums of it.

    The four lanes read the same address, which costs no more than one of them would.
    """
    at = row_ptr + panel[:, :, None, None] * 32
    at += tl.arange(0, 8)[None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    scales = tl.load(tl.broadcast_to(at, (R, 8, 4, 4))).to(tl.float32)
    return scales.reshape(R, 8, 4, 2, 2).permute(3, 0, 4, 1, 2).reshape(R * 32, 4)


@triton.jit
def _row_zeros(row_ptr, panel, R: tl.constexpr):
    """(R, 128) zero points in the order of words, each in both halves.

    A lane's four come as one word. Were they loaded as bytes, Triton would deal operands out as
    for 8-bit tensor cores, and every weight would have to change lanes.
    """
    at = row_ptr + panel[:, :, None] * 8 + tl.arange(0, 8)[None, :, None]
    four = tl.load(tl.broadcast_to(at, (R, 8, 4)))
    even = tl.join(four & 0xFF, (four >> 16) & 0xFF)
    odd = tl.join((four >> 8) & 0xFF, (four >> 24) & 0xFF)
    return tl.join(even, odd).reshape(R, 128) * 0x10001


@triton.jit
def _chunk(
    words_ptr,
    zeros_ptr,
    panel,
    c,
    chunks,
    g,
    N,
    magic,
    bits: tl.constexpr,
    number: tl.constexpr,
    groups: tl.constexpr,
    sym: tl.constexpr,
    R: tl.constexpr,
):
    """The cells of chunk c, whose first group is g, less their zero points."""
    at = words_ptr + (panel.to(tl.int64) * chunks + c) * (bits * 128) + tl.arange(0, 128)[None, :]
    if sym:
        return _numbers(at, magic, 0, 0, 0, 0, bits, number, True)
    else:
        row_ptr = zeros_ptr + g * (N // 4)
        z0 = _row_zeros(row_ptr, panel, R)
        z1 = z0
        z2 = z0
        z3 = z0
        if groups > 1:
            z3 = _row_zeros(row_ptr + (groups - 1) * (N // 4), panel, R)
            z2 = z3
        if groups > 2:
            z1 = _row_zeros(row_ptr + N // 4, panel, R)
            z2 = _row_zeros(row_ptr + 2 * (N // 4), panel, R)
        return _numbers(at, magic, z0, z1, z2, z3, bits, number, False)


@triton.jit
def _operand(q, R: tl.constexpr, width: tl.constexpr, wide: tl.constexpr):
    """(32 R, width), rows as the tensor cores take them: 16 of each warp, then 16 more of each.

    Inputs in their natural order, as mma.sync wants two pairs of a lane side by side; or `wide`,
    with t and u exchanged, as wgmma wants them.
    """
    if width == 128:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2, 2, 2)
        q = q.permute(3, 0, 4, 1, 9, 8, 7, 6 if wide else 2, 2 if wide else 6, 5)
    elif width == 64:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2, 2)
        q = q.permute(3, 0, 4, 1, 8, 7, 6 if wide else 2, 2 if wide else 6, 5)
    else:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2)
        q = q.permute(3, 0, 4, 1, 7, 6 if wide else 2, 2 if wide else 6, 5)
    return q.reshape(R * 32, width)


@triton.jit
def _rows(tile, R: tl.constexpr):
    """(32 R,) the output that each row of an operand is."""
    row = tl.arange(0, 32 * R)
    return tile * (32 * R) + row // 16 % R * 32 + row // (16 * R) * 16 + row % 16


@triton.jit
def _scaled(sums, scales):
    """Sums times their rows' scales. A lane holds the columns 8 j + 2 t + h of its rows."""
    rows: tl.constexpr = sums.shape[0]
    tokens: tl.constexpr = sums.shape[1]
    by_lane = sums.reshape(rows, tokens // 8, 4, 2) * scales[:, None, :, None]
    return by_lane.reshape(rows, tokens)


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
    wide: tl.constexpr,
    even: tl.constexpr,
    grouped: tl.constexpr,
):
    """Sums plus the products over inputs k to k + width, scaled unless one scale serves all."""
    w = _operand(q, R, width, wide)
    scales = _row_scales(row_ptr, panel, R) if grouped else 1.0  # on its way before the product is
    inputs = k + tl.arange(0, width)[:, None]
    valid = (t < T)[None, :]
    at = x_ptr + t.to(tl.int64)[None, :] * K + inputs
    x = tl.load(at, mask=valid if even else valid & (inputs < K), other=0.0)
    if grouped:
        return sums + _scaled(tl.dot(w, x), scales)
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
def _normed(
    sums, n, t, T, K, width, stats_ptr, level_ptr, eps, input_tiles, STATS_BLOCK: tl.constexpr
):
    """Products of what only has its norm's weights to those of the norm; see `norm_fold.py`."""
    tile = tl.arange(0, STATS_BLOCK)
    at = (tile[:, None] * T + t[None, :]) * 2
    there = (tile < input_tiles)[:, None] & (t < T)[None, :]
    mean = _total(tl.load(stats_ptr + at, mask=there, other=0.0)) / K
    square = _total(tl.load(stats_ptr + at + 1, mask=there, other=0.0)) / K
    scale = tl.rsqrt((square - mean * mean).to(tl.float32) + eps)
    level = tl.load(level_ptr + n, mask=n < width, other=0.0)
    return (sums - mean.to(tl.float32)[None, :] * level[:, None]) * scale[None, :]


@triton.jit
def _scale_for(norm_ptr, scaled_ptr, x, n, at, valid, width, number: tl.constexpr):
    weight = tl.load(norm_ptr + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + at, (x * weight[:, None]).to(number), mask=valid)


@triton.jit
def _give(
    sums,
    n,
    t,
    T,
    K,
    tile,
    width,
    stats_ptr,
    level_ptr,
    eps,
    input_tiles,
    bias_ptr,
    more_ptr,
    more_stride,
    out_ptr,
    out_stride,
    norm_ptr,
    second_norm_ptr,
    scaled_ptr,
    next_stats_ptr,
    number: tl.constexpr,
    act: tl.constexpr,
    arrange: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
):
    """Sums to results: normed, plus a bias, through the activation, plus what was there before.

    And, if a norm is to follow, what `_normed` will want.
    """
    valid = (t < T)[None, :] & (n < width)[:, None]
    if stats_ptr is not None:
        sums = _normed(sums, n, t, T, K, width, stats_ptr, level_ptr, eps, input_tiles, STATS_BLOCK)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    sums = activate(sums, act)
    if more_ptr is not None:
        at = t.to(tl.int64)[None, :] * more_stride + n[:, None]
        sums += tl.load(more_ptr + at, mask=valid, other=0.0).to(tl.float32)
    place = arranged(n) if arrange else n
    at = t.to(tl.int64)[None, :] * out_stride + place[:, None]
    rounded = sums.to(number)
    tl.store(out_ptr + at, rounded, mask=valid)
    if norm_ptr is not None:
        x = tl.where(valid, rounded.to(tl.float32), 0.0)
        at = t.to(tl.int64)[None, :] * width + n[:, None]
        _scale_for(norm_ptr, scaled_ptr, x, n, at, valid, width, number)
        if second_norm_ptr is not None:
            second = scaled_ptr + T.to(tl.int64) * width
            _scale_for(second_norm_ptr, second, x, n, at, valid, width, number)
        at = (tile * T + t) * 2
        tl.store(next_stats_ptr + at, _total(x).to(tl.float32), mask=t < T)
        tl.store(next_stats_ptr + at + 1, _total(x * x).to(tl.float32), mask=t < T)


@triton.jit
def _merged(n, t, T, N, splits, partial_ptr, at_once: tl.constexpr):
    """What the splits left, added from first to last, whichever came last."""
    at = t.to(tl.int64)[None, :] * N + n[:, None]
    valid = (t < T)[None, :]
    sums = tl.load(partial_ptr + at, mask=valid, other=0.0)
    # Several loads at a time, where registers allow: each would wait for the one before.
    for split in tl.range(1, splits, loop_unroll_factor=at_once):
        sums += tl.load(partial_ptr + split * (T.to(tl.int64) * N) + at, mask=valid, other=0.0)
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
        "second_from",
        "magic",
        "input_tiles",
    ]
)
def multiply(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    stats_ptr,
    level_ptr,
    bias_ptr,
    more_ptr,
    out_ptr,
    norm_ptr,
    second_norm_ptr,
    scaled_ptr,
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
    second_from,
    magic,
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
):
    """A tile of 32 R outputs by `tokens`, over one of several runs of the inputs.

    Programs: (tiles, splits, tiles of tokens). The last program of a tile to arrive adds up.

    What is not plain from the names:

    - x_ptr: (T, K), or (2, T, K): outputs from `second_from` on read the second.
    - stats_ptr: (input tiles, T, 2) float32 sums and sums of squares of what the inputs were before
      a norm's weights, and level_ptr: (N,) float32 products of those; or None.
    - bias_ptr: (N,), added before the activation; or None.
    - more_ptr: (T, out_width), rows more_stride apart, added after it; or None. May be out_ptr.
    - out_ptr: (T, out_width), rows out_stride apart.
    - norm_ptr, second_norm_ptr: (out_width,) weights of the norms that follow, or None; results
      times those go to scaled_ptr, (1 or 2, T, out_width), and their sums to next_stats_ptr.
    - partial_ptr: (all_splits, T, N) float32, if split.
    - arrivals_ptr: a zero for each tile, if split; zero again afterwards.
    - first_split, all_splits: where this launch's sums lie among those of the launches whose
      products are added. The last program to arrive may belong to any of them.
    - arrange: results are to be the inputs of a wide product.
    - lone: T is 1; what the splits left is added by all lanes, many loads at once.
    - groups: scales of a row in a cell: 1, 2 or 4; 0 where one scale serves all inputs.
    - even: K is a multiple of 128.
    """
    tile, split, block_T = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    panel = tile * R + tl.arange(0, R)[:, None]
    width: tl.constexpr = 128 // max(groups, 1)
    t = block_T * tokens + tl.arange(0, tokens)
    if tile * (32 * R) >= second_from:
        x_ptr += T.to(tl.int64) * K
    sums = tl.zeros((32 * R, tokens), tl.float32)
    for c in tl.range(chunks * split // splits, chunks * (split + 1) // splits, num_stages=stages):
        g = c // chunks_per_group * max(groups, 1)
        q = _chunk(
            words_ptr, zeros_ptr, panel, c, chunks, g, N, magic, bits, number, groups, sym, R
        )
        k = c * 128
        s = scales_ptr + g * N
        if groups < 2:
            sums = _add_group(
                sums, q, x_ptr, t, T, k, K, s, panel, R, width, wide, even, groups > 0
            )
        elif groups == 2:
            q0, q1 = tl.split(q)
            sums = _add_group(sums, q0, x_ptr, t, T, k, K, s, panel, R, 64, wide, even, True)
            k += 64
            s += N
            sums = _add_group(sums, q1, x_ptr, t, T, k, K, s, panel, R, 64, wide, even, True)
        else:
            low, high = tl.split(q)
            q0, q1 = tl.split(low)
            q2, q3 = tl.split(high)
            sums = _add_group(sums, q0, x_ptr, t, T, k, K, s, panel, R, 32, wide, even, True)
            k += 32
            s += N
            sums = _add_group(sums, q1, x_ptr, t, T, k, K, s, panel, R, 32, wide, even, True)
            k += 32
            s += N
            sums = _add_group(sums, q2, x_ptr, t, T, k, K, s, panel, R, 32, wide, even, True)
            k += 32
            s += N
            sums = _add_group(sums, q3, x_ptr, t, T, k, K, s, panel, R, 32, wide, even, True)
    if groups == 0:
        sums = _scaled(sums, _row_scales(scales_ptr, panel, R))
    n = _rows(tile, R)
    if split_up:
        left_ptr = partial_ptr + (first_split + split) * (T.to(tl.int64) * N)
        _leave(sums, n, t, T, N, left_ptr)
        # All lanes of this program have stored before one of them counts it.
        tl.debug_barrier()
        arrival = arrivals_ptr + block_T * tl.num_programs(0) + tile
        if tl.atomic_add(arrival, 1, sem="acq_rel") == all_splits - 1:
            tl.debug_barrier()
            # In their natural order neighbours are read, and written, by one lane.
            own_n = n if wide else tile * (32 * R) + tl.arange(0, 32 * R)
            own_t = tl.arange(0, 1) if lone else t
            at_once: tl.constexpr = 1 if wide else (16 if lone else 8)
            merged = _merged(own_n, own_t, T, N, all_splits, partial_ptr, at_once)
            _give(
                merged, own_n, own_t, T, K, tile, out_width,
                stats_ptr, level_ptr, eps, input_tiles,
                bias_ptr, more_ptr, more_stride, out_ptr, out_stride,
                norm_ptr, second_norm_ptr, scaled_ptr, next_stats_ptr,
                number, act, arrange, STATS_BLOCK,
            )  # fmt: skip
            tl.store(arrival, 0)
    else:
        _give(
            sums, n, t, T, K, tile, out_width,
            stats_ptr, level_ptr, eps, input_tiles,
            bias_ptr, more_ptr, more_stride, out_ptr, out_stride,
            norm_ptr, second_norm_ptr, scaled_ptr, next_stats_ptr,
            number, act, arrange, STATS_BLOCK,
        )  # fmt: skip


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
    """One group of a cell to rows of the dense matrix. A lane holds inputs 16 j + 4 t to + 3."""
    w = _operand(q, R, width, False).to(tl.float32).reshape(32 * R, width // 16, 4, 4)
    w = (w * _row_scales(row_ptr, panel, R)[:, None, :, None]).reshape(32 * R, width)
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
    q = _chunk(words_ptr, zeros_ptr, panel, c, chunks, g, N, magic, bits, number, groups, sym, R)
    row = _rows(tile - first_tile, R)
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
