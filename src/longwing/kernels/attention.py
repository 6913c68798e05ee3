"""Rotation and attention in plain PyTorch: over one sequence, and over pages of many.

The meaning, and the CPU path. How keys and values are stored, and which sequences share a call,
`pages.py` and `batches.py` say.

Shape key: T packed new tokens, S sequences of one call, C tokens of context, N query heads, K KV
heads, G query heads of one KV head (N / K), L = T * G, H head dim, F rotary frequencies (H / 2).

The one idea: a step brings T new tokens, sequence after sequence. Their keys and values are first
written to pages; then each new token attends to its own sequence's context, read back from the
pages, up to and including itself.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.kernels.attention_inputs import AttentionInputs
from longwing.kernels.batches import SHARED_NEW_LEN, Batch
from longwing.kernels.pages import KVPages


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

    def slopes_on(self, device: torch.device) -> Tensor | None:
        """The slopes on a device, float32 with the values of bfloat16; brought there once."""
        if self.alibi_slopes_N is None:
            return None
        if device not in self._slopes:
            self._slopes[device] = self.alibi_slopes_N.to(device, torch.bfloat16).float()
        return self._slopes[device]

    @cached_property
    def _slopes(self) -> dict[torch.device, Tensor]:
        return {}


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


def turns(cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """(T, 1, F) complex64: the same rotation as numbers to multiply by, for `turn`."""
    return torch.complex(cos_TF, sin_TF)[:, None]


def turn(x_TNH: Tensor, turns_T1F: Tensor) -> Tensor:
    """As `rotate`, for heads whose pairs lie side by side (x[2i], x[2i + 1]): one multiplication.

    Which places a head's numbers lie in is no matter to q . k, as long as q and k agree; so whoever
    orders the rows of the two projections by `paired` gets the same attention for a third of the
    time. x_TNH is float32, and so is what is returned.
    """
    pairs_TNF = torch.view_as_complex(x_TNH.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_TNF * turns_T1F).flatten(-2)


def paired(head_dim: int) -> Tensor:
    """(H,) the order of a head's numbers that brings rotary pairs (i, i + H/2) side by side."""
    return torch.arange(head_dim).view(2, -1).T.flatten()


def attend(q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of one sequence's last T tokens over its whole context of C.

    Query t stands at position C - T + t. Query heads share KV heads in consecutive runs of N / K.

    Returns:
        (T, N, H) in q's dtype.
    """
    T, C = q_TNH.shape[0], k_CKH.shape[0]
    mask_NTC = _mask(T, C, spec, q_TNH)
    k_CKH, v_CKH = k_CKH.to(q_TNH.dtype), v_CKH.to(q_TNH.dtype)
    if mask_NTC is None and T == 1:
        return _attend_by_kv_head(q_TNH[None], k_CKH[None], v_CKH[None], None, spec.scale)[0]
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_CKH.transpose(0, 1)[None],
        v_CKH.transpose(0, 1)[None],
        attn_mask=mask_NTC,
        is_causal=mask_NTC is None and T > 1,
        scale=spec.scale,
        enable_gqa=q_TNH.shape[1] != k_CKH.shape[1],
    )
    return out_1NTH[0].transpose(0, 1)


def paged_attention(
    q_TNH: Tensor, pages: KVPages, inputs: AttentionInputs, spec: AttentionSpec
) -> Tensor:
    """Each sequence's new tokens over its pages; (T, N, H) in q's dtype.

    The keys and values of this step must have been written. Computes in the cache's number type, if
    that is floating point, else in q's. Cost: a copy of the context, except for a sequence that is
    alone in its call and whose pages lie in order, which is read in place.
    """
    works_in = q_TNH.dtype if pages.key_scales_PBK is not None else pages.keys_PBKH.dtype
    queries_TNH = q_TNH.to(works_in)
    if spec.alibi_slopes_N is not None:
        return _one_by_one(queries_TNH, pages, inputs, spec).to(q_TNH.dtype)
    batches = inputs.work(spec.window)
    if len(batches) == 1 and batches[0].num_tokens == len(q_TNH):
        return _attend_batch(queries_TNH, pages, batches[0], spec).to(q_TNH.dtype)
    out_TNH = torch.empty_like(q_TNH)
    for batch in batches:
        attended_TNH = _attend_batch(queries_TNH[batch.tokens], pages, batch, spec)
        out_TNH[batch.tokens] = attended_TNH.to(q_TNH.dtype)
    return out_TNH


def _attend_batch(q_TNH: Tensor, pages: KVPages, batch: Batch, spec: AttentionSpec) -> Tensor:
    """One call for the tokens of a batch: (S * T, N, H) to the same."""
    S, T = batch.num_sequences, batch.new_len
    k, v = pages.read(batch.pages, q_TNH.dtype, batch.slots)
    k_SCKH, v_SCKH = (x.unflatten(0, (S, -1)).flatten(1, 2)[:, : batch.context_len] for x in (k, v))
    if T > SHARED_NEW_LEN:
        return attend(q_TNH, k_SCKH[0], v_SCKH[0], spec)
    bias = batch.bias_S1LC(q_TNH.shape[1] // k.shape[2], q_TNH.dtype)
    q_STNH = q_TNH.view(S, T, *q_TNH.shape[1:])
    return _attend_by_kv_head(q_STNH, k_SCKH, v_SCKH, bias, spec.scale).flatten(0, 1)


def _attend_by_kv_head(
    q_STNH: Tensor, k_SCKH: Tensor, v_SCKH: Tensor, bias_S1LC: Tensor | None, scale: float
) -> Tensor:
    """Attention with the query heads of a KV head laid out as further tokens of it, L = T * G.

    Few tokens leave the kernel idle and each head costs a pass over the context; so one pass serves
    all heads that share a KV head (measured on an AVX-512 CPU with 3 heads for each: as fast in
    float32, 6 times as fast in bfloat16).
    """
    S, T, N, H = q_STNH.shape
    K = k_SCKH.shape[2]
    q_SKLH = q_STNH.view(S, T, K, N // K, H).transpose(1, 2).reshape(S, K, -1, H)
    out_SKLH = F.scaled_dot_product_attention(
        q_SKLH,
        k_SCKH.transpose(1, 2),
        v_SCKH.transpose(1, 2),
        attn_mask=bias_S1LC,
        scale=scale,
    )
    return out_SKLH.view(S, K, T, N // K, H).transpose(1, 2).reshape(S, T, N, H)


def _one_by_one(
    q_TNH: Tensor, pages: KVPages, inputs: AttentionInputs, spec: AttentionSpec
) -> Tensor:
    """Sequence after sequence: for biases that follow absolute positions."""
    out_TNH = torch.empty_like(q_TNH)
    for span in inputs.spans:
        run = span.run
        where = torch.tensor(span.pages, device=q_TNH.device) if run is None else run
        k, v = pages.read(where, q_TNH.dtype)
        k_CKH, v_CKH = (x.flatten(0, 1)[: span.context_len] for x in (k, v))
        tokens = slice(span.start, span.stop)
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
    slopes_N = spec.slopes_on(like.device)
    if slopes_N is None:
        return seen_TC
    bias_NC = (slopes_N.bfloat16()[:, None] * key_C).to(like.dtype) * spec.scale
    return bias_NC[:, None].masked_fill(~seen_TC, float("-inf"))
