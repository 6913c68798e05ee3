"""Attention over rows of several documents: causal, and never across a border.

Takes the place of `layers.Attention` in a model that is tuned. There is no cache, positions restart
with each document, and memory grows with the row, not with its square.

Shape key: T tokens of a row, N query heads, K KV heads, H head dim, S documents.

The one idea: ALiBi's bias on a key is slope * its position, the same for all queries. So it is one
more dimension of the head, in which every query holds 1 and each key its bias, and any fast causal
attention does the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwing.kernels import AttentionSpec, attend, rotate
from longwing.layers import Attention, Rotation

_LANES = 8
"""Head dims are multiples of this in fused attention."""

_WIDEST = 256
"""The largest head dim that it takes."""


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Where the documents of a row begin and end.

    Attributes:
        lengths: tokens of each.
        starts_S1: (S + 1,) int32 on the device: the first token of each, and the row's end.
        ends_S: None, as in `AttentionInputs` where every token attends: all of them are learnt of.
    """

    lengths: tuple[int, ...]
    starts_S1: Tensor
    ends_S: None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "Borders":
        """The borders of documents of these lengths."""
        starts_S1 = F.pad(
            torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)
        )
        return cls(lengths=lengths, starts_S1=starts_S1.to(device, non_blocking=True))

    def spans(self) -> Iterator[slice]:
        """The tokens of each document."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length


class DocumentAttention(nn.Module):
    """`layers.Attention` for tuning; what that takes as pages is here the documents' borders."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rotation: Rotation | None,
        inputs: Borders,
    ) -> Tensor:
        """Returns (T, N * H)."""
        if rotation is not None:
            q_TNH, k_TKH = (rotate(x, rotation.cos_TF, rotation.sin_TF) for x in (q_TNH, k_TKH))
        return attend_documents(q_TNH, k_TKH, v_TKH, self.spec, inputs).flatten(1)


def install(model: nn.Module) -> None:
    """Replace a model's attention layers, in place. It takes rows from then on, and no pages."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, DocumentAttention(module.spec))


def attend_documents(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, spec: AttentionSpec, borders: Borders
) -> Tensor:
    """Causal attention within each document, (T, N, H).

    On a GPU in 16 bits one call for the row; else one a document.
    """
    if spec.alibi_slopes_N is not None:
        q_TNH, k_TKH, v_TKH = _with_bias(q_TNH, k_TKH, v_TKH, spec, borders)
    H = v_TKH.shape[-1] if spec.alibi_slopes_N is None else v_TKH.shape[-1] - _LANES
    plain = AttentionSpec(scale=spec.scale, window=spec.window)
    fused = q_TNH.dtype != torch.float32 and q_TNH.shape[-1] % _LANES == 0
    if q_TNH.is_cuda and fused and q_TNH.shape[-1] <= _WIDEST:
        return _in_one_call(q_TNH, k_TKH, v_TKH, plain, borders)[..., :H]
    parts = [
        _attend_one(q_TNH[span], k_TKH[span], v_TKH[span], plain)[..., :H]
        for span in borders.spans()
    ]
    return torch.cat(parts)


def _in_one_call(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, spec: AttentionSpec, borders: Borders
) -> Tensor:
    """PyTorch's flash attention over sequences of unequal length."""
    from torch.nn.attention.varlen import varlen_attn

    starts_S1, longest = borders.starts_S1, max(borders.lengths)
    shared = q_TNH.shape[1] // k_TKH.shape[1]
    if shared > 1:  # grouped heads are no option of this function before torch 2.12
        k_TKH, v_TKH = (x.repeat_interleave(shared, dim=1) for x in (k_TKH, v_TKH))
    out_TNH = varlen_attn(
        q_TNH.contiguous(),
        k_TKH.contiguous(),
        v_TKH.contiguous(),
        starts_S1,
        starts_S1,
        longest,
        longest,
        scale=spec.scale,
        window_size=(-1 if spec.window is None else spec.window - 1, 0),
    )
    if isinstance(out_TNH, tuple):  # unreachable: only where more than the output is asked for
        raise RuntimeError("attention returned more than its output")
    return out_TNH


def _attend_one(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, spec: AttentionSpec) -> Tensor:
    """One document. A window narrower than it is gone through in steps of a window."""
    T, window = len(q_TNH), spec.window
    if window is None or window >= T:
        return attend(q_TNH, k_TKH, v_TKH, spec)
    parts = []
    for start in range(0, T, window):
        stop, first = min(start + window, T), max(0, start - window + 1)
        parts.append(attend(q_TNH[start:stop], k_TKH[first:stop], v_TKH[first:stop], spec))
    return torch.cat(parts)


def _with_bias(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, spec: AttentionSpec, borders: Borders
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with ALiBi as a dimension of the head, each query head its own key.

    The bias is taken in bfloat16, as everywhere (`AttentionSpec`).
    """
    if spec.alibi_slopes_N is None:  # unreachable: only called with slopes
        raise RuntimeError("no slopes")
    N = q_TNH.shape[1]
    k_TNH, v_TNH = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (k_TKH, v_TKH))
    where = q_TNH.device
    position_T = torch.cat([torch.arange(length) for length in borders.lengths]).to(where)
    slopes_N = spec.alibi_slopes_N.to(where, torch.bfloat16)
    bias_TN = (slopes_N * position_T[:, None]).to(q_TNH.dtype)
    ones_TN1 = torch.ones_like(bias_TN)[..., None]
    return (
        F.pad(torch.cat((q_TNH, ones_TN1), -1), (0, _LANES - 1)),
        F.pad(torch.cat((k_TNH, bias_TN[..., None]), -1), (0, _LANES - 1)),
        F.pad(v_TNH, (0, _LANES)),
    )
