"""The Triton kernels of attention over pages; `paged_triton.py` says what they are for and when.

`attend_tile` takes one tile of query rows over a share of its keys; `merge_splits` adds up shares.
Where each sequence brings one token, `attend_tile` can rotate and write what it brings, too.

Shape key, on blocks: R rows of a tile (row r of a sequence is query head r % G at new token r // G,
G query heads of a KV head), C keys of a block, X splits of a tile's keys, H head dim, padded to a
power of two.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from longwing.kernels.digits_device import leave_digits
from longwing.kernels.fused_device import arranged
from longwing.kernels.rotate_device import load_turned, write_token

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp2 is one instruction and exp is two, so scores carry this factor."""


@triton.jit
def _place(
    tile,
    starts_ptr,
    context_lens_ptr,
    num_sequences,
    tiles_each,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Whose tile this is: (sequence, its first token, tokens before the new, rows, first row).

    Where every sequence has as many tiles, that is a division. Else sequence s gets the tiles from
    starts[s] * G // R + s on: at least as many as it needs, and nobody had to count.
    """
    if tiles_each > 0:
        s = tile // tiles_each
        first_tile = s * tiles_each
    else:
        s, after = tile * 0, num_sequences
        while after - s > 1:
            middle = (s + after) // 2
            if tl.load(starts_ptr + middle) * GROUP // ROWS + middle <= tile:
                s = middle
            else:
                after = middle
        first_tile = tl.load(starts_ptr + s) * GROUP // ROWS + s
    first_token = tl.load(starts_ptr + s)
    num_new = tl.load(starts_ptr + s + 1) - first_token
    num_before = tl.load(context_lens_ptr + s) - num_new
    return s, first_token, num_before, num_new * GROUP, (tile - first_tile) * ROWS


@triton.jit
def _places(head_R, head_dim_H, HEAD_DIM: tl.constexpr, ARRANGE: tl.constexpr):
    """Where in a token's numbers those of its heads lie."""
    first_R1 = (head_R * HEAD_DIM)[:, None]
    if not ARRANGE:
        return first_R1 + head_dim_H[None, :]
    elif HEAD_DIM % 32 == 0:  # what changes places stays in its head
        return first_R1 + arranged(head_dim_H)[None, :]
    else:
        return arranged(first_R1 + head_dim_H[None, :])


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
    s, first_token, num_before, num_rows, first_row = _place(
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
        # The merge may come in now and wait. Nothing else lets in what follows it: programs of this
        # launch that arrive beside those of another come to lie unevenly over the multiprocessors,
        # and the fullest decides (decoding at batch 32: 36 us instead of 24).
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
        place_RH = _places(head_R, head_dim_H, HEAD_DIM, ARRANGE)
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
    _, first_token, _, num_rows, first_row = _place(
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
    place_RH = _places(head_R, head_dim_H, HEAD_DIM, ARRANGE)
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
