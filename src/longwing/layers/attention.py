"""`Attention`: rotate, remember, attend. The same layer with and without a cache.

Projections are the model's business; pages and their owners are the engine's.

Shape key: T packed tokens, N query heads, K KV heads, H head dim, F = H / 2.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from longwing.kernels import (
    AttentionInputs,
    AttentionSpec,
    attend,
    attends_in_triton,
    narrowed,
    paged_attention,
    rotate,
    turns,
    write_kv,
)
from longwing.kernels.digits import Digits


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """How each token's queries and keys are turned; one for all layers of a step."""

    cos_TF: Tensor
    sin_TF: Tensor

    @cached_property
    def turns_T1F(self) -> Tensor:
        """The same as complex numbers, for layers that keep rotary pairs side by side."""
        return turns(self.cos_TF, self.sin_TF)


class Attention(nn.Module):
    """Causal attention: over the given tokens alone without `inputs`, over pages with them."""

    def __init__(self, layer: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.layer = layer
        self.spec = spec

    def forward(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rotation: Rotation | None,
        inputs: AttentionInputs | None,
        *,
        digits: Digits | None = None,
        arrange: bool = False,
    ) -> Tensor:
        """Returns (T, N * H), or (S, N * H) where `AttentionInputs.ends` attend alone.

        See `paged_triton.paged_attention` for `digits` and `arrange`.
        """
        if inputs is not None and attends_in_triton(q_TNH, inputs.pages[self.layer]):
            return self._in_triton(q_TNH, k_TKH, v_TKH, rotation, inputs, digits, arrange)
        if arrange or digits is not None:  # unreachable: asked of the kernels alone
            raise RuntimeError("only attention in Triton arranges what it gives, or leaves digits")
        if rotation is not None:
            q_TNH, k_TKH = (rotate(x, rotation.cos_TF, rotation.sin_TF) for x in (q_TNH, k_TKH))
        if inputs is None:
            return attend(q_TNH, k_TKH, v_TKH, self.spec).flatten(1)
        pages = inputs.pages[self.layer]
        write_kv(k_TKH, v_TKH, pages, inputs.slots_T)
        return paged_attention(narrowed(q_TNH, inputs), pages, inputs, self.spec).flatten(1)

    def _in_triton(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rotation: Rotation | None,
        inputs: AttentionInputs,
        digits: Digits | None,
        arrange: bool,
    ) -> Tensor:
        """The same in two launches, and one more where few sequences have long contexts.

        A step that only decodes is rotated and written by attention itself.
        """
        from longwing.kernels import fused_triton, paged_triton, write_triton

        pages = inputs.pages[self.layer]
        cos_TF, sin_TF = (rotation.cos_TF, rotation.sin_TF) if rotation else (None, None)
        calls = inputs.calls
        new = None
        only_decodes = inputs.most_new == 1 and inputs.ends_S is None and len(calls) == 1
        if only_decodes and pages.key_scales_PBK is None:
            new = paged_triton.NewKV(
                k_TKH=k_TKH, v_TKH=v_TKH, cos_TF=cos_TF, sin_TF=sin_TF, slots_T=inputs.slots_T
            )
        else:
            q_TNH = write_triton.rotate_and_write(
                q_TNH, k_TKH, v_TKH, cos_TF, sin_TF, pages, inputs.slots_T
            )
            q_TNH = narrowed(q_TNH, inputs)
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        for call in calls:
            paged_triton.paged_attention(
                q_TNH,
                pages,
                call,
                self.spec,
                most_new=call.most_new,
                most_context=call.most_context,
                out_TNH=out_TNH,
                digits=digits if len(calls) == 1 else None,
                arrange=arrange,
                new=new,
            )
        out_TD = out_TNH.flatten(1)
        if digits is not None and len(calls) > 1:
            fused_triton.as_digits(out_TD, made=digits)
        return out_TD
