# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sums over cells of streamed weights by 8-bit tensor cores, in Triton; for `wna16_device.py`.

Activations are the digits of `digits.py`; the layout of weights is `streamed.py`'s.

Shape key: T tokens, K in features, N out features, R panels of 32 outputs in a tile (one a warp).
Names of blocks: `q` bytes, (R, 128 lanes and words, byte 2 h + a as two axes, then u and s as
three); `w` the same as an operand, (32 R, inputs).

The one idea: for a few tokens a GPU has to unpack a weight for each product it makes, so what sets
the pace is instructions. Four signed bytes of a register are made by one AND, and a shift where
they do not lie at the top of their bytes, all times 2**(8 - bits): 0.4 instructions a weight at 4
bits, where 16-bit numbers need 1.4. The products are whole numbers, and exact.
"""

import triton
import triton.language as tl

from longwing.kernels.wna16_cells import row_scales, scaled_rows

WHOLE = tl.constexpr(0x4B400000)
"""12582912 as a float32, 1.5 * 2**23: whole numbers under 2**22 added to its bits are added to it.

A product of 128 digits and weights is below that, so this turns it into a float by a subtraction.
"""


@triton.jit
def _bytes(words):
    """(R, 128) words to their bytes, (R, 128, 2, 2), the lowest bit of the byte's number last."""
    b0 = words.to(tl.int8)
    b1 = (words >> 8).to(tl.int8)
    b2 = (words >> 16).to(tl.int8)
    b3 = (words >> 24).to(tl.int8)
    return tl.join(tl.join(b0, b2), tl.join(b1, b3))


@triton.jit
def _signed_bytes(words, up, mask: tl.constexpr):
    """The fields that come to the top of their bytes when the words are multiplied by `up`."""
    return _bytes((words * up) & mask)


@triton.jit
def _join8(b0, b1, b2, b3, b4, b5, b6, b7):
    """By 2 s + u, as axes u, then s."""
    return tl.join(
        tl.join(tl.join(b0, b1), tl.join(b2, b3)), tl.join(tl.join(b4, b5), tl.join(b6, b7))
    )


@triton.jit
def _read_bytes(at, two, bits: tl.constexpr):
    """Read a cell for each panel, as `q`, from (R, 128) addresses of the first words.

    `two` is 2, an argument: a shift, or a product by what the compiler knows, it takes apart into
    its four bytes, and puts together by a dozen instructions.
    """
    if bits == 2:
        w0 = tl.load(at)
        w1 = tl.load(at + 128)
        mask2: tl.constexpr = -0x3F3F3F40
        up2 = two * two
        up4 = up2 * up2
        up6 = up4 * up2
        return _join8(
            _signed_bytes(w0, up6, mask2),
            _signed_bytes(w0, up4, mask2),
            _signed_bytes(w0, up2, mask2),
            _bytes(w0 & mask2),
            _signed_bytes(w1, up6, mask2),
            _signed_bytes(w1, up4, mask2),
            _signed_bytes(w1, up2, mask2),
            _bytes(w1 & mask2),
        )
    elif bits == 3:
        w0 = tl.load(at)
        w1 = tl.load(at + 128)
        w2 = tl.load(at + 256)
        mask3: tl.constexpr = -0x1F1F1F20
        upper: tl.constexpr = -0x3F3F3F40
        lowest: tl.constexpr = 0x20202020
        up3 = two * two * two
        up4 = up3 * two
        up5 = up4 * two
        up6 = up5 * two
        return _join8(
            _signed_bytes(w0, up3, mask3),
            _bytes(w0 & mask3),
            _signed_bytes(w1, up3, mask3),
            _bytes(w1 & mask3),
            _signed_bytes(w2, up3, mask3),
            _bytes(w2 & mask3),
            _bytes(((w0 * up6) & upper) | ((w1 * up5) & lowest)),
            _bytes(((w2 * up6) & upper) | ((w1 * up4) & lowest)),
        )
    elif bits == 4:
        w0 = tl.load(at)
        w1 = tl.load(at + 128)
        w2 = tl.load(at + 256)
        w3 = tl.load(at + 384)
        mask4: tl.constexpr = -0x0F0F0F10
        up = two * two * two * two
        return _join8(
            _signed_bytes(w0, up, mask4),
            _bytes(w0 & mask4),
            _signed_bytes(w1, up, mask4),
            _bytes(w1 & mask4),
            _signed_bytes(w2, up, mask4),
            _bytes(w2 & mask4),
            _signed_bytes(w3, up, mask4),
            _bytes(w3 & mask4),
        )
    else:
        return _join8(
            _bytes(tl.load(at)),
            _bytes(tl.load(at + 128)),
            _bytes(tl.load(at + 256)),
            _bytes(tl.load(at + 384)),
            _bytes(tl.load(at + 512)),
            _bytes(tl.load(at + 640)),
            _bytes(tl.load(at + 768)),
            _bytes(tl.load(at + 896)),
        )


@triton.jit
def _as_operand(q, R: tl.constexpr, width: tl.constexpr):
    """(32 R, width), rows as `wna16_cells.operand_rows` has them, inputs in their order."""
    if width == 128:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2, 2, 2).permute(3, 0, 4, 1, 9, 8, 2, 7, 5, 6)
    else:
        q = q.reshape(R, 8, 4, 2, 2, 2, 2, 2, 2).permute(3, 0, 4, 1, 8, 2, 7, 5, 6)
    return q.reshape(R * 32, width)


@triton.jit
def _row_zeros(row_ptr, panel, bits: tl.constexpr, R: tl.constexpr):
    """(32 R, 4) zero points, less the middle and as far up as bytes are, as `row_scales` lie."""
    at = row_ptr + panel[:, :, None] * 8 + tl.arange(0, 8)[None, :, None]
    four = tl.load(tl.broadcast_to(at, (R, 8, 4)))
    even = tl.join(four & 0xFF, (four >> 16) & 0xFF)
    odd = tl.join((four >> 8) & 0xFF, (four >> 24) & 0xFF)
    zeros = tl.join(even, odd).reshape(R, 8, 4, 2, 2).permute(3, 0, 4, 1, 2)
    return (zeros.reshape(R * 32, 4) - (1 << (bits - 1))) * (1 << (8 - bits))


@triton.jit
def _products(w, x, zeros, sym: tl.constexpr):
    """(32 R, 8) float32, exact: products of bytes and digits."""
    whole = tl.dot(w, x, tl.full((w.shape[0], 8), WHOLE, tl.int32), out_dtype=tl.int32)
    if not sym:
        # Sums of the digits, which tensor cores make faster than they would be read.
        ones = tl.full(w.shape, 1, tl.int8)
        whole -= scaled_rows(tl.dot(ones, x, out_dtype=tl.int32), zeros)
    return whole.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _add_group(
    sums,
    q,
    x_ptr,
    there,
    digit_stride,
    columns,
    scales_ptr,
    zeros_ptr,
    panel,
    R: tl.constexpr,
    width: tl.constexpr,
    bits: tl.constexpr,
    sym: tl.constexpr,
    grouped: tl.constexpr,
    few: tl.constexpr,
):
    """Sums of each digit plus the products over `width` inputs, scaled."""
    w = _as_operand(q, R, width)
    scales = tl.broadcast_to(columns[None, :], (32 * R, 8))
    if grouped:
        scales = scaled_rows(scales, row_scales(scales_ptr, panel, R))
    zeros = 0
    if not sym:
        zeros = _row_zeros(zeros_ptr, panel, bits, R)
    s0, s1, s2 = sums
    s0 += _products(w, tl.load(x_ptr, mask=there, other=0), zeros, sym) * scales
    if not few:
        x = tl.load(x_ptr + digit_stride, mask=there, other=0)
        s1 += _products(w, x, zeros, sym) * scales
        x = tl.load(x_ptr + 2 * digit_stride, mask=there, other=0)
        s2 += _products(w, x, zeros, sym) * scales
    return s0, s1, s2


@triton.jit
def sum_by_bytes(
    digits_ptr,
    steps_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    panel,
    block_T,
    T,
    N,
    begin,
    end,
    chunks,
    chunks_per_group,
    two,
    bits: tl.constexpr,
    groups: tl.constexpr,
    sym: tl.constexpr,
    R: tl.constexpr,
    tokens: tl.constexpr,
    stages: tl.constexpr,
):
    """(32 R, tokens) float32 sums over the chunks from begin to end, for 2 or 8 tokens.

    The eight columns of a product are the digits of two tokens, or one digit of eight. Every digit
    has sums of its own until the end, so either way they are the same to the last bit.

    - digits_ptr, steps_ptr: `Digits`, (3, T, 128 chunks) and (chunks, T).
    - groups: scales of a row in a cell: 1 or 2; 0 where one scale serves all inputs.
    """
    tl.static_assert(groups < 3, "a group must have 64 inputs")
    few: tl.constexpr = tokens == 2
    grouped: tl.constexpr = groups > 0
    width: tl.constexpr = 128 // max(groups, 1)
    column = tl.arange(0, 8)
    if few:
        t, digit = block_T * 2 + column // 4, column % 4
        valid = (t < T) & (digit < 3)
        row = digit * T + t
    else:
        t = block_T * 8 + column
        valid = t < T
        row = t
    there = valid[None, :]
    digit_stride = T.to(tl.int64) * chunks * 128
    x_ptr = digits_ptr + row.to(tl.int64)[None, :] * chunks * 128 + tl.arange(0, width)[:, None]
    s0 = tl.zeros((32 * R, 8), tl.float32)
    s1 = tl.zeros((32 * R, 8), tl.float32)
    s2 = tl.zeros((32 * R, 8), tl.float32)
    for c in tl.range(begin, end, num_stages=stages):
        g = c // chunks_per_group * max(groups, 1)
        at = words_ptr + (panel.to(tl.int64) * chunks + c) * (bits * 128)
        q = _read_bytes(at + tl.arange(0, 128)[None, :], two, bits)
        # As a row of eight, which is fetched ahead as such: by lane it would take a third longer.
        columns = tl.load(steps_ptr + c * T + t, mask=valid, other=0.0)
        x = x_ptr + c * 128
        s = scales_ptr + g * N
        z = zeros_ptr + g * (N // 4)
        sums = s0, s1, s2
        if groups < 2:
            sums = _add_group(
                sums, q, x, there, digit_stride, columns, s, z, panel,
                R, width, bits, sym, grouped, few,
            )  # fmt: skip
        else:
            q0, q1 = tl.split(q)
            sums = _add_group(
                sums, q0, x, there, digit_stride, columns, s, z, panel,
                R, width, bits, sym, grouped, few,
            )  # fmt: skip
            sums = _add_group(
                sums, q1, x + 64, there, digit_stride, columns, s + N, z + N // 4, panel,
                R, width, bits, sym, grouped, few,
            )  # fmt: skip
        s0, s1, s2 = sums
    if not grouped:
        scales = row_scales(scales_ptr, panel, R)
        s0, s1, s2 = scaled_rows(s0, scales), scaled_rows(s1, scales), scaled_rows(s2, scales)
    if few:
        low, high = tl.split(s0.reshape(32 * R, 2, 2, 2))
        s0, s2 = tl.split(low)
        s1, _ = tl.split(high)
    return ((s0 + s1 * 256.0) + s2 * 65536.0) * (2.0 ** (bits - 8))
