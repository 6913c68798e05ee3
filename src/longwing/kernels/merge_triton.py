"""The Triton kernel that adds up what several programs made of one tile's keys.

`attend_triton.py` leaves the shares in scratch memory; `paged_triton.py` says when there are any.

Shape key, on blocks: R rows of a tile (`tile_device.py`), X splits of its keys, H head dim, padded
to a power of two.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from longwing.kernels.digits_device import leave_digits
from longwing.kernels.tile_device import place, places


@triton.jit(
    do_not_specialize=["num_sequences", "tiles_each", "out_token_stride", "num_splits", "T"]
)
def merge_splits(
    out_ptr,
    digits_ptr,
    steps_ptr,
    scratch_ptr,
    starts_ptr,
    context_lens_ptr,
    num_sequences,
    tiles_each,
    out_token_stride,
    num_splits,
    T,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    ARRANGE: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
):
    """Some rows of a tile: the splits' sums, brought to one peak and added, over their totals.

    With digits_ptr a sequence has one new token, its rows are whole blocks of 128 numbers, and they
    go to `Digits` of T tokens, too.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    _, first_token, _, num_rows, first_row = place(
        tile, starts_ptr, context_lens_ptr, num_sequences, tiles_each, GROUP, ROWS
    )
    row_in_tile_R = tl.program_id(2) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    row_R = first_row + row_in_tile_R
    if EARLY:
        gdc.gdc_wait()
    split_X = tl.arange(0, SPLITS)
    head_dim_H = tl.arange(0, HEAD_BLOCK)
    num_programs = tl.num_programs(0) * K * num_splits
    first_in_scratch_X = ((tile * K + kv_head) * num_splits + split_X) * ROWS
    in_scratch_XR = first_in_scratch_X[:, None] + row_in_tile_R[None, :]
    there_XR = (split_X < num_splits)[:, None] & (row_R < num_rows)[None, :]
    totals_ptr = scratch_ptr + num_programs.to(tl.int64) * ROWS * HEAD_DIM
    peaks_ptr = totals_ptr + num_programs * ROWS
    total_XR = tl.load(totals_ptr + in_scratch_XR, mask=there_XR, other=0.0)
    peak_XR = tl.load(peaks_ptr + in_scratch_XR, mask=there_XR, other=float("-inf"))
    sums_ptrs = scratch_ptr + in_scratch_XR.to(tl.int64)[:, :, None] * HEAD_DIM
    there_XRH = there_XR[:, :, None] & (head_dim_H < HEAD_DIM)[None, None, :]
    sum_XRH = tl.load(sums_ptrs + head_dim_H[None, None, :], mask=there_XRH, other=0.0)
    # A split whose keys were all hidden from a row has peak -inf, and so a share of 0.
    is_row_R = row_R < num_rows
    peak_R = tl.where(is_row_R, tl.max(peak_XR, 0), 0.0)
    share_XR = tl.exp2(peak_XR - peak_R[None, :])
    total_R = tl.where(is_row_R, tl.sum(total_XR * share_XR, 0), 1.0)
    out_RH = tl.sum(sum_XRH * share_XR[:, :, None], 0) / total_R[:, None]
    out_offset_R = (first_token + row_R // GROUP).to(tl.int64) * out_token_stride
    head_R = kv_head * GROUP + row_R % GROUP
    place_RH = places(head_R, head_dim_H, HEAD_DIM, ARRANGE)
    out_ptrs = out_ptr + out_offset_R[:, None] + place_RH
    there_RH = is_row_R[:, None] & (head_dim_H < HEAD_DIM)[None, :]
    rounded_RH = out_RH.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, rounded_RH, mask=there_RH)
    if digits_ptr is not None:
        blocks: tl.constexpr = MERGED_ROWS * HEAD_DIM // 128
        x = tl.where(there_RH, rounded_RH.to(tl.float32), 0.0).reshape(blocks, 128)
        last_B = tl.max(tl.where(there_RH, place_RH, -1).reshape(blocks, 128), axis=1)
        token_B = tl.zeros((blocks,), tl.int32) + first_token
        num_blocks = tl.cdiv(K * GROUP * HEAD_DIM, 128)
        leave_digits(x, last_B // 128, token_B, last_B >= 0, T, num_blocks, digits_ptr, steps_ptr)
