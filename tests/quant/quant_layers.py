"""Random layers for the tests of the solver: heavy-tailed weights, correlated inputs."""

import torch
from torch import Tensor

from longwing.quant import Statistics


def make_weights(O: int, I: int, seed: int = 0) -> Tensor:  # noqa: E741
    """(O, I) float64, Student's t with 4 degrees of freedom."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(O, I, generator=g, dtype=torch.float64)
    chi2 = torch.randn(O, I, 4, generator=g, dtype=torch.float64).square().mean(-1)
    return normal / chi2.sqrt() * I**-0.5


def make_inputs(T: int, I: int, seed: int = 0) -> Tensor:  # noqa: E741
    """(T, I) float64: a falling spectrum, and features of very different sizes."""
    g = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn(I, I, generator=g, dtype=torch.float64)
    mix *= torch.arange(1, I + 1, dtype=torch.float64)[:, None] ** -0.6
    size = torch.exp(0.7 * torch.randn(I, generator=g, dtype=torch.float64))
    noise = 0.1 * torch.randn(T, I, generator=g, dtype=torch.float64)
    return (torch.randn(T, I, generator=g, dtype=torch.float64) @ mix + noise) * size


def make_drift(x: Tensor, amount: float, seed: int = 0) -> Tensor:
    """The inputs as earlier quantised layers might have changed them."""
    g = torch.Generator().manual_seed(2000 + seed)
    I = x.shape[1]  # noqa: E741
    mix = torch.randn(I, I, generator=g, dtype=x.dtype) * I**-0.5
    noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
    return x + amount * ((x / x.std(0)) @ mix / 2 + noise) * x.std(0)


def statistics(x: Tensor, x_fp: Tensor | None = None) -> Statistics:
    """Sums in the dtype of x."""
    stats = Statistics(x.shape[1], drift=x_fp is not None, dtype=x.dtype)
    stats.add(x, x_fp)
    return stats


def output_error(W: Tensor, W_hat: Tensor, x: Tensor, x_fp: Tensor | None = None) -> float:
    """The objective from its definition, ‖W X_fp − Ŵ X‖² / ‖W X‖²."""
    target = (x if x_fp is None else x_fp) @ W.T
    return float((target - x @ W_hat.T).square().sum() / (x @ W.T).square().sum())
