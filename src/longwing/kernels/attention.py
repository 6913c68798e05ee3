"""Attention over pages of keys and values, and its plain form: the meaning, and the CPU path.

Holds `AttentionInputs` (what a step tells attention about its sequences), the KV write, and the
reference attention in PyTorch. Which pages belong to whom is decided elsewhere.

Shape key: T packed new tokens of all sequences, S sequences, P pages, B slots in a page, M pages in
the longest page table, C tokens of one sequence's context, N query heads, K KV heads, H head dim,
F rotary frequencies (H / 2).

The one idea: a step brings T new tokens, sequence after sequence. Their keys and values are first
written to pages; then each new token attends to its own sequence's context, read back from the
pages, up to and including itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KVPages:
    """One layer's cache: keys and values, each (P, B, K, H)."""

    keys_PBKH: Tensor
    values_PBKH: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys_PBKH.nbytes + self.values_PBKH.nbytes


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What one step tells attention: who the tokens belong to, and where their context lies.

    Attributes:
        starts_S1: (S + 1,) int32; sequence s owns tokens [starts[s], starts[s + 1]).
        context_lens_S: (S,) int32; tokens in the cache once this step has written its own.
        page_tables_SM: (S, M) int32; page_tables[s, i] is the page of slots [i * B, (i + 1) * B).
        slots_T: (T,) int64; where token t's key and value go, as page * B + slot.
        pages: one KVPages a layer.
        cos_TF: (T, F) float32, the rotation of each token under its own sequence's RoPE base;
            None for a model without rotary positions.
        sin_TF: as cos_TF.
    """

    starts_S1: Tensor
    context_lens_S: Tensor
    page_tables_SM: Tensor
    slots_T: Tensor
    pages: tuple[KVPages, ...]
    cos_TF: Tensor | None = None
    sin_TF: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What a layer's attention is, apart from its weights.

    Attributes:
        scale: multiplies q . k (and the ALiBi bias with it).
        window: a token sees itself and the window - 1 before it; None sees everything.
        alibi_slopes_N: (N,) one slope a query head, or None. Falcon-RW's form: the bias of key
            position j is slope * j, taken in bfloat16 as the models were trained with.
    """

    scale: float
    window: int | None = None
    alibi_slopes_N: Tensor | None = None


def rotate(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotary position embedding, half-split pairs (x[i], x[i + H/2]) (Su et al., arXiv:2104.09864).

    Computed in float32, returned in x's dtype. Works on queries and keys alike.
    """
    first_TNF, second_TNF = x_TNH.float().chunk(2, dim=-1)
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    rotated = (
        first_TNF * cos_T1F - second_TNF * sin_T1F,
        second_TNF * cos_T1F + first_TNF * sin_T1F,
    )
    return torch.cat(rotated, dim=-1).to(x_TNH.dtype)


def write_kv(k_TKH: Tensor, v_TKH: Tensor, pages: KVPages, slots_T: Tensor) -> None:
    """Store each token's key and value in its slot; in place."""
    pages.keys_PBKH.flatten(0, 1).index_copy_(0, slots_T, k_TKH.to(pages.keys_PBKH.dtype))
    pages.values_PBKH.flatten(0, 1).index_copy_(0, slots_T, v_TKH.to(pages.values_PBKH.dtype))


def attend(q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of one sequence's last T tokens over its whole context of C.

    Query t stands at position C - T + t. Query heads share KV heads in consecutive runs of N / K.

    Returns:
        (T, N, H) in q's dtype.
    """
    T, C = q_TNH.shape[0], k_CKH.shape[0]
    mask_NTC = _mask(T, C, spec, q_TNH)
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_CKH.to(q_TNH.dtype).transpose(0, 1)[None],
        v_CKH.to(q_TNH.dtype).transpose(0, 1)[None],
        attn_mask=mask_NTC,
        is_causal=mask_NTC is None and T > 1,
        scale=spec.scale,
        enable_gqa=q_TNH.shape[1] != k_CKH.shape[1],
    )
    return out_1NTH[0].transpose(0, 1)


def paged_attention(
    q_TNH: Tensor, pages: KVPages, inputs: AttentionInputs, spec: AttentionSpec
) -> Tensor:
    """Each sequence's new tokens over its pages, one sequence after another; (T, N, H).

    The keys and values of this step must have been written. Cost: a copy of each sequence's
    context, unless its pages lie in order, when it is a view.
    """
    out_TNH = torch.empty_like(q_TNH)
    starts = inputs.starts_S1.tolist()
    for s, context_len in enumerate(inputs.context_lens_S.tolist()):
        tokens = slice(starts[s], starts[s + 1])
        k_CKH, v_CKH = _context(pages, inputs.page_tables_SM[s], context_len)
        out_TNH[tokens] = attend(q_TNH[tokens], k_CKH, v_CKH, spec)
    return out_TNH


def alibi_slopes(num_heads: int) -> Tensor:
    """(N,) float32 ALiBi slopes, on the CPU (Press et al., arXiv:2108.12409, section 3).

    A power of two of heads gets the geometric series that starts at 2**(-8 / N); any other number
    gets the series of the power of two below, then every second slope of the one above.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def _context(pages: KVPages, table_M: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values in order, each (C, K, H)."""
    page_size = pages.keys_PBKH.shape[1]
    table_M = table_M[: -(-context_len // page_size)]
    first = int(table_M[0])
    if torch.equal(table_M, first + torch.arange(len(table_M), device=table_M.device)):
        run = slice(first, first + len(table_M))
        k, v = pages.keys_PBKH[run], pages.values_PBKH[run]
    else:
        k, v = pages.keys_PBKH[table_M], pages.values_PBKH[table_M]
    return k.flatten(0, 1)[:context_len], v.flatten(0, 1)[:context_len]


def _mask(T: int, C: int, spec: AttentionSpec, like: Tensor) -> Tensor | None:
    """None where plain causality says it all; else boolean (T, C) or additive (N, T, C)."""
    whole_window = spec.window is None or spec.window >= C
    if spec.alibi_slopes_N is None and whole_window and (T in (1, C)):
        return None
    query_T1 = torch.arange(C - T, C, device=like.device)[:, None]
    key_C = torch.arange(C, device=like.device)
    seen_TC = key_C <= query_T1
    if spec.window is not None:
        seen_TC &= key_C > query_T1 - spec.window
    if spec.alibi_slopes_N is None:
        return seen_TC
    slopes_N1 = spec.alibi_slopes_N.to(like.device, torch.bfloat16)[:, None]
    bias_NC = (slopes_N1 * key_C).to(like.dtype) * spec.scale
    return bias_NC[:, None].masked_fill(~seen_TC, float("-inf"))
