"""Activations as digits: what they stand for, and that whoever makes them makes the same.

Interpreted on a CPU, or on a GPU.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from longwing.kernels import pack
from longwing.kernels.digits import Digits
from longwing.kernels.streamed import StreamedWeight, stream
from longwing.kernels.wna16 import PackedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton: Any = pytest.importorskip("longwing.kernels.wna16_triton")
fused: Any = pytest.importorskip("longwing.kernels.fused_triton")
if DEVICE == "cpu" and type(triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def _numbers(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random).to(DEVICE, dtype)


def _weight(K: int, N: int, seed: int = 0, *, act_order: bool = False) -> StreamedWeight:
    random = torch.Generator().manual_seed(seed)
    shape = (K // 64, N)
    packed = PackedWeight(
        bits=4,
        group_size=64,
        qweight_WN=pack(torch.randint(16, (K, N), generator=random), 4, 0),
        zeros_GN=torch.full(shape, 8, dtype=torch.uint8),
        scales_GN=((torch.rand(shape, generator=random) + 0.5) / 16 / K**0.5).half(),
        g_idx_K=(torch.randperm(K, generator=random) // 64).int() if act_order else None,
    )
    return stream([packed.to(DEVICE)], torch.float16)


def _assert_same(found: Digits, expected: Digits) -> None:
    assert (found.num_features, found.dtype) == (expected.num_features, expected.dtype)
    assert torch.equal(found.digits_3TK, expected.digits_3TK)
    assert torch.equal(found.steps_CT, expected.steps_CT)


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.bfloat16, 2.0**-14), (torch.float16, 2.0**-11)]
)
def test_numbers_near_the_largest_of_a_block_are_exact_and_others_to_its_last_bit(
    dtype: torch.dtype, exact: float
) -> None:
    x_TK = _numbers(3, 512, seed=1).exp2().to(dtype) * _numbers(3, 512, dtype=dtype, seed=2)
    x_TK[0, 7], x_TK[1, 130:256] = 3000.0, 0.0
    values_TK = Digits.of(x_TK).values()
    largest_TK = x_TK.double().unflatten(1, (-1, 128)).abs().amax(2).repeat_interleave(128, 1)
    near_TK = x_TK.double().abs() >= exact * largest_TK
    assert torch.equal(values_TK[near_TK], x_TK.double()[near_TK])
    assert bool(((values_TK - x_TK).abs() <= 2.0**-22 * largest_TK).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [48, 128, 320, 2200])
def test_the_kernel_makes_what_the_reference_makes(features: int, dtype: torch.dtype) -> None:
    x_TK = _numbers(5, 2 * features, dtype=dtype, seed=3)[:, features:]  # rows lie apart
    x_TK[1] *= 1000
    x_TK[2, :40] = 0.0
    x_TK[3] *= 1e-4
    x_TK[4] = 0.0
    _assert_same(fused.as_digits(x_TK), Digits.of(x_TK))
    order_K = torch.randperm(features, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    _assert_same(fused.as_digits(x_TK, order_K), Digits.of(x_TK[:, order_K]))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    weight, x_TK = _weight(256, 40), _numbers(2, 256)
    plain_TN = triton.packed_matmul(x_TK, weight)
    x_TK[0, 200] = bad
    out_TN = triton.packed_matmul(x_TK, weight)
    assert bool(out_TN[0].isnan().all())
    assert torch.equal(out_TN[1], plain_TN[1])


@pytest.mark.parametrize("size", [64, 320])
def test_norms_and_gates_leave_the_digits_of_their_results(size: int) -> None:
    x_TD, gate_TD = _numbers(3, size, seed=1), _numbers(3, size, seed=2)
    pairs = [(_numbers(size, seed=s), _numbers(size, seed=s + 1)) for s in (3, 5)]
    numbers = fused.layer_norms(x_TD, *pairs, 1e-5)
    for found, plain_TD in zip(fused.layer_norm_digits(x_TD, *pairs, 1e-5), numbers, strict=True):
        _assert_same(found, Digits.of(plain_TD))
    weight_D = pairs[0][0]
    plain_TD = fused.rms_norm(x_TD, weight_D, 1e-5)
    _assert_same(fused.rms_norm_digits(x_TD, weight_D, 1e-5), Digits.of(plain_TD))
    plain_TD = fused.gated(gate_TD, x_TD, "silu")
    _assert_same(fused.gated_digits(gate_TD, x_TD, "silu"), Digits.of(plain_TD))


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_product_leaves_the_digits_of_its_results_for_the_next(
    num_tokens: int, splits: int
) -> None:
    first, second = _weight(384, 200), _weight(192, 40, seed=1)
    first_wide = _weight(384, 192)
    x_TK = _numbers(num_tokens, 384, seed=2)
    cut = triton.Cut(tokens=2 if num_tokens < 3 else 8, splits=splits, stages=2)
    for weight, outputs in ((first, 200), (first_wide, 192)):
        digits = Digits.room(num_tokens, outputs, torch.float16, x_TK.device)
        out_TN = triton.packed_matmul(x_TK, weight, cut, act="gelu", digits=digits)
        _assert_same(digits, Digits.of(out_TN))
        assert torch.equal(out_TN, triton.packed_matmul(x_TK, weight, cut, act="gelu"))
    by_digits_TN = triton.packed_matmul(digits, second)
    assert torch.equal(by_digits_TN, triton.packed_matmul(out_TN, second))


def test_tokens_two_by_two_and_eight_by_eight_are_the_same_to_the_last_bit() -> None:
    weight, x_TK = _weight(384, 40), _numbers(2, 384, seed=2)
    for splits in (1, 2):
        cuts = [triton.Cut(tokens=tokens, splits=splits, stages=2) for tokens in (2, 8)]
        two_TN, eight_TN = (triton.packed_matmul(x_TK, weight, cut) for cut in cuts)
        assert torch.equal(two_TN, eight_TN)


def test_digits_where_none_are_taken_are_refused() -> None:
    weight, turned = _weight(256, 40), _weight(256, 40, act_order=True)
    assert triton.takes_digits(weight, 8)
    assert not triton.takes_digits(weight, 9)
    assert not triton.takes_digits(turned, 1)
    one, short, nine = (Digits.of(_numbers(*shape)) for shape in ((1, 256), (1, 128), (9, 256)))
    with pytest.raises(ValueError, match="another order"):
        triton.packed_matmul(one, turned)
    with pytest.raises(ValueError, match="128 features"):
        triton.packed_matmul(short, weight)
    with pytest.raises(ValueError, match="9 tokens"):
        triton.packed_matmul(nine, weight)
    cut = triton.Cut(tokens=16, splits=1, stages=2)
    with pytest.raises(ValueError, match="tiles of 16 tokens"):
        triton.packed_matmul(one, weight, cut)
    x_TK, room = _numbers(9, 256), Digits.of(_numbers(9, 40))
    with pytest.raises(ValueError, match="digits of 9 tokens; it is for 8 at most"):
        triton.packed_matmul(x_TK, weight, digits=room)
    x_TK, room = _numbers(5, 256), Digits.of(_numbers(5, 40))
    with pytest.raises(ValueError, match="digits to be left by a product of 5 tokens that is not"):
        triton.packed_matmul(x_TK, weight, cut, digits=room)
    with pytest.raises(ValueError, match="room for digits of 1 x 256 numbers"):
        triton.packed_matmul(x_TK, weight, digits=one)
    with pytest.raises(ValueError, match="room for digits of 5 x 40 numbers"):
        fused.as_digits(x_TK, made=room)
