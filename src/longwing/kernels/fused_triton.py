"""What stands between two products of a decoder block, each as one launch on a GPU.

The meanings are PyTorch's own: `F.layer_norm`, `layers.RMSNorm`, and the activations by the names
that config.json uses. The kernels are in `fused_device.py`. Products themselves take a bias, an
activation and a sum with them where they stream their weights (`wna16_triton.py`).

Shape key: T tokens, D model dim, F features of an MLP.

The one idea: for one token such an operation moves a few kilobytes, so it costs its launch; what
can be done on the way out of a kernel that runs anyway, or for two norms of one input at once, is.
"""

import torch
import triton
from torch import Tensor

from longwing.kernels.fused_device import activate_rows, normalise

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")
"""Those that the kernels have, by config.json's names."""

LONGEST_ROW = 2**16
"""Numbers of a token that a norm holds in registers at most."""

BLOCK = 4096
"""Features that a program of `activate_` takes."""


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
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    second_TD = None if second is None else torch.empty_like(x_TD)
    _normalise(x_TD, out_TD, second_TD, first, second or (None, None), eps, True, arrange)
    return out_TD, out_TD if second_TD is None else second_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each token, (T, D) to the same."""
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    _normalise(x_TD, out_TD, None, (weight_D, None), (None, None), eps, False, False)
    return out_TD


def activate_(x_TF: Tensor, act: str) -> Tensor:
    """The activation, in place; rows may lie apart, each must be in one piece."""
    return _activate(x_TF, None, x_TF, act)


def gated(gate_TF: Tensor, up_TF: Tensor, act: str) -> Tensor:
    """act(gate) * up, (T, F); the inputs' rows may lie apart, each must be in one piece."""
    return _activate(up_TF, gate_TF, up_TF.new_empty(up_TF.shape), act)


def _normalise(
    x_TD: Tensor,
    out_TD: Tensor,
    second_TD: Tensor | None,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor | None, Tensor | None],
    eps: float,
    centred: bool,
    arrange: bool,
) -> None:
    T, D = x_TD.shape
    if D > LONGEST_ROW:
        raise ValueError(f"rows of {D} numbers; a norm holds up to {LONGEST_ROW}")
    if T == 0:
        return
    block = triton.next_power_of_2(D)
    normalise[(T,)](
        *(x_TD, out_TD, second_TD, *first, *second, eps),
        D=D,
        BLOCK=block,
        CENTRED=centred,
        ARRANGE=arrange,
        num_warps=min(max(block // 512, 4), 16),
    )


def _activate(x_TF: Tensor, gate_TF: Tensor | None, out_TF: Tensor, act: str) -> Tensor:
    if act not in ACTIVATIONS:
        raise ValueError(f'activation "{act}" is not one of {", ".join(ACTIVATIONS)}')
    T, F = x_TF.shape
    if T and F:
        gate_stride = 0 if gate_TF is None else gate_TF.stride(0)
        activate_rows[(T, triton.cdiv(F, BLOCK))](
            *(x_TF, gate_TF, out_TF, F, x_TF.stride(0), gate_stride, out_TF.stride(0)),
            act=act,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return out_TF
