"""The Triton kernel of attention over pages; `paged_triton.py` says what it is for and when.

`attend_tile` takes one tile of query rows over a share of its keys; shares are added up by
`merge_triton.py`. Where each sequence brings one token, it can rotate and write what that brings.

Shape key, on blocks: R rows of a tile (`tile_device.py`), C keys of a block, H head dim, padded to
a power of two.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from longwing.kernels.rotate_device import load_turned, write_token
from longwing.kernels.tile_device import place, places

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp2 is one instruction and exp is two, so scores carry this factor."""


@triton.jit(do_not_specialize=["num_sequences", "tiles_each", "out_token_stride", "table_stride"])
def attend_tile(
    q_ptr,
    out_ptr,
    scratch_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slopes_ptr,
    starts_ptr,
    context_lens_ptr,
    page_tables_ptr,
    num_sequences,
    tiles_each,
    scale,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    table_stride,
    PAGE_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    ARRANGE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    BULK: tl.constexpr,
    new_k_ptr=None,
    new_v_ptr=None,
    cos_ptr=None,
    sin_ptr=None,
    slots_ptr=None,
    cached_keys_ptr=None,
    cached_values_ptr=None,
    new_k_token_stride=None,
    new_k_head_stride=None,
    new_v_token_stride=None,
    new_v_head_stride=None,
):
    """One tile of rows, one KV head, one share of the keys that the tile sees.

    ARRANGE: what comes out is to be multiplied for many tokens (`fused_device.arranged`).

    With new_k_ptr no sequence brings more than one token, and what it brings is as the projection
    left it. Each program then turns its own rows. Those of the last share, which holds the new key,
    each write the same key and value before they read them: no program waits for another.
    """
    # Late tokens see most: begin with them, so that no long program starts when others have ended.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split, num_splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    s, first_token, num_before, num_rows, first_row = place(
        tile, starts_ptr, context_lens_ptr, num_sequences, tiles_each, GROUP, ROWS
    )
    if first_row >= num_rows:
        if EARLY:  # A launch that ends before the one before it would let the next begin too soon.
            gdc.gdc_wait()
        return
    row_R = first_row + tl.arange(0, ROWS)
    token_R, head_R = row_R // GROUP, kv_head * GROUP + row_R % GROUP
    position_R = num_before + token_R
    first_position = num_before + first_row // GROUP
    last_position = num_before + (tl.minimum(first_row + ROWS, num_rows) - 1) // GROUP
    first_block = 0
    if WINDOW > 0:
        first_block = tl.maximum(first_position - WINDOW + 1, 0) // KEYS
    num_blocks = tl.cdiv(last_position + 1, KEYS) - first_block
    begin = (first_block + num_blocks * split // num_splits) * KEYS
    end = (first_block + num_blocks * (split + 1) // num_splits) * KEYS
    # Keys in [begin, whole_from) and [whole_to, end) are hidden from some row; between, from none.
    whole_from = begin
    if WINDOW > 0:
        inside = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), KEYS) * KEYS
        whole_from = tl.minimum(tl.maximum(begin, inside), end)
    whole_to = (first_position + 1) // KEYS * KEYS
    if BULK and new_k_ptr is not None:  # The block just written is for threads to read.
        whole_to = first_position // KEYS * KEYS
    whole_to = tl.minimum(tl.maximum(whole_to, whole_from), end)

    table_ptr = page_tables_ptr + s.to(tl.int64) * table_stride
    first_pages = (
        _pages(table_ptr, begin, whole_from, PAGE_LEN, KEYS),
        _pages(table_ptr, whole_from, whole_to, PAGE_LEN, KEYS),
        _pages(table_ptr, whole_to, last_position + 1, PAGE_LEN, KEYS),
    )
    if EARLY:
        # The merge may come in now and wait. No other kernel of attention lets in what follows:
        # programs of this launch that arrive beside those of another come to lie unevenly over the
        # multiprocessors, and the fullest decides (decoding at batch 32: 36 us instead of 24).
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()

    head_dim_H = tl.arange(0, HEAD_BLOCK)
    there_RH = (row_R < num_rows)[:, None] & (head_dim_H < HEAD_DIM)[None, :]
    q_offset_R = (first_token + token_R).to(tl.int64) * q_token_stride + head_R * q_head_stride
    q_ptrs = q_ptr + q_offset_R[:, None]
    if new_k_ptr is None:
        q_RH = tl.load(q_ptrs + head_dim_H[None, :], mask=there_RH, other=0.0)
    else:
        token = first_token.to(tl.int64)
        if cos_ptr is not None:
            cos_ptr += token * (HEAD_DIM // 2)
            sin_ptr += token * (HEAD_DIM // 2)
        q_RH = load_turned(q_ptrs, there_RH, cos_ptr, sin_ptr, HEAD_DIM, HEAD_BLOCK)
        cached_keys_ptr += kv_head.to(tl.int64) * HEAD_STRIDE
        cached_values_ptr += kv_head.to(tl.int64) * HEAD_STRIDE
        write_token(
            new_k_ptr + token * new_k_token_stride + kv_head * new_k_head_stride,
            new_v_ptr + token * new_v_token_stride + kv_head * new_v_head_stride,
            cos_ptr,
            sin_ptr,
            tl.load(slots_ptr + token).to(tl.int64),
            cached_keys_ptr,
            cached_values_ptr,
            split == num_splits - 1,
            PAGE_STRIDE,
            SLOT_STRIDE,
            HEAD_DIM,
            HEAD_BLOCK,
            PAGE_LEN,
        )
    if key_scales_ptr is None and not BULK:
        q_RH = q_RH.to(keys_ptr.dtype.element_ty)
    slope_R = None
    if slopes_ptr is not None:
        slope_R = tl.load(slopes_ptr + head_R)
    if not BULK:
        keys_ptr += kv_head.to(tl.int64) * HEAD_STRIDE
        values_ptr += kv_head.to(tl.int64) * HEAD_STRIDE
    near_keys_ptr, near_values_ptr = keys_ptr, values_ptr
    if BULK and new_k_ptr is not None:
        near_keys_ptr, near_values_ptr = cached_keys_ptr, cached_values_ptr
    if key_scales_ptr is not None:
        key_scales_ptr += kv_head
        value_scales_ptr += kv_head
    sum_RH = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    peak_R = tl.full((ROWS,), float("-inf"), tl.float32)
    # Dual Chunk Attention rotates the queries three ways, for keys of the same chunk, of the one
    # before, and of all others. Each is a range of keys like the three below: it would enter here,
    # as a part that takes a q_RH of its own and goes on with the same sums.
    for part in tl.static_range(3):
        if part == 0:
            part_begin, part_end = begin, whole_from
        elif part == 1:
            part_begin, part_end = whole_from, whole_to
        else:
            part_begin, part_end = whole_to, end
        if part != 0 or WINDOW > 0:
            sum_RH, total_R, peak_R = _attend_keys(
                sum_RH,
                total_R,
                peak_R,
                q_RH,
                position_R,
                slope_R,
                part_begin,
                part_end,
                first_pages[part],
                kv_head,
                last_position + 1,
                keys_ptr if part == 1 else near_keys_ptr,
                values_ptr if part == 1 else near_values_ptr,
                key_scales_ptr,
                value_scales_ptr,
                table_ptr,
                scale,
                PAGE_STRIDE,
                SLOT_STRIDE,
                K,
                HEAD_DIM,
                HEAD_BLOCK,
                PAGE_LEN,
                WINDOW,
                KEYS,
                part != 1,
                BULK and (part == 1 or new_k_ptr is None),
            )

    if not SPLIT:
        total_R = tl.where(row_R < num_rows, total_R, 1.0)  # A row that is none may have seen none.
        out_RH = sum_RH / total_R[:, None]
        out_offset_R = (first_token + token_R).to(tl.int64) * out_token_stride
        place_RH = places(head_R, head_dim_H, HEAD_DIM, ARRANGE)
        out_ptrs = out_ptr + out_offset_R[:, None] + place_RH
        tl.store(out_ptrs, out_RH.to(out_ptr.dtype.element_ty), mask=there_RH)
    else:
        num_programs = tl.num_programs(0) * K * num_splits
        program = (tile * K + kv_head) * num_splits + split
        row_in_scratch_R = program * ROWS + tl.arange(0, ROWS)
        sums_ptrs = scratch_ptr + row_in_scratch_R.to(tl.int64)[:, None] * HEAD_DIM + head_dim_H
        tl.store(sums_ptrs, sum_RH, mask=there_RH)
        totals_ptr = scratch_ptr + num_programs.to(tl.int64) * ROWS * HEAD_DIM
        tl.store(totals_ptr + row_in_scratch_R, total_R)
        tl.store(totals_ptr + num_programs * ROWS + row_in_scratch_R, peak_R)


@triton.jit
def _attend_keys(
    sum_RH,
    total_R,
    peak_R,
    q_RH,
    position_R,
    slope_R,
    begin,
    end,
    next_page,
    kv_head,
    context_end,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    scale,
    PAGE_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    HIDES: tl.constexpr,
    BULK: tl.constexpr,
):
    """Softmax so far, carried over the keys [begin, end), of which HIDES: some rows see not all.

    peak is the largest score times log2(e), sum and total are relative to 2**peak (Milakov and
    Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).
    """
    in_block_C = tl.arange(0, KEYS)
    head_dim_H = tl.arange(0, HEAD_BLOCK)
    # Looked up a block ahead: a lookup and the keys it leads to in one iteration would share the
    # stages of the pipeline between them.
    for start in range(begin, end, KEYS):
        key_C = start + in_block_C
        is_key_C = key_C < context_end
        slot_C = in_block_C + start % PAGE_LEN if PAGE_LEN % KEYS == 0 else key_C % PAGE_LEN
        page = next_page.to(tl.int64)
        next_page = _pages(table_ptr, start + KEYS, context_end, PAGE_LEN, KEYS)
        offset_C = page * PAGE_STRIDE + slot_C * SLOT_STRIDE
        offset_CH = offset_C[:, None] + head_dim_H[None, :]
        if BULK:
            there_CH = None
            row = (page * PAGE_LEN + start % PAGE_LEN).to(tl.int32)
            k_CH = keys_ptr.load([row, kv_head * HEAD_DIM])
        elif HIDES or HEAD_BLOCK != HEAD_DIM:
            there_CH = is_key_C[:, None] & (head_dim_H < HEAD_DIM)[None, :]
            k_CH = tl.load(keys_ptr + offset_CH, mask=there_CH, other=0)
        else:
            there_CH = None
            k_CH = tl.load(keys_ptr + offset_CH)
        scores_RC = tl.dot(q_RH, tl.trans(k_CH.to(q_RH.dtype)), input_precision="ieee")
        scale_offset_C = (page * PAGE_LEN + slot_C) * K
        if key_scales_ptr is not None:
            scale_C = tl.load(key_scales_ptr + scale_offset_C, mask=is_key_C, other=0.0)
            scores_RC *= scale_C[None, :]
        if slope_R is not None:
            # The reference takes slope, position and product in bfloat16.
            bias_RC = slope_R[:, None] * _bfloat16_value(key_C.to(tl.float32))[None, :]
            scores_RC += _bfloat16_value(bias_RC)
        if HIDES:
            seen_RC = key_C[None, :] <= position_R[:, None]
            if WINDOW > 0:
                seen_RC &= key_C[None, :] > position_R[:, None] - WINDOW
            scores_RC = tl.where(seen_RC, scores_RC, float("-inf"))
        new_peak_R = tl.maximum(peak_R, tl.max(scores_RC, 1) * (scale * LOG2_E))
        base_R = new_peak_R
        if HIDES:  # A row may have seen nothing yet, and -inf - -inf is NaN.
            base_R = tl.where(new_peak_R == float("-inf"), 0.0, new_peak_R)
        weight_RC = tl.exp2(scores_RC * (scale * LOG2_E) - base_R[:, None])
        shrink_R = tl.exp2(peak_R - base_R)
        total_R = total_R * shrink_R + tl.sum(weight_RC, 1)
        sum_RH = sum_RH * shrink_R[:, None]
        if BULK:
            v_CH = values_ptr.load([row, kv_head * HEAD_DIM])
            if HIDES:  # What another sequence left beyond the context weighs 0, but may be NaN.
                v_CH = tl.where(is_key_C[:, None], v_CH, 0.0)
        elif there_CH is not None:
            v_CH = tl.load(values_ptr + offset_CH, mask=there_CH, other=0)
        else:
            v_CH = tl.load(values_ptr + offset_CH)
        if value_scales_ptr is not None:
            scale_C = tl.load(value_scales_ptr + scale_offset_C, mask=is_key_C, other=0.0)
            weight_RC *= scale_C[None, :]
        v_CH = v_CH.to(q_RH.dtype)
        sum_RH = tl.dot(weight_RC.to(q_RH.dtype), v_CH, sum_RH, input_precision="ieee")
        peak_R = new_peak_R
    return sum_RH, total_R, peak_R


@triton.jit
def _pages(table_ptr, start, context_end, PAGE_LEN: tl.constexpr, KEYS: tl.constexpr):
    """The page of a block of keys, or of each key; 0 beyond the context, where none need be."""
    if PAGE_LEN % KEYS == 0:
        return tl.load(table_ptr + start // PAGE_LEN, mask=start < context_end, other=0)
    else:
        key_C = start + tl.arange(0, KEYS)
        return tl.load(table_ptr + key_C // PAGE_LEN, mask=key_C < context_end, other=0)


@triton.jit
def _bfloat16_value(x):
    """The nearest bfloat16, ties to even, as float32.

    By its bits, since the interpreter, in which the tests run, truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)
