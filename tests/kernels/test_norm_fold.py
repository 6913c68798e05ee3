"""A LayerNorm folded into the products on both sides of it, against the norm by itself in float64.

Interpreted on a CPU, or on a GPU.
"""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.kernels import PackedWeight, dequantize, pack
from longwing.kernels.digits import Digits
from longwing.kernels.norm_fold import FoldedNorm, Scaled, through
from longwing.kernels.streamed import stream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton: Any = pytest.importorskip("longwing.kernels.wna16_triton")
if DEVICE == "cpu" and type(triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

NUMBER = torch.float16
ROUNDING = 5e-4
EPS = 1e-5


def _weight(
    K: int, N: int, seed: int, group_size: int = 64, *, symmetric: bool = True
) -> PackedWeight:
    random = torch.Generator().manual_seed(seed)
    shape = (K // group_size, N)
    zeros_GN = torch.full(shape, 8) if symmetric else torch.randint(16, shape, generator=random)
    return PackedWeight(
        bits=4,
        group_size=group_size,
        qweight_WN=pack(torch.randint(16, (K, N), generator=random), 4, 0),
        zeros_GN=zeros_GN.to(torch.uint8),
        scales_GN=((torch.rand(shape, generator=random) + 0.5) / 16 / K**0.5).half(),
    ).to(DEVICE)


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, NUMBER)


def _sum(
    hidden_TD: Tensor, norms: list[Tensor], num_products: int = 2, *, symmetric: bool = True
) -> tuple[Tensor, Scaled]:
    """Some products added to the hidden states, with what the norms after them need."""
    D = hidden_TD.shape[1]
    parts = [_weight(128, D, seed=10 + i, symmetric=symmetric) for i in range(num_products)]
    out_TD = hidden_TD.clone()
    weights = [stream([part], NUMBER) for part in parts]
    total = triton.SumOfProducts(weights, out_TD, out_TD, norms_N=norms)
    for index in range(num_products):
        total.add(index, _numbers(len(hidden_TD), 128, seed=20 + index))
    return out_TD, total.scaled


@pytest.mark.parametrize(("num_tokens", "symmetric"), [(1, False), (2, True), (3, True), (8, True)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_products_around_a_folded_norm_are_those_of_the_norm(
    num_tokens: int, symmetric: bool, shift: float
) -> None:
    D, N = 320, 200  # neither fills its last tile
    norms = [(_numbers(D, seed=i) * 0.2 + 1, _numbers(D, seed=i + 2)) for i in (1, 2)]
    hidden_TD = _numbers(num_tokens, D, seed=5) + shift
    out_TD, scaled = _sum(hidden_TD, [w_D for w_D, _ in norms], symmetric=symmetric)
    for digits, (weight_D, bias_D), seed in zip(scaled.digits, norms, (3, 4), strict=True):
        packed, own_N = _weight(D, N, seed, symmetric=symmetric), _numbers(N, seed=seed)
        level_N, bias_N = through(packed, weight_D, bias_D)
        got_TN = triton.packed_matmul(
            digits,
            stream([packed], NUMBER),
            norm=FoldedNorm(stats_ST2=scaled.stats_ST2, level_N=level_N, eps=EPS),
            bias_N=bias_N + own_N,
            act="gelu",
        )
        normed_TD = F.layer_norm(out_TD.double(), (D,), weight_D.double(), bias_D.double(), EPS)
        exact_TN = F.gelu(normed_TD @ dequantize(packed, torch.float64) + own_N.double())
        error = (got_TN.double() - exact_TN).norm() / exact_TN.norm()
        assert error < 3 * ROUNDING * (1 + shift)


def test_a_token_alone_and_among_others_is_the_same_to_the_last_bit() -> None:
    D, N = 256, 72
    weight_D, packed = _numbers(D, seed=1) * 0.2 + 1, _weight(D, N, seed=3)
    hidden_TD = _numbers(8, D, seed=5)
    level_N, bias_N = through(packed, weight_D, weight_D)
    results = []
    for rows in (slice(0, 1), slice(0, 5), slice(0, 8)):
        parts = [_weight(128, D, seed=10 + i) for i in range(2)]
        out_TD = hidden_TD[rows].clone()
        weights = [stream([part], NUMBER) for part in parts]
        total = triton.SumOfProducts(weights, out_TD, out_TD, norms_N=[weight_D])
        for index in range(2):
            total.add(index, _numbers(8, 128, seed=20 + index)[rows])
        scaled = total.scaled
        norm = FoldedNorm(stats_ST2=scaled.stats_ST2, level_N=level_N, eps=EPS)
        got_TN = triton.packed_matmul(
            scaled.digits[0], stream([packed], NUMBER), norm=norm, bias_N=bias_N
        )
        made_TD = scaled.digits[0].values()
        results.append((out_TD[0], made_TD[0], scaled.stats_ST2[:, 0], got_TN[0]))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_what_the_norm_needs_is_made_by_a_product_alone_too() -> None:
    """A sum of one product, whose inputs are not split: no program waits for another."""
    norm_D = _numbers(256, seed=1)
    out_TD, scaled = _sum(_numbers(2, 256, seed=5), [norm_D], num_products=1)
    expected_TD = (out_TD.float() * norm_D.float()).to(NUMBER)
    expected = Digits.of(expected_TD)
    assert torch.equal(scaled.digits[0].digits_3TK, expected.digits_3TK)
    assert torch.equal(scaled.digits[0].steps_CT, expected.steps_CT)
    tiles = out_TD.double().unflatten(1, (2, 128))
    stats_ST2 = torch.stack([tiles.sum(-1), tiles.square().sum(-1)], -1).transpose(0, 1)
    assert torch.allclose(scaled.stats_ST2.double(), stats_ST2, rtol=1e-6, atol=1e-5)


def test_a_norm_of_many_tokens_is_not_folded() -> None:
    packed = _weight(256, 64, seed=1)
    norm = FoldedNorm(
        stats_ST2=torch.zeros(2, 9, 2, device=DEVICE),
        level_N=torch.zeros(64, device=DEVICE),
        eps=EPS,
    )
    with pytest.raises(ValueError, match=r"9 tokens; it is for 8 at most"):
        triton.packed_matmul(_numbers(9, 256, seed=1), stream([packed], NUMBER), norm=norm)
    with pytest.raises(ValueError, match="all products of a sum are by digits"):
        _sum(_numbers(3, 64, seed=1), [_numbers(64, seed=1)], symmetric=False)
    with pytest.raises(ValueError, match="3 norms of one token"):
        _sum(_numbers(1, 64, seed=1), [_numbers(64, seed=1)] * 3)
