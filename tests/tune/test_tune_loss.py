"""Chunked cross-entropy is torch's, value and gradients, without its memory."""

import pytest
import torch
import torch.nn.functional as F

from longwing.tune.loss import cross_entropy


def _inputs(T: int = 23, D: int = 8, V: int = 31) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, V, (T,), generator=generator)
    weights_T = torch.rand(T, generator=generator, dtype=torch.float64)
    weights_T[::4] = 0
    return hidden_TD, head_VD, targets_T, weights_T


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000, None])
@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradients_are_torchs_whatever_the_chunk(
    chunk: int | None, has_bias: bool
) -> None:
    hidden_TD, head_VD, targets_T, weights_T = _inputs()
    bias_V = torch.linspace(-1, 1, len(head_VD)).double() if has_bias else None
    ours = [hidden_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()]
    theirs = [hidden_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()]
    loss = cross_entropy(*ours, targets_T, weights_T, bias_V=bias_V, chunk=chunk)
    each_T = F.cross_entropy(F.linear(*theirs, bias_V), targets_T, reduction="none")
    expected = (each_T * weights_T).sum()
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_frozen_head_gets_no_gradient_and_hidden_still_does() -> None:
    hidden_TD, head_VD, targets_T, weights_T = _inputs()
    hidden_TD.requires_grad_()
    cross_entropy(hidden_TD, head_VD, targets_T, weights_T).backward()
    assert hidden_TD.grad is not None
    assert head_VD.grad is None


def test_tokens_of_no_weight_change_nothing_even_if_they_are_not_numbers() -> None:
    hidden_TD, head_VD, targets_T, weights_T = _inputs()
    clean = cross_entropy(hidden_TD, head_VD, targets_T, weights_T)
    hidden_TD[0] = float("nan")
    hidden_TD.requires_grad_()
    loss = cross_entropy(hidden_TD, head_VD, targets_T, weights_T)
    loss.backward()
    assert loss == clean
    assert hidden_TD.grad is not None
    assert not hidden_TD.grad[0].any()


def test_logits_of_all_tokens_never_exist_at_once() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple) else (made,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return made

    hidden_TD = torch.randn(64, 4, requires_grad=True)
    head_VD, targets_T, weights_T = torch.randn(500, 4), torch.arange(64), torch.ones(64)
    with Watch():
        cross_entropy(hidden_TD, head_VD, targets_T, weights_T, chunk=8).backward()
    assert largest == 8 * 500
