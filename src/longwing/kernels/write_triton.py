"""Rotation and the write to the pages as one Triton launch, before attention, on a GPU.

Not where a step only decodes: there attention does both itself (`rotate_device.py`).

The meaning is `attention.rotate` and `pages.write_kv`, bit for bit, 8-bit integers and scales
included. Attention itself is in `paged_triton.py`.

Shape key: T packed new tokens, N query heads, K KV heads, H head dim, F rotary frequencies (H / 2).
Inside kernels, on blocks: R rows, each one head of one token; F padded to a power of two.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc

from longwing.errors import RequestError
from longwing.kernels.launch import starts_early, take_all_shared
from longwing.kernels.pages import KVPages

ROWS = 16
"""Heads that one program takes: 16 rows of 64 numbers are 8 a thread."""

FEW = 64
"""Tokens up to which an early start pays; the wait costs a long launch a quarter of its speed."""

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
"""The least scale, so that a vector of zeros can be divided by it."""

TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added to a small float32 and taken off again, it leaves the nearest integer, ties to even."""


def rotate_and_write(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_TF: Tensor | None,
    sin_TF: Tensor | None,
    pages: KVPages,
    slots_T: Tensor,
) -> Tensor:
    """Rotate q and k, and store k and v in their slots; (T, N, H), the rotated q.

    Without cos and sin nothing is turned and q itself is returned. Reads and writes each number
    once; q, k and v may be parts of one projection (last dimension contiguous). A token whose slot
    is negative is stored nowhere: it only fills a batch up.

    Raises:
        RequestError: a head has an odd number of numbers.
    """
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    if H % 2:
        raise RequestError(f"a head of {H} numbers has no pairs to rotate; H must be even")
    rotated_TNH = q_TNH
    num_query_blocks = 0
    if cos_TF is not None:
        rotated_TNH = torch.empty((T, N, H), dtype=q_TNH.dtype, device=q_TNH.device)
        num_query_blocks = triton.cdiv(N, ROWS)
    if T == 0:
        return rotated_TNH
    early = T <= FEW and starts_early(q_TNH.device)
    kernel = _rotate_and_write_heads[(T, num_query_blocks + 2 * triton.cdiv(K, ROWS))](
        q_TNH,
        rotated_TNH,
        k_TKH,
        v_TKH,
        cos_TF,
        sin_TF,
        pages.keys_PBKH,
        pages.values_PBKH,
        pages.key_scales_PBK,
        pages.value_scales_PBK,
        slots_T,
        num_query_blocks,
        q_TNH.stride(0),
        q_TNH.stride(1),
        k_TKH.stride(0),
        k_TKH.stride(1),
        v_TKH.stride(0),
        v_TKH.stride(1),
        *pages.keys_PBKH.stride()[:3],
        N=N,
        K=K,
        HALF=H // 2,
        HALF_BLOCK=triton.next_power_of_2(H // 2),
        PAGE_LEN=pages.page_len,
        ROWS=ROWS,
        EARLY=early,
        num_warps=4,
        launch_pdl=early,
        # A fused multiply-add would round once where the reference rounds twice.
        enable_fp_fusion=False,
    )
    take_all_shared(kernel)
    return rotated_TNH


@triton.jit
def _rotate_and_write_heads(
    q_ptr,
    rotated_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    num_query_blocks,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some heads of a token: queries turned, or keys turned and stored, or values stored."""
    if EARLY:
        gdc.gdc_wait()
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair_F = tl.arange(0, HALF_BLOCK)
    is_pair_F = pair_F < HALF
    cos_F, sin_F = None, None
    if cos_ptr is not None:
        cos_F = tl.load(cos_ptr + token * HALF + pair_F, mask=is_pair_F, other=0.0)
        sin_F = tl.load(sin_ptr + token * HALF + pair_F, mask=is_pair_F, other=0.0)
    if block < num_query_blocks:
        head_R = block * ROWS + tl.arange(0, ROWS)
        there_RF = (head_R < N)[:, None] & is_pair_F[None, :]
        first_RF, second_RF = _load_turned(
            q_ptr + token * q_token_stride, head_R, q_head_stride, there_RF, cos_F, sin_F, HALF
        )
        to_ptrs = rotated_ptr + (token * N + head_R)[:, None] * (2 * HALF) + pair_F[None, :]
        tl.store(to_ptrs, first_RF, mask=there_RF)
        tl.store(to_ptrs + HALF, second_RF, mask=there_RF)
        return
    block -= num_query_blocks
    num_key_blocks = tl.cdiv(K, ROWS)
    head_R = block % num_key_blocks * ROWS + tl.arange(0, ROWS)
    there_RF = (head_R < K)[:, None] & is_pair_F[None, :]
    slot = tl.load(slots_ptr + token).to(tl.int64)
    there_RF &= slot >= 0
    cell = slot // PAGE_LEN * page_stride + slot % PAGE_LEN * slot_stride
    cell_RF = cell + (head_R * head_stride)[:, None] + pair_F[None, :]
    vector_R = slot * K + head_R
    if block < num_key_blocks:
        first_RF, second_RF = _load_turned(
            k_ptr + token * k_token_stride, head_R, k_head_stride, there_RF, cos_F, sin_F, HALF
        )
        _store(first_RF, second_RF, keys_ptr, key_scales_ptr, cell_RF, vector_R, there_RF, HALF)
    else:
        first_RF, second_RF = _load_turned(
            v_ptr + token * v_token_stride, head_R, v_head_stride, there_RF, None, None, HALF
        )
        _store(first_RF, second_RF, values_ptr, value_scales_ptr, cell_RF, vector_R, there_RF, HALF)


@triton.jit
def _load_turned(x_ptr, head_R, head_stride, there_RF, cos_F, sin_F, HALF: tl.constexpr):
    """Both halves of some heads, rotated in float32 and rounded back to their own type."""
    pair_F = tl.arange(0, there_RF.shape[1])
    ptrs = x_ptr + (head_R * head_stride)[:, None] + pair_F[None, :]
    first_RF = tl.load(ptrs, mask=there_RF, other=0.0)
    second_RF = tl.load(ptrs + HALF, mask=there_RF, other=0.0)
    if cos_F is not None:
        dtype = first_RF.dtype
        first, second = first_RF.to(tl.float32), second_RF.to(tl.float32)
        first_RF = (first * cos_F[None, :] - second * sin_F[None, :]).to(dtype)
        second_RF = (second * cos_F[None, :] + first * sin_F[None, :]).to(dtype)
    return first_RF, second_RF


@triton.jit
def _store(
    first_RF,
    second_RF,
    numbers_ptr,
    scales_ptr,
    cell_RF,
    vector_R,
    there_RF,
    HALF: tl.constexpr,
):
    """Vectors to their cells: as they are, or as integers with a scale each."""
    if scales_ptr is not None:
        first_RF, second_RF = first_RF.to(tl.float32), second_RF.to(tl.float32)
        largest_R = tl.max(tl.maximum(tl.abs(first_RF), tl.abs(second_RF)), 1)
        scale_R = tl.maximum(tl.div_rn(largest_R, 127.0), TINY)
        is_head_R = tl.max(there_RF.to(tl.int32), 1) > 0
        tl.store(scales_ptr + vector_R, scale_R, mask=is_head_R)
        first_RF = _integers(first_RF, scale_R)
        second_RF = _integers(second_RF, scale_R)
    dtype = numbers_ptr.dtype.element_ty
    tl.store(numbers_ptr + cell_RF, first_RF.to(dtype), mask=there_RF)
    tl.store(numbers_ptr + cell_RF + HALF, second_RF.to(dtype), mask=there_RF)


@triton.jit
def _integers(x_RF, scale_R):
    nearest_RF = (tl.div_rn(x_RF, scale_R[:, None] + tl.zeros_like(x_RF)) + TO_INTEGER) - TO_INTEGER
    return tl.minimum(tl.maximum(nearest_RF, -127.0), 127.0)
