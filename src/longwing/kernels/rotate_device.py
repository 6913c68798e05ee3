# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rotation and the write to the pages inside attention, of the one token that decoding brings.

The meaning is `attention.rotate` and `pages.write_kv`, bit for bit in launches whose products and
sums are not fused. Steps of many tokens have a launch of their own for it, in `write_triton.py`.

Shape key: R vectors, each one head of one token; H head dim, padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def load_turned(
    vector_ptrs, there_RH, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr
):
    """Vectors of one token, turned in float32 and rounded back; without cos_ptr as they are.

    - vector_ptrs: where each begins, (R, 1); or of one, and then there is no R anywhere.
    - there_RH: which of their numbers there are.
    - cos_ptr, sin_ptr: the token's own, H / 2 of each.
    """
    head_dim_H = tl.arange(0, HEAD_BLOCK)
    x_RH = tl.load(vector_ptrs + head_dim_H, mask=there_RH, other=0.0)
    if cos_ptr is not None:
        # Partners lie in the lines just read: cheaper than to move numbers between threads.
        half: tl.constexpr = HEAD_DIM // 2
        partner_ptrs = vector_ptrs + (head_dim_H + half) % HEAD_DIM
        partner_RH = tl.load(partner_ptrs, mask=there_RH, other=0.0)
        cos_H = tl.load(cos_ptr + head_dim_H % half)
        sin_H = tl.load(sin_ptr + head_dim_H % half)
        sin_H = tl.where(head_dim_H < half, -sin_H, sin_H)
        turned_RH = x_RH.to(tl.float32) * cos_H + partner_RH.to(tl.float32) * sin_H
        x_RH = turned_RH.to(x_RH.dtype)
    return x_RH


@triton.jit
def write_token(
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    slot,
    keys_ptr,
    values_ptr,
    writes,
    PAGE_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE_LEN: tl.constexpr,
):
    """One head's key, turned, and its value to their slot, if this program writes and there is one.

    All threads of the program find them there: loads after this see what was stored, though the
    copy engine's may not.
    """
    head_dim_H = tl.arange(0, HEAD_BLOCK)
    writes_H = (head_dim_H < HEAD_DIM) & writes
    k_H = load_turned(k_ptr, writes_H, cos_ptr, sin_ptr, HEAD_DIM, HEAD_BLOCK)
    v_H = tl.load(v_ptr + head_dim_H, mask=writes_H, other=0.0)
    writes_H &= slot >= 0
    cell_H = slot // PAGE_LEN * PAGE_STRIDE + slot % PAGE_LEN * SLOT_STRIDE + head_dim_H
    tl.store(keys_ptr + cell_H, k_H.to(keys_ptr.dtype.element_ty), mask=writes_H)
    tl.store(values_ptr + cell_H, v_H.to(values_ptr.dtype.element_ty), mask=writes_H)
    tl.debug_barrier()
