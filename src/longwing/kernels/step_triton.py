"""What begins and ends a decoding step, as a launch each: rows of tables, the likeliest tokens.

The meanings are `rows.take_rows` and `likeliest.likeliest`. Neither takes a GPU any time to speak
of, but between two steps nothing else runs: of PyTorch's own operations, a dozen one after another,
they took some 45 µs of a step of Falcon-7B's 1,570.

Shape key: T rows that are taken, L rows there are, D numbers of a row; S rows of logits, V
vocabulary. Inside kernels, on blocks: D and V stand for a part of them.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwing.kernels.likeliest import Likeliest

ROW_BLOCK = 2048
"""Numbers of a row that a program copies."""

LOGITS_BLOCK = 8192
"""Logits that the program of a row holds at once."""


def take_rows(index_T: Tensor, *tables_LD: Tensor) -> tuple[Tensor, ...]:
    """See `rows.take_rows`; tables are contiguous, one or two."""
    first_LD, *others = tables_LD
    T, D = len(index_T), first_LD.shape[1]
    outs = tuple(table_LD.new_empty(T, D) for table_LD in tables_LD)
    second = (others[0], outs[1]) if others else (None, None)
    block = min(triton.next_power_of_2(D), ROW_BLOCK)
    if T:
        with torch.cuda.device_of(first_LD):
            _copy_rows[(T, triton.cdiv(D, block))](
                *(index_T, first_LD, second[0], outs[0], second[1], index_T.stride(0)),
                D=D,
                BLOCK=block,
            )
    return outs


def likeliest(logits_SV: Tensor) -> Likeliest:
    """See `likeliest.likeliest`; each row of logits is in one piece."""
    S, V = logits_SV.shape
    max_S = logits_SV.new_empty(S, dtype=torch.float32)
    chosen_S2 = logits_SV.new_empty((S, 2), dtype=torch.int64)
    if S:
        with torch.cuda.device_of(logits_SV):
            _find_likeliest[(S,)](
                *(logits_SV, max_S, chosen_S2, V, logits_SV.stride(0)),
                BLOCK=min(triton.next_power_of_2(V), LOGITS_BLOCK),
                num_warps=16,
            )
    return Likeliest(max_S, chosen_S2)


@triton.jit
def _copy_rows(
    index_ptr,
    first_ptr,
    second_ptr,
    to_first_ptr,
    to_second_ptr,
    index_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part of one row, of each table."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + at * index_stride).to(tl.int64)
    place_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there_D = place_D < D
    numbers_D = tl.load(first_ptr + row * D + place_D, mask=there_D)
    tl.store(to_first_ptr + at * D + place_D, numbers_D, mask=there_D)
    if second_ptr is not None:
        numbers_D = tl.load(second_ptr + row * D + place_D, mask=there_D)
        tl.store(to_second_ptr + at * D + place_D, numbers_D, mask=there_D)


@triton.jit
def _find_likeliest(logits_ptr, max_ptr, chosen_ptr, V, row_stride, BLOCK: tl.constexpr):
    """One row: each lane keeps the highest of its logits and where it was first; then all do."""
    row = tl.program_id(0).to(tl.int64)
    in_block_V = tl.arange(0, BLOCK)
    highest_V = tl.full((BLOCK,), float("-inf"), tl.float32)
    id_V = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=4):
        now_V = start + in_block_V
        logit_V = tl.load(
            logits_ptr + row * row_stride + now_V, mask=now_V < V, other=float("-inf")
        ).to(tl.float32)
        logit_V = tl.where(logit_V == logit_V, logit_V, float("inf"))  # nan: as useless
        is_higher_V = logit_V > highest_V
        highest_V = tl.where(is_higher_V, logit_V, highest_V)
        id_V = tl.where(is_higher_V, now_V, id_V)
    highest = tl.max(highest_V, 0)
    first = tl.min(tl.where(highest_V == highest, id_V, V), 0)
    usable = (highest > float("-inf")) & (highest < float("inf"))
    tl.store(max_ptr + row, highest)
    tl.store(chosen_ptr + 2 * row, first.to(tl.int64))
    tl.store(chosen_ptr + 2 * row + 1, usable.to(tl.int64))
