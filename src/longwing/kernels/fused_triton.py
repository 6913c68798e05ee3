"""What stands between two products of a decoder block, each as one launch on a GPU.

The meanings are PyTorch's own: `F.layer_norm`, `layers.RMSNorm`, and the activations by the names
that config.json uses. The kernels are in `fused_device.py`. Products themselves take a bias, an
activation and a sum with them where they stream their weights (`wna16_triton.py`).

Shape key: T tokens, D model dim, F features of an MLP.

The one idea: for one token such an operation moves a few kilobytes, so it costs its launch; what
can be done on the way out of a kernel that runs anyway, or for two norms of one input at once, is.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from longwing.kernels.digits import Digits
from longwing.kernels.digits_device import make_digits
from longwing.kernels.fused_device import activate_rows, normalise
from longwing.kernels.launch import take_all_shared

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")
"""Those that the kernels have, by config.json's names."""

LONGEST_ROW = 2**16
"""Numbers of a token that a norm holds in registers at most."""

BLOCK = 4096
"""Features that a program of `activate_` takes."""

DIGIT_BLOCKS = 8
"""Blocks of a token that a program of `as_digits` takes."""


def as_digits(x_TK: Tensor, order_K: Tensor | None = None, *, made: Digits | None = None) -> Digits:
    """What `Digits.of` gives; of features in another order, if one is given; to where is told."""
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    T, K = len(x_TK), x_TK.shape[1] if order_K is None else len(order_K)
    made = made or Digits.room(T, K, x_TK.dtype, x_TK.device)
    made.check(T, K, x_TK.dtype)
    blocks = len(made.steps_CT)
    if T and K:
        with torch.cuda.device_of(x_TK):
            kernel = make_digits[(triton.cdiv(blocks, DIGIT_BLOCKS), T)](
                *(x_TK, order_K, made.digits_3TK, made.steps_CT),
                *(T, K, blocks, x_TK.stride(0)),
                BLOCKS=DIGIT_BLOCKS,
            )
            take_all_shared(kernel)
    return made


def layer_norms(
    x_TD: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    eps: float,
    *,
    arrange: bool = False,
) -> tuple[Tensor, Tensor]:
    """LayerNorm under one or two (weight, bias) pairs: two (T, D), the same one twice for one pair.

    Falcon-40B's attention and MLP read the same token through a norm each. With `arrange` the
    results are in the order that products of many tokens take, see `wna16_triton.arranges`.
    """
    outs = [torch.empty_like(x_TD) for _ in ((first,) if second is None else (first, second))]
    _normalise(x_TD, outs, first, second, eps, arrange=arrange)
    return outs[0], outs[-1]


def layer_norm_digits(
    x_TD: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Digits, Digits]:
    """What `layer_norms` gives, as the products of few tokens read it."""
    outs = [Digits.room_like(x_TD) for _ in ((first,) if second is None else (first, second))]
    _normalise(x_TD, outs, first, second, eps)
    return outs[0], outs[-1]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each token, (T, D) to the same."""
    out_TD = torch.empty_like(x_TD)
    _normalise(x_TD, [out_TD], (weight_D, None), None, eps)
    return out_TD


def rms_norm_digits(x_TD: Tensor, weight_D: Tensor, eps: float) -> Digits:
    """What `rms_norm` gives, as the products of few tokens read it."""
    made = Digits.room_like(x_TD)
    _normalise(x_TD, [made], (weight_D, None), None, eps)
    return made


def activate_(x_TF: Tensor, act: str) -> Tensor:
    """The activation, in place; rows may lie apart, each must be in one piece."""
    _activate(x_TF, None, x_TF, act)
    return x_TF


def gated(gate_TF: Tensor, up_TF: Tensor, act: str) -> Tensor:
    """act(gate) * up, (T, F); the inputs' rows may lie apart, each must be in one piece."""
    out_TF = up_TF.new_empty(up_TF.shape)
    _activate(up_TF, gate_TF, out_TF, act)
    return out_TF


def gated_digits(gate_TF: Tensor, up_TF: Tensor, act: str) -> Digits:
    """What `gated` gives, as the products of few tokens read it."""
    made = Digits.room_like(up_TF)
    _activate(up_TF, gate_TF, made, act)
    return made


def _normalise(
    x_TD: Tensor,
    outs: Sequence[Tensor | Digits],
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor | None] | None,
    eps: float,
    *,
    arrange: bool = False,
) -> None:
    """One norm or two, LayerNorms if it has a bias, to where each is to go."""
    x_TD = x_TD.contiguous()
    T, D = x_TD.shape
    if D > LONGEST_ROW:
        raise ValueError(f"rows of {D} numbers; a norm holds up to {LONGEST_ROW}")
    if T == 0:
        return
    block = max(triton.next_power_of_2(D), 128)
    to = [_room(out) for out in outs] + [(None, None)]
    kernel = normalise[(T,)](
        *(x_TD, *to[0], *to[1], *first, *(second or (None, None)), eps),
        D=D,
        BLOCK=block,
        CENTRED=first[1] is not None,
        ARRANGE=arrange,
        num_warps=min(max(block // 512, 4), 16),
    )
    take_all_shared(kernel)


def _activate(x_TF: Tensor, gate_TF: Tensor | None, out_TF: Tensor | Digits, act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f'activation "{act}" is not one of {", ".join(ACTIVATIONS)}')
    T, F = x_TF.shape
    if T and F:
        gate_stride = 0 if gate_TF is None else gate_TF.stride(0)
        out_stride = out_TF.stride(0) if isinstance(out_TF, Tensor) else 0
        kernel = activate_rows[(T, triton.cdiv(F, BLOCK))](
            *(x_TF, gate_TF, *_room(out_TF), F, x_TF.stride(0), gate_stride, out_stride),
            act=act,
            BLOCK=BLOCK,
            num_warps=8,
        )
        take_all_shared(kernel)


def _room(out: Tensor | Digits) -> tuple[Tensor, Tensor | None]:
    """Where numbers go, or digits and their steps."""
    return (out, None) if isinstance(out, Tensor) else (out.digits_3TK, out.steps_CT)
