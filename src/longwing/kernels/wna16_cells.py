# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Cells of streamed weights to the operands of tensor cores, in Triton; for `wna16_device.py`.

The layout, and the words cell, lane, pair and chunk, are `streamed.py`'s.

Shape key: N out features, R panels of 32 outputs in a tile (one a warp). Names of blocks: `q` whole
numbers, (R, 128 lanes and words, h, then the four bits of the pair); `w` the same as an operand,
(32 R, inputs); `sums` (32 R, tokens) float32.

The one idea: a pair of values becomes two 16-bit floats by one AND-XOR, which sets a power of two
above them as exponent, and one packed subtraction of that power and the zero point. The difference
is a small integer, exact; it is multiplied as such, and scales multiply the float32 sums of a
group. So no weight is rounded, and to unpack one costs 1.4 instructions at 4 bits. For few tokens
that is still too many, and `wna16_bytes.py` takes cells as bytes.

Every block is written so that what a lane loads is what its tensor core wants: reshapes, permutes
and joins below only rename registers. That is Triton's to find out, and it holds for 3.6 and 3.7;
where it does not, results stay right and weights take a detour through shared memory.
"""

import triton
import triton.language as tl


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

    Fields of a byte share a shift where the mantissa has room for several: the one at its bit b
    counts 2**b times as much, so its exponent is set b lower.
    """
    mantissa: tl.constexpr = 10 if number == tl.float16 else 7
    room: tl.constexpr = mantissa - bits - (0 if sym else 1)
    b: tl.constexpr = place % 8 if place % 8 <= room else 0
    middle: tl.constexpr = 1 << (bits - 1)
    mask: tl.constexpr = (((1 << bits) - 1) << b) * 0x10001
    turned: tl.constexpr = (middle << b) * 0x10001
    above: tl.constexpr = 1 << (mantissa - b)
    exponent = magic - (b << mantissa) * 0x10001
    values = (words >> (place - b)) & mask
    if sym:
        return _halves(values ^ (exponent + turned), number) - tl.full((), above + middle, number)
    else:
        # Half way up to the next power no zero point leads below: integers subtract it.
        half: tl.constexpr = (1 << (mantissa - 1)) * 0x10001
        pairs = (values ^ turned) + (exponent + half - (zeros << b))
        return _halves(pairs, number) - tl.full((), above + above // 2, number)


@triton.jit
def _byte(words, magic, zeros, place: tl.constexpr, number: tl.constexpr, sym: tl.constexpr):
    """`_field` for 8 bits. bfloat16 has 7 below its exponent: the eighth, the sign, is 2 * 64."""
    if number == tl.float16:
        return _field(words, magic, zeros, place, 8, number, sym)
    else:
        words = words >> place
        low = _halves((words & 0x7F007F) | magic, number)
        sign = _halves((words & 0x800080) << 7, number) * tl.full((), 64, number)
        signed = (low - tl.full((), 128, number)) - sign
        if sym:
            return signed
        else:
            return signed + (128 - (zeros & 0xFF)).to(tl.float32).to(number)[:, :, None]


@triton.jit
def _join4(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _four(
    words,
    others,
    magic,
    zeros,
    place: tl.constexpr,
    other_place: tl.constexpr,
    bits: tl.constexpr,
    number: tl.constexpr,
    sym: tl.constexpr,
):
    """The pairs a, u = 0 0, 0 1, 1 0, 1 1: those of u = 1 in `others`, those of a = 1 8 bits up."""
    return _join4(
        _field(words, magic, zeros, place, bits, number, sym),
        _field(others, magic, zeros, other_place, bits, number, sym),
        _field(words, magic, zeros, place + 8, bits, number, sym),
        _field(others, magic, zeros, other_place + 8, bits, number, sym),
    )


@triton.jit
def _four_bytes(words, others, magic, zeros, number: tl.constexpr, sym: tl.constexpr):
    return _join4(
        _byte(words, magic, zeros, 0, number, sym),
        _byte(others, magic, zeros, 0, number, sym),
        _byte(words, magic, zeros, 8, number, sym),
        _byte(others, magic, zeros, 8, number, sym),
    )


@triton.jit
def _numbers(
    at, magic, z0, z1, z2, z3, bits: tl.constexpr, number: tl.constexpr, sym: tl.constexpr
):
    """Read a cell for each panel, as `q`, from (R, 128) addresses of the first words.

    `magic` is the exponent of 128 (bfloat16) or 1024 (float16) in both halves; an argument, since
    AND-XOR with two constants in the code is two instructions. z0 to z3 are the zero points of the
    quarters of a cell's inputs, in both halves.
    """
    w0 = tl.load(at)
    w1 = tl.load(at + 128)
    if bits == 2:
        q0 = _four(w0, w0, magic, z0, 0, 2, 2, number, sym)
        q1 = _four(w0, w0, magic, z1, 4, 6, 2, number, sym)
        q2 = _four(w1, w1, magic, z2, 0, 2, 2, number, sym)
        q3 = _four(w1, w1, magic, z3, 4, 6, 2, number, sym)
    elif bits == 3:
        w2 = tl.load(at + 256)
        spare = (w0 & 0x03030303) << 1 | w1 & 0x01010101
        other = (w2 & 0x03030303) << 1 | (w1 >> 1) & 0x01010101
        q0 = _four(w0, w0, magic, z0, 2, 5, 3, number, sym)
        q1 = _four(w1, w1, magic, z1, 2, 5, 3, number, sym)
        q2 = _four(w2, w2, magic, z2, 2, 5, 3, number, sym)
        q3 = _four(spare, other, magic, z3, 0, 0, 3, number, sym)
    elif bits == 4:
        w2 = tl.load(at + 256)
        w3 = tl.load(at + 384)
        q0 = _four(w0, w0, magic, z0, 0, 4, 4, number, sym)
        q1 = _four(w1, w1, magic, z1, 0, 4, 4, number, sym)
        q2 = _four(w2, w2, magic, z2, 0, 4, 4, number, sym)
        q3 = _four(w3, w3, magic, z3, 0, 4, 4, number, sym)
    else:
        q0 = _four_bytes(w0, w1, magic, z0, number, sym)
        q1 = _four_bytes(tl.load(at + 256), tl.load(at + 384), magic, z1, number, sym)
        q2 = _four_bytes(tl.load(at + 512), tl.load(at + 640), magic, z2, number, sym)
        q3 = _four_bytes(tl.load(at + 768), tl.load(at + 896), magic, z3, number, sym)
    return _join4(q0, q1, q2, q3)


@triton.jit
def row_scales(row_ptr, panel, R: tl.constexpr):
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
def read_cells(
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
def as_operand(q, R: tl.constexpr, width: tl.constexpr, wide: tl.constexpr):
    """(32 R, width), rows as the tensor cores take them: 16 of each warp, then 16 more of each.

    Inputs in their natural order, or `wide`: as wgmma wants them (`fused_device.arranged`).
    """
    # Axes: R, g, t, two of the row, h, u, a, and of s as many as there are.
    if width == 128:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2, 2, 2)
        if wide:
            q = q.permute(3, 0, 4, 1, 9, 8, 6, 7, 2, 5)
        else:
            q = q.permute(3, 0, 4, 1, 9, 8, 2, 6, 5, 7)
    elif width == 64:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2, 2)
        if wide:  # noqa: SIM108
            q = q.permute(3, 0, 4, 1, 8, 6, 7, 2, 5)
        else:
            q = q.permute(3, 0, 4, 1, 8, 2, 6, 5, 7)
    else:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2)
        if wide:  # noqa: SIM108
            q = q.permute(3, 0, 4, 1, 6, 7, 2, 5)
        else:
            q = q.permute(3, 0, 4, 1, 2, 6, 5, 7)
    return q.reshape(R * 32, width)


@triton.jit
def operand_rows(tile, R: tl.constexpr):
    """(32 R,) the output that each row of an operand is."""
    row = tl.arange(0, 32 * R)
    return tile * (32 * R) + row // 16 % R * 32 + row // (16 * R) * 16 + row % 16


@triton.jit
def scaled_rows(sums, scales):
    """Sums times their rows' scales. A lane holds the columns 8 j + 2 t + h of its rows."""
    rows: tl.constexpr = sums.shape[0]
    tokens: tl.constexpr = sums.shape[1]
    by_lane = sums.reshape(rows, tokens // 8, 4, 2) * scales[:, None, :, None]
    return by_lane.reshape(rows, tokens)
