"""`StreamedLinear`: packed linears in the layout that a GPU streams, and what goes with a product.

A bias, an activation, a residual and a LayerNorm before it are done on the product's way out. What
adapters add comes after a product (`layers.lora.LowRankSum`, three small launches), before its
activation; their input lies as it is, so with adapters nothing is arranged for a product ahead or
made digits, and no norm is folded.

Shape key: T packed tokens, I, O in and out features of a linear, N with padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longwing.kernels import PackedWeight, StreamedWeight
from longwing.kernels.digits import Activations, Digits
from longwing.kernels.norm_fold import FoldedNorm, Scaled, through
from longwing.kernels.streamed import stream, take_outputs
from longwing.kernels.wna16_cut import Beside, by_digits
from longwing.layers import Linear
from longwing.layers.lora import LoRALinear, added_by, base_of

FOLDABLE = {torch.bfloat16}
"""Number types that hold a hidden state times a norm's weight; in float16 that may be too large."""


class StreamedLinear(nn.Module):
    """A packed linear, or several of one input side by side; with or without adapters.

    Args:
        linears: packed.
        dtype: of the activations.
        order_O: outputs in another order; for one linear.
        norm: the LayerNorm before it, to be folded in where that is asked for; for one linear.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        linears: Sequence[Linear | LoRALinear],
        dtype: torch.dtype,
        *,
        order_O: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> None:
        super().__init__()
        self.added = added_by(linears, None if order_O is None else [order_O])
        bases = [base_of(linear) for linear in linears]
        parts = [packed_of(linear) for linear in bases]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in bases]
        if order_O is not None:
            order_O = order_O.to(parts[0].qweight_WN.device)
            parts = [take_outputs(part, order_O) for part in parts]
            biases = [None if bias_O is None else bias_O[order_O] for bias_O in biases]
        self.weight = stream(parts, dtype)
        bias_O = _bias(biases, self.weight)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        # Inputs in another order would be a copy in the norm's place; adapters want it done.
        self.folds = (
            norm is not None
            and self.weight.order_K is None
            and self.added is None
            and dtype in FOLDABLE
        )
        if norm is not None and self.folds:
            self.eps = norm.eps
            self.level_O, self.folded_bias_O = through(parts[0], norm.weight, norm.bias)
            if biases[0] is not None:
                self.folded_bias_O += biases[0]

    def folded(self, scaled: Scaled) -> FoldedNorm:
        """What the norm before this still has to do to its products; if it `folds`."""
        return FoldedNorm(stats_ST2=scaled.stats_ST2, level_N=self.level_O, eps=self.eps)

    def takes_digits(self, num_tokens: int) -> bool:
        """Whether the input may come as digits."""
        from longwing.kernels import wna16_triton

        return self.added is None and wna16_triton.takes_digits(self.weight, num_tokens)

    def leaves_digits(self, num_tokens: int) -> bool:
        """Whether the result may be left as digits, too."""
        return self.added is None and by_digits(self.weight, num_tokens)

    def arranges(self, num_tokens: int) -> bool:
        """Whether the input may come, and should, in the product's own order."""
        from longwing.kernels import wna16_triton

        return self.added is None and wna16_triton.arranges(self.weight, num_tokens)

    def forward(
        self,
        x_TI: Activations,
        *,
        norm: FoldedNorm | None = None,
        act: str = "",
        more_TO: Tensor | None = None,
        out_TO: Tensor | None = None,
        beside: Beside | None = None,
        digits: Digits | None = None,
        arranged: bool = False,
        arrange: bool = False,
    ) -> Tensor:
        """act(x @ weight + bias) + more, (T, I) -> (T, O), for one; see `packed_matmul`.

        With adapters x is numbers as they lie, none of them are left as digits, no norm is folded,
        and an activation goes without more.
        """
        from longwing.kernels import wna16_triton  # only where there is Triton

        if self.added is not None:
            out_TO = wna16_triton.packed_matmul(
                *(x_TI, self.weight),
                bias_N=self.bias,
                more_TN=more_TO,
                out_TN=out_TO,
                beside=beside,
            )
            return self.finished(out_TO, x_TI, act)
        return wna16_triton.packed_matmul(
            x_TI,
            self.weight,
            bias_N=self.bias if norm is None else self.folded_bias_O,
            norm=norm,
            act=act,
            more_TN=more_TO,
            out_TN=out_TO,
            beside=beside,
            digits=digits,
            arranged=arranged,
            arrange=arrange,
        )

    def each(self, x_TI: Activations) -> tuple[Tensor, ...]:
        """The (T, O) of each; rows lie apart."""
        from longwing.kernels import wna16_triton

        outs = wna16_triton.packed_matmul_many(x_TI, self.weight, bias_N=self.bias)
        if self.added is not None:
            self.added.add_to(outs, _numbers(x_TI))
        return outs

    def finished(self, out_TO: Tensor, x_TI: Activations, act: str = "") -> Tensor:
        """A product of x in place: with what adapters add, then activated."""
        if self.added is not None:
            self.added.add_to([out_TO], _numbers(x_TI))
        if act:
            from longwing.kernels import fused_triton

            fused_triton.activate_(out_TO, act)
        return out_TO


def _numbers(x_TI: Activations) -> Tensor:
    if isinstance(x_TI, Digits):  # unreachable: no digits are made where there are adapters
        raise RuntimeError("adapters need numbers, not digits")
    return x_TI


def packed_of(linear: Linear) -> PackedWeight:
    """A linear's packed weight, which it must have."""
    packed = linear.packed
    if packed is None:  # unreachable: only blocks of packed linears are rebuilt
        raise RuntimeError("a Linear without a packed weight cannot be streamed")
    return packed


def _bias(biases: Sequence[Tensor | None], weight: StreamedWeight) -> Tensor | None:
    """(N,) biases, each where its part begins, 0 elsewhere; None if there are none."""
    if all(bias_O is None for bias_O in biases):
        return None
    bias_N = torch.zeros(weight.starts[-1], dtype=weight.dtype, device=weight.words.device)
    for start, bias_O in zip(weight.starts, biases, strict=False):
        if bias_O is not None:
            bias_N[start : start + len(bias_O)] = bias_O
    return bias_N
