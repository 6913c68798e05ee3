"""Cross-entropy over a vocabulary, without the logits of a whole row.

Falcon's 65,024 logits for 16,384 tokens are 4.3 GB in float32, and autograd would keep them and a
gradient as large. Here logits exist for a few hundred tokens at a time.

Shape key: T tokens, C tokens of a chunk, D model dim, V vocabulary.

The one idea: the loss is a sum, so the gradient of its chunks is known as soon as their logits are.
The forward pass makes both and keeps only gradients with respect to what goes in, (T, D) and, if
the head is trained, (V, D); the way back multiplies them by one number.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Bytes of float32 logits at once; about three times as much is in work."""


def cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of weight * -log softmax(hidden @ head.T + bias)[target], float32.

    Tokens of weight 0 cost nothing. Differentiable in hidden, and in head where it wants it (not in
    the bias, which no supported model trains).

    Args:
        hidden_TD: what the model ends in.
        head_VD: the output matrix.
        targets_T: int64.
        weights_T: floating point, not negative.
        bias_V: the output's bias, if there is one.
        dtype: what to multiply in; None is hidden's. Sums and softmax are float32.
        chunk: tokens at once; None is as many as CHUNK_BYTES hold.
    """
    kept_C = weights_T.nonzero()[:, 0]
    chunk = chunk or max(CHUNK_BYTES // (4 * len(head_VD)), 1)
    hidden_TD, targets_T, weights_T = hidden_TD[kept_C], targets_T[kept_C], weights_T[kept_C]
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head_VD, bias_V, targets_T, weights_T, dtype or hidden_TD.dtype, chunk
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        weights_T: Tensor,
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            cast_VD = head_VD.to(dtype)
            for start in range(0, len(hidden_TD), chunk):
                part = slice(start, start + chunk)
                hidden_CD, weights_C = hidden_TD[part].to(dtype), weights_T[part].float()
                logits_CV = (hidden_CD @ cast_VD.T).float()
                if bias_V is not None:
                    logits_CV += bias_V
                target_C1 = targets_T[part, None]
                log_sum_C = torch.logsumexp(logits_CV, 1)
                at_target_C = logits_CV.gather(1, target_C1)[:, 0]
                total += torch.dot(weights_C, log_sum_C - at_target_C)
                # softmax - one_hot, each row times its weight, in the logits' own memory
                slope_CV = logits_CV.sub_(log_sum_C[:, None]).exp_()
                slope_CV.scatter_add_(
                    1, target_C1, -torch.ones_like(target_C1, dtype=torch.float32)
                )
                slope_CV = slope_CV.mul_(weights_C[:, None]).to(dtype)
                if grad_TD is not None:
                    grad_TD[part] = slope_CV @ cast_VD
                if grad_VD is not None:
                    grad_VD += slope_CV.T @ hidden_CD
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD = ctx.saved_tensors
        return (
            None if grad_TD is None else grad_TD * grad.to(grad_TD.dtype),
            None if grad_VD is None else (grad_VD * grad).to(ctx.head_dtype),
            *(None,) * 5,
        )
