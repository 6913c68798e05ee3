"""The search for scales, against trying everything."""

import pytest
import torch
from quant_layers import make_weights
from torch import Tensor

from longwing.quant import QuantSpec, grid
from longwing.quant.grid import Grid, centred, fit, storable


def cost(W_GIO: Tensor, h_GI: Tensor, found: Grid, bits: int) -> Tensor:
    """(G, O): Σ h (w − ŵ)² on this grid."""
    scale, zero = found.scale_GO[:, None], found.zero_GO[:, None]
    error = centred(W_GIO, scale, zero, bits) * scale - W_GIO
    return (h_GI[:, :, None] * error.square()).sum(1)


def make_groups() -> tuple[Tensor, Tensor]:
    """Four groups of 10 rows, two shifted so that zero points matter; and weights for errors."""
    W_GIO = make_weights(10, 4 * 128).T.reshape(4, 128, 10).contiguous()
    W_GIO[2:] += 0.1
    noise = torch.randn(4, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return W_GIO, noise.exp()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_never_does_worse_than_the_whole_range(bits: int, sym: bool) -> None:
    W_GIO, h_GI = make_groups()
    whole = fit(W_GIO, h_GI, QuantSpec(method="gptq", bits=bits, sym=sym, grid="minmax"))
    found = fit(W_GIO, h_GI, QuantSpec(method="gptq", bits=bits, sym=sym))
    gain = cost(W_GIO, h_GI, found, bits) / cost(W_GIO, h_GI, whole, bits)
    assert torch.all(gain <= 1)
    assert gain.mean() < {2: 0.5, 3: 0.7, 4: 0.9, 8: 1}[bits]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_comes_close_to_trying_everything(bits: int, sym: bool) -> None:
    W_GIO, h_GI = make_groups()
    least = torch.full((4, 10), float("inf"), dtype=torch.float64)
    for zero in [2 ** (bits - 1)] if sym else range(2**bits):
        for scale in W_GIO.abs().amax(1) * torch.linspace(0.02, 1.2, 300)[:, None, None]:
            every = Grid(scale_GO=storable(scale), zero_GO=torch.full_like(scale, zero))
            least = torch.minimum(least, cost(W_GIO, h_GI, every, bits))
    excess = (
        cost(W_GIO, h_GI, fit(W_GIO, h_GI, QuantSpec(method="gptq", bits=bits, sym=sym)), bits)
        / least
    )
    assert excess.mean() < 1.01
    assert excess.max() < 1.12


def test_scales_are_what_float16_holds_and_zero_points_whole() -> None:
    W_GIO, h_GI = make_groups()
    found = fit(W_GIO, h_GI, QuantSpec(method="gptq", bits=3, sym=False), min_zero=1)
    assert torch.equal(found.scale_GO, found.scale_GO.half().double())
    assert torch.equal(found.zero_GO, found.zero_GO.round())
    assert found.zero_GO.min() >= 1
    assert found.zero_GO.max() <= 7


def test_without_zero_point_0_positive_weights_are_still_covered() -> None:
    W_GIO = make_groups()[0].abs()
    found = fit(
        W_GIO, W_GIO[:, :, 0], QuantSpec(method="gptq", sym=False, grid="minmax"), min_zero=1
    )
    assert torch.all(found.zero_GO == 1)
    error = centred(W_GIO, found.scale_GO[:, None], found.zero_GO[:, None], 4)
    error = (error * found.scale_GO[:, None] - W_GIO).abs()
    assert torch.all(error <= found.scale_GO[:, None] * 0.51)


@pytest.mark.parametrize("sym", [True, False])
def test_a_bound_on_memory_changes_nothing(sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    W_GIO, h_GI = make_groups()
    whole = fit(W_GIO, h_GI, QuantSpec(method="gptq", sym=sym))
    for elements in (1, 4 * 128 * 3, 4 * 128 * 10 * 5):
        monkeypatch.setattr(grid, "_ELEMENTS", elements)
        found = fit(W_GIO, h_GI, QuantSpec(method="gptq", sym=sym))
        assert torch.equal(found.scale_GO, whole.scale_GO)
        assert torch.equal(found.zero_GO, whole.zero_GO)


def test_columns_that_cost_nothing_do_not_matter() -> None:
    W_GIO, h_GI = make_groups()
    h_GI[:, ::2] = 0
    shrunk_GIO = W_GIO.clone()
    shrunk_GIO[:, ::2] *= 0.5
    found, other = (fit(W, h_GI, QuantSpec(method="gptq", bits=2)) for W in (W_GIO, shrunk_GIO))
    difference = cost(W_GIO, h_GI, found, 2) / cost(W_GIO, h_GI, other, 2) - 1
    assert torch.all(difference.abs() < 0.02)
