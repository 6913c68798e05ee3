# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Numbers to the digits of `digits.py`, in Triton: whoever makes activations leaves them so.

Shape key: T tokens, K features, C blocks of 128, B blocks at work on at once.
"""

import triton
import triton.language as tl


@triton.jit
def leave_digits(x, block_B, token_B, there_B, T, chunks, digits_ptr, steps_ptr):
    """Leave (B, 128) float32 numbers, 0 where padded, as blocks of tokens.

    Numbers that are no numbers, or infinite, make the block's step NaN, and so what is made of it.

    - block_B, token_B: which block of which token each row is; there_B: whether it is any.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent_B = tl.max(bits, axis=1) & 0x7F800000
    # So far from 0 that neither this nor its inverse leaves the normal numbers.
    step_B = tl.maximum(exponent_B, 30 << 23) - (21 << 23)
    inverse_B = ((254 << 23) - step_B).to(tl.float32, bitcast=True)
    step_B = tl.where(exponent_B == 0x7F800000, 0x7FC00000, step_B)
    # Added to 1.5 * 2**23, a number is rounded to a whole one, to even where it is half way.
    whole = (x * inverse_B[:, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    row_B = (token_B.to(tl.int64) * chunks + block_B) * 128
    to = digits_ptr + row_B[:, None] + tl.arange(0, 128)[None, :]
    stride = T.to(tl.int64) * chunks * 128
    there = tl.broadcast_to(there_B[:, None], whole.shape)
    for digit in tl.static_range(3):
        tl.store(to + digit * stride, whole.to(tl.int8), mask=there)
        whole = (whole + 128) >> 8
    step_at = steps_ptr + block_B * T + token_B
    tl.store(step_at, step_B.to(tl.float32, bitcast=True), mask=there_B)


@triton.jit(do_not_specialize=["T", "chunks", "x_stride"])
def make_digits(
    x_ptr,
    order_ptr,
    digits_ptr,
    steps_ptr,
    T,
    K,
    chunks,
    x_stride,
    BLOCKS: tl.constexpr,
):
    """Some blocks of a token. Programs: (runs of BLOCKS blocks, tokens).

    - order_ptr: (K,) which input of x comes where; or None.
    """
    token = tl.program_id(1)
    block_B = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block_B[:, None] * 128 + tl.arange(0, 128)[None, :]
    valid = at < K
    if order_ptr is not None:  # noqa: SIM108
        source = tl.load(order_ptr + at, mask=valid, other=0)
    else:
        source = at
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + source, mask=valid, other=0.0)
    token_B = token + tl.zeros((BLOCKS,), tl.int32)
    leave_digits(
        x.to(tl.float32), block_B, token_B, block_B < chunks, T, chunks, digits_ptr, steps_ptr
    )
