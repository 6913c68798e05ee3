"""Attention over pages as one Triton kernel: decode, verification, and prefill in chunks.

The meaning is `attention.paged_attention`; this is the same on a GPU: how the work is cut, and the
launch. The kernels are in `attend_triton.py` and `merge_triton.py`. Rotation and the write to the
pages come before and are in `write_triton.py`, save where a step only decodes: there they are part
of it, see `NewKV`.

Shape key: T packed new tokens, S sequences, P pages, B slots in a page, M pages in the longest page
table, N query heads, K KV heads, G query heads of one KV head (N / K), H head dim, R rows of a
tile, C keys of a block, F rotary frequencies (H / 2).

The one idea: the query heads that share a KV head are further rows of the same matrix. Row r of a
sequence is query head r % G at new token r // G, and a tile takes R rows, whatever tokens and heads
they are: 16 heads of one token when decoding Falcon-40B, 8 tokens of 16 heads in its prefill, 128
tokens when no heads share. So each key is read once for all who need it, and decode and prefill are
one kernel. Where there are too few tiles to fill the GPU, a tile's keys are split over several
programs, which leave their sums in scratch memory for a second, small launch to merge in order.

Nothing is read back from the GPU: grids follow from shapes and from upper bounds that the caller
may give, so a launch can be captured in a CUDA graph and replayed for other lengths.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longwing.errors import RequestError
from longwing.kernels.attend_triton import attend_tile
from longwing.kernels.attention import AttentionSpec
from longwing.kernels.attention_inputs import AttentionInputs
from longwing.kernels.digits import BLOCK, Digits
from longwing.kernels.fused_triton import as_digits
from longwing.kernels.launch import starts_early, take_all_shared
from longwing.kernels.merge_triton import merge_splits
from longwing.kernels.pages import KVPages

LONG = 8192
"""Keys from which on a batch's attention is bound by their bytes."""

MAX_SPLITS = 64
"""As many as the merge holds in registers at once."""

MERGE = 2048
"""Numbers that a program of the merge holds at once, unless one row has more."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut. Chosen by `tiling` from shapes; measured in bench/attention.py.

    Attributes:
        rows: R, rows of queries in a tile.
        keys: C, keys in a block.
        num_warps: warps of a program.
        num_stages: blocks of keys on their way from memory at a time.
        programs_per_sm: programs that a multiprocessor should have where keys are split.
        bulk: keys and values are fetched by Hopper's copy engine, a block at a time, where pages
            hold whole blocks in q's own type (`_bulk`); otherwise by the threads.
        max_registers: for each thread, where a few less let another program run beside.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 3
    bulk: bool = False
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class NewKV:
    """What a step of decoding brings to the cache, as the projection left it.

    Attributes:
        k_TKH: keys, not yet turned, in q's type; the last dimension contiguous.
        v_TKH: values, likewise.
        cos_TF: float32, contiguous; by how much queries and keys are to be turned, None for not.
        sin_TF: as cos_TF.
        slots_T: where they go. A token whose slot is negative is stored nowhere.
    """

    k_TKH: Tensor
    v_TKH: Tensor
    cos_TF: Tensor | None
    sin_TF: Tensor | None
    slots_T: Tensor

    def arguments(self, pages: KVPages, most_new: int | None) -> dict[str, Any]:
        """What `attend_tile` is told, and the options that make its bits `rotate_and_write`'s.

        Raises:
            ValueError: a sequence may bring several tokens, or the cache is in 8 bits; both are
                written by a launch of their own.
        """
        if most_new != 1 or pages.key_scales_PBK is not None:
            raise ValueError(
                f"attention writes one token a sequence, to a cache of floats; these are up to "
                f"{most_new or 'any number'}, to {pages.keys_PBKH.dtype}: use rotate_and_write"
            )
        return {
            "new_k_ptr": self.k_TKH,
            "new_v_ptr": self.v_TKH,
            "cos_ptr": self.cos_TF,
            "sin_ptr": self.sin_TF,
            "slots_ptr": self.slots_T,
            "cached_keys_ptr": pages.keys_PBKH,
            "cached_values_ptr": pages.values_PBKH,
            "new_k_token_stride": self.k_TKH.stride(0),
            "new_k_head_stride": self.k_TKH.stride(1),
            "new_v_token_stride": self.v_TKH.stride(0),
            "new_v_head_stride": self.v_TKH.stride(1),
            # A fused multiply-add would round once where the reference rounds twice.
            "enable_fp_fusion": False,
        }


def paged_attention(
    q_TNH: Tensor,
    pages: KVPages,
    inputs: AttentionInputs,
    spec: AttentionSpec,
    *,
    most_new: int | None = None,
    most_context: int | None = None,
    tiles: Tiling | None = None,
    num_splits: int | None = None,
    out_TNH: Tensor | None = None,
    digits: Digits | None = None,
    arrange: bool = False,
    new: NewKV | None = None,
) -> Tensor:
    """Each sequence's new tokens over its pages; (T, N, H) in q's dtype.

    The keys and values of this step must have been written, or be given as `new`. Products are of
    the cache's number type, if that is floating point, else of q's; sums are float32. Reads every
    key once for all query heads of its KV head and up to R / G tokens. Same inputs, bounds and GPU:
    same bits.

    Args:
        q_TNH: queries, rotated unless `new` is given; the last dimension contiguous.
        pages: one layer's cache.
        inputs: the step's sequences. One that brings no token is passed over.
        spec: scale, window, ALiBi.
        most_new: no sequence brings more tokens than this. Without it any may bring all.
        most_context: no context is longer than this. Without it, what the page table can hold.
        tiles: instead of what `tiling` chooses.
        num_splits: instead of what `splits` chooses.
        out_TNH: where the result goes, each token's heads in one piece; None for a new tensor.
        digits: where the result goes a second time, for the product of a few tokens that reads it.
        arrange: a token's numbers lie in the order in which a product of many tokens takes them,
            see `wna16_triton.arranges`.
        new: what is yet to be written, where most_new is 1. Then q is not yet rotated, either; the
            launch rotates and writes as it attends.

    Raises:
        RequestError: the head dimension or the page length is none that this kernel has.
        ValueError: `new` cannot be written so; there is no room for such digits.
    """
    T, N, H = q_TNH.shape
    page_len, K = pages.page_len, pages.keys_PBKH.shape[2]
    _check(H, page_len)
    if digits is not None:
        digits.check(T, N * H, q_TNH.dtype)
    S, group = len(inputs.context_lens_S), N // K
    if out_TNH is None:
        out_TNH = torch.empty((T, N, H), dtype=q_TNH.dtype, device=q_TNH.device)
    if T == 0:
        return out_TNH
    if most_new is None and S == 1:
        most_new = T
    if most_context is None:
        most_context = inputs.page_tables_SM.shape[1] * page_len
    most_rows = (T if most_new is None else most_new) * group
    tiles = tiles or tiling(most_rows, H, page_len, pages.keys_PBKH.dtype, alone=S == 1)
    tiles_each = 0 if most_new is None else triton.cdiv(most_new * group, tiles.rows)
    # Where lengths are unknown, sequence s is given a tile more than its share: `place`.
    num_tiles = S * tiles_each or T * group // tiles.rows + S
    if num_splits is None:
        num_splits = splits(num_tiles * K, most_context, spec, tiles, q_TNH.device)
    scratch = None
    if num_splits > 1:
        rows = num_tiles * K * num_splits * tiles.rows
        scratch = torch.empty(rows * (H + 2), dtype=torch.float32, device=q_TNH.device)
    where = (inputs.starts_S1, inputs.context_lens_S)
    shape = {
        "K": K,
        "GROUP": group,
        "HEAD_DIM": H,
        "HEAD_BLOCK": triton.next_power_of_2(H),
        "ROWS": tiles.rows,
        "EARLY": starts_early(q_TNH.device),
        "ARRANGE": arrange,
    }
    early = {"launch_pdl": shape["EARLY"]}
    keys, values, bulk = pages.keys_PBKH, pages.values_PBKH, _bulk(q_TNH, pages, tiles)
    if bulk:
        keys, values = (_descriptor(x, tiles.keys) for x in (keys, values))
    kernel = attend_tile[(num_tiles, K, num_splits)](
        q_TNH,
        out_TNH,
        scratch,
        keys,
        values,
        pages.key_scales_PBK,
        pages.value_scales_PBK,
        spec.slopes_on(q_TNH.device),
        *where,
        inputs.page_tables_SM,
        S,
        tiles_each,
        spec.scale,
        q_TNH.stride(0),
        q_TNH.stride(1),
        out_TNH.stride(0),
        inputs.page_tables_SM.stride(0),
        *pages.keys_PBKH.stride()[:3],
        PAGE_LEN=page_len,
        WINDOW=spec.window or 0,
        KEYS=tiles.keys,
        SPLIT=num_splits > 1,
        BULK=bulk,
        **shape,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
        **early,
        **({} if new is None else new.arguments(pages, most_new)),
    )
    take_all_shared(kernel)
    if num_splits > 1:
        splits_block = triton.next_power_of_2(num_splits)
        merged_rows = max(1, min(MERGE // (splits_block * shape["HEAD_BLOCK"]), tiles.rows))
        to: tuple[Tensor | None, Tensor | None] = (None, None)
        if digits is not None and most_new == 1 and _in_blocks(group, K, H):
            merged_rows = max(merged_rows, BLOCK // H)
            to, digits = (digits.digits_3TK, digits.steps_CT), None
        kernel = merge_splits[(num_tiles, K, tiles.rows // merged_rows)](
            out_TNH,
            *to,
            scratch,
            *where,
            S,
            tiles_each,
            out_TNH.stride(0),
            num_splits,
            T,
            **shape,
            SPLITS=splits_block,
            MERGED_ROWS=merged_rows,
            **early,
        )
        take_all_shared(kernel)
    if digits is not None:
        as_digits(out_TNH.flatten(1), made=digits)
    return out_TNH


def _in_blocks(group: int, num_kv_heads: int, H: int) -> bool:
    """Whether the query heads of a KV head are whole blocks of a token's numbers."""
    fit = H % BLOCK == 0 or BLOCK % H == 0
    return H.bit_count() == 1 and fit and (num_kv_heads == 1 or group * H % BLOCK == 0)


def tiling(
    rows: int, head_dim: int, page_len: int, dtype: torch.dtype, *, alone: bool = False
) -> Tiling:
    """The cut for sequences that bring up to so many rows (new tokens times G), or for one alone.

    Few rows: memory decides, and what counts is bytes on their way. Many: the matrix units and exp2
    do, and several programs on a multiprocessor let one's exp2 run beside another's products; there
    the copy engine, where pages are long enough for it, saves registers and instructions.
    """
    size = max(1, triton.next_power_of_2(head_dim) // 64) * max(1, dtype.itemsize // 2)
    keys = max(64 // size, 16 if dtype.itemsize > 2 else 32)
    if rows <= 32:
        tile = max(16, triton.next_power_of_2(rows))
        if dtype == torch.int8:  # Turning integers into numbers takes time that others can use.
            return Tiling(rows=tile, keys=keys, num_warps=2, num_stages=3, programs_per_sm=4)
        if size == 1 and tile == 16 and page_len % 128 == 0:
            return Tiling(rows=tile, keys=128, num_warps=4, num_stages=2)
        return Tiling(rows=tile, keys=keys, num_warps=4, num_stages=3)
    if rows <= 256:
        # One sequence's few programs run beside a block's products, where three stages would have
        # to wait for room; many sequences' programs are bound by how much is on its way.
        stages = 2 if alone and size == 1 else 3
        return Tiling(rows=64, keys=keys, num_warps=4, num_stages=stages, bulk=True)
    # The copy engine fetches heads of a power of two of 16-bit numbers.
    bulk = head_dim.bit_count() == 1 and dtype.is_floating_point and dtype.itemsize == 2
    if size == 1 and bulk and page_len % 128 == 0:
        return Tiling(rows=64, keys=128, num_warps=4, num_stages=2, bulk=True, max_registers=168)
    if size == 1 and dtype == torch.int8:
        return Tiling(rows=64, keys=128, num_warps=4, num_stages=2)
    if size == 1:
        return Tiling(rows=128, keys=64, num_warps=4, num_stages=3)
    if size == 2 and bulk and page_len % 64 == 0:
        return Tiling(rows=128, keys=64, num_warps=4, num_stages=2, bulk=True)
    if size == 2:
        return Tiling(rows=128, keys=64, num_warps=8, num_stages=3)
    return Tiling(rows=128, keys=max(16, 256 // size), num_warps=8, num_stages=2)


def splits(
    num_programs: int, most_context: int, spec: AttentionSpec, tiles: Tiling, device: torch.device
) -> int:
    """Programs to share a tile's keys, from what the host knows: shapes and upper bounds."""
    most_keys = most_context if spec.window is None else min(most_context, spec.window)
    per_sm, sms = tiles.programs_per_sm, num_sms(device)
    if most_keys >= LONG and num_programs >= sms // 2:
        per_sm += 1  # Here bytes decide, and three programs ask for 3.1 of 4.3 TB/s.
    # A share's sums are as large as its rows are many, and so its keys should be.
    useful = max(1, most_keys // max(tiles.keys, tiles.rows))
    return max(1, min(sms * per_sm // num_programs, useful, MAX_SPLITS))


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; on the CPU, where kernels are interpreted, 1."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bulk(q_TNH: Tensor, pages: KVPages, tiles: Tiling) -> bool:
    """Whether the copy engine can fetch the blocks: of q's type, whole in a page, unpadded."""
    keys_PBKH = pages.keys_PBKH
    return (
        tiles.bulk
        and keys_PBKH.dtype == q_TNH.dtype
        and keys_PBKH.is_contiguous()
        and pages.page_len % tiles.keys == 0
        and keys_PBKH.shape[3].bit_count() == 1
    )


def _descriptor(numbers_PBKH: Tensor, keys: int) -> TensorDescriptor:
    """The cache as a matrix of slots by heads, to be fetched in blocks of slots of one head."""
    P, B, K, H = numbers_PBKH.shape
    return TensorDescriptor.from_tensor(numbers_PBKH.view(P * B, K * H), [keys, H])


def _check(head_dim: int, page_len: int) -> None:
    if head_dim % 16 or head_dim > 256:
        raise RequestError(
            f"heads of {head_dim} numbers have no GPU attention kernel, only multiples of 16 up to "
            f"256; set LONGWING_KERNELS=reference"
        )
    if page_len < 16 or page_len & (page_len - 1):
        raise RequestError(
            f"pages of {page_len} tokens have no GPU attention kernel; "
            f"use a power of two from 16, such as 64"
        )
