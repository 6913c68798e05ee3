"""Muon for the matrices inside blocks, AdamW for the rest.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum
of a matrix, makes its singular values about one by five Newton-Schulz steps, and goes that way. The
update is scaled to AdamW's usual size (Liu et al., arXiv:2502.16982, section 2.2), so one learning
rate serves both.

Matrices of one shape are stepped together: eight layers are one batched product.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM, BETAS = 0.95, (0.9, 0.98)
WEIGHT_DECAY = 0.01
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps matrices of equal shapes at once. Every parameter must have two dimensions."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, by the gradients that the parameters hold."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                shapes.setdefault(param.shape, []).append(param)
            for shape, params in shapes.items():
                grads = torch.stack([param.grad for param in params])
                state = self.state[params[0]]
                momentum = state.setdefault("momentum", torch.zeros_like(grads))
                momentum.lerp_(grads, 1 - MOMENTUM)
                update = orthogonal(grads.lerp(momentum, MOMENTUM))
                update *= 0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_mul_(params, 1 - group["lr"] * WEIGHT_DECAY)
                torch._foreach_sub_(params, list(update.to(params[0].dtype)))


def orthogonal(x: Tensor) -> Tensor:
    """(n, rows, columns): about the nearest matrices with all singular values one."""
    a, b, c = _QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        squared = x @ x.mT
        x = a * x + (b * squared + c * squared @ squared) @ x
    return x.mT if tall else x


def make_optimizers(model: nn.Module, lr: float, kind: str = "muon") -> list[torch.optim.Optimizer]:
    """Muon and AdamW, or AdamW alone."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "blocks" not in name]
    fused = rest[0].is_cuda
    if kind == "adamw":
        return [torch.optim.AdamW([*matrices, *rest], lr, BETAS, fused=fused, weight_decay=0.01)]
    return [
        Muon(matrices, lr),
        torch.optim.AdamW(rest, lr, BETAS, fused=fused, weight_decay=0.0),
    ]
