"""Streamed weights against the reference: interpreted on a CPU, or on a GPU.

The interpreter multiplies float16 and float32 alone, so bfloat16 is only tested on a GPU.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longwing.kernels import BITS, PackedWeight, dequantize, pack
from longwing.kernels.digits import Digits
from longwing.kernels.streamed import fits, places, stream
from longwing.layers import activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton: Any = pytest.importorskip("longwing.kernels.wna16_triton")
if DEVICE == "cpu" and type(triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

fused_triton: Any = pytest.importorskip("longwing.kernels.fused_triton")
dense: Any = pytest.importorskip("longwing.kernels.wna16_dense")
Cut = triton.Cut
FLOATS = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def _weight(
    bits: int,
    K: int,
    N: int,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PackedWeight:
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else K // group_size
    q_KN = torch.randint(2**bits, (K, N), generator=random)
    middle_GN = torch.full((groups, N), 2 ** (bits - 1))
    zeros_GN = middle_GN if symmetric else torch.randint(2**bits, (groups, N), generator=random)
    scales_GN = (torch.rand(groups, N, generator=random) + 0.5) / 2**bits
    g_idx_K = torch.randperm(K, generator=random) * groups // K
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=pack(q_KN, bits, 0),
        zeros_GN=zeros_GN.to(torch.uint8),
        scales_GN=scales_GN.to(dtype),
        g_idx_K=g_idx_K.to(torch.int32) if act_order else None,
    ).to(DEVICE)


def _inputs(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random).to(DEVICE, dtype)


def _assert_product(out_TN: Tensor, x_TK: Tensor, weight: PackedWeight) -> None:
    exact_TN = x_TK.double() @ dequantize(weight, torch.float64)
    assert out_TN.shape == exact_TN.shape
    error = (out_TN.double() - exact_TN).norm() / exact_TN.norm()
    assert error < ROUNDING[x_TK.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_products_are_exact_but_for_the_rounding_of_the_result(bits: int, group_size: int) -> None:
    for symmetric, act_order, num_tokens in [
        (True, False, 3),
        (False, True, 11),
        (False, False, 2),
    ]:
        weight = _weight(
            bits, 256, 70, group_size, symmetric=symmetric, act_order=act_order, dtype=FLOATS[-1]
        )
        streamed = stream([weight], FLOATS[-1])
        x_TK = _inputs(num_tokens, 256, dtype=FLOATS[-1])
        _assert_product(triton.packed_matmul(x_TK, streamed), x_TK, weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [96, 192, 256])
def test_groups_of_other_sizes_are_cut_or_shared_by_cells(
    group_size: int, dtype: torch.dtype
) -> None:
    K = 2 * group_size
    weight = _weight(4, K, 40, group_size, act_order=True, dtype=dtype)
    x_TK = _inputs(2, K, dtype=dtype)
    _assert_product(triton.packed_matmul(x_TK, stream([weight], dtype)), x_TK, weight)


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9, 16, 17, 33, 70, 257])
def test_any_number_of_tokens_is_multiplied(num_tokens: int) -> None:
    weight = _weight(4, 192, 33, 64, symmetric=False)
    x_TK = _inputs(num_tokens, 192)
    out_TN = triton.packed_matmul(x_TK, stream([weight], torch.float16))
    if num_tokens:
        _assert_product(out_TN, x_TK, weight)
    assert out_TN.shape == (num_tokens, 33)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_dense_matrix_is_the_references_to_the_last_bit(bits: int, dtype: torch.dtype) -> None:
    for group_size, symmetric in [(-1, True), (32, False), (64, True), (128, False)]:
        weight = _weight(bits, 256, 40, group_size, symmetric=symmetric, dtype=dtype)
        dense_NK = dense.dequantize(stream([weight], dtype))[:40]
        assert torch.equal(dense_NK.T, dequantize(weight, dtype)), (group_size, symmetric)


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 20])
def test_splitting_the_inputs_changes_no_more_than_the_order_of_sums(num_tokens: int) -> None:
    weight = _weight(3, 384, 40)
    streamed, x_TK = stream([weight], torch.float16), _inputs(num_tokens, 384)
    tokens = {1: 8, 2: 2, 16: 16, 20: 32}[num_tokens]
    for splits in (1, 2, 3, 19):  # more than are added up at a time
        cut = Cut(tokens=tokens, splits=splits, stages=2)
        for _ in range(2):  # the first launch leaves the arrivals as it found them
            _assert_product(triton.packed_matmul(x_TK, streamed, cut), x_TK, weight)
        assert not streamed.arrivals.any()


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    streamed = stream([_weight(4, 256, 128)], torch.float16)
    x_TK = _inputs(8, 256)
    together_TN = triton.packed_matmul(x_TK, streamed)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 6), slice(1, 8)):
        assert torch.equal(triton.packed_matmul(x_TK[rows], streamed), together_TN[rows])


@pytest.mark.parametrize("num_tokens", [2, 20, 257])
def test_stacked_weights_are_multiplied_in_one_launch(num_tokens: int) -> None:
    parts = [_weight(4, 256, N, seed=N, symmetric=N != 100) for N in (100, 30)]
    streamed, x_TK = stream(parts, torch.float16), _inputs(num_tokens, 256)
    outs = triton.packed_matmul_many(x_TK, streamed)
    for part, out_TN in zip(parts, outs, strict=True):
        _assert_product(out_TN, x_TK, part)


@pytest.mark.parametrize(
    ("act", "num_tokens"),
    [*((act, 1) for act in fused_triton.ACTIVATIONS), ("gelu", 11), ("", 30), ("gelu", 260)],
)
def test_bias_activation_and_residual_come_with_the_product(act: str, num_tokens: int) -> None:
    weight = _weight(4, 256, 70, dtype=FLOATS[-1])
    x_TK = _inputs(num_tokens, 256, dtype=FLOATS[-1])
    bias_N = _inputs(70, dtype=FLOATS[-1], seed=2)
    around_TN = _inputs(num_tokens, 90, dtype=FLOATS[-1], seed=3)
    before_TN = around_TN.clone()
    out_TN = triton.packed_matmul(
        x_TK,
        stream([weight], FLOATS[-1]),
        bias_N=bias_N,
        act=act,
        more_TN=around_TN[:, 10:80],
        out_TN=around_TN[:, 10:80],
    )
    sums_TN = x_TK.double() @ dequantize(weight, torch.float64) + bias_N.double()
    expected_TN = (activation(act)(sums_TN) if act else sums_TN) + before_TN[:, 10:80].double()
    assert out_TN.data_ptr() == around_TN[:, 10:80].data_ptr()
    assert torch.equal(around_TN[:, :10], before_TN[:, :10])
    assert torch.equal(around_TN[:, 80:], before_TN[:, 80:])
    # Above STREAM_TOKENS product, activation and sum are rounded one by one.
    error = (out_TN.double() - expected_TN).norm() / expected_TN.norm()
    assert error < 2 * ROUNDING[x_TK.dtype]


@pytest.mark.parametrize("act", ["", "gelu"])
def test_cublas_is_given_many_tokens_in_pieces(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(4, 256, 70)
    streamed, x_TK, bias_N = stream([weight], torch.float16), _inputs(301, 256), _inputs(70, seed=2)
    more_TN = _inputs(301, 70, seed=3)
    settings = {"bias_N": bias_N if act else None, "act": act, "more_TN": more_TN}
    whole_TN = triton.packed_matmul(x_TK, streamed, **settings)
    lens: list[int] = []

    def count(x_TK: Tensor, *rest: Any, multiply: Any = dense._multiply_some) -> None:
        lens.append(len(x_TK))
        multiply(x_TK, *rest)

    monkeypatch.setattr(dense, "_multiply_some", count)
    monkeypatch.setattr(dense, "TOKENS_AT_ONCE", 100)
    pieces_TN = triton.packed_matmul(x_TK, streamed, **settings)
    assert lens == [101, 101, 99]
    error = (pieces_TN.double() - whole_TN.double()).norm() / whole_TN.double().norm()
    assert error < ROUNDING[torch.float16]


@pytest.mark.parametrize(
    ("num_tokens", "backwards"), [(1, False), (1, True), (11, True), (30, False), (260, True)]
)
def test_a_sum_of_products_is_whole_whichever_comes_last(num_tokens: int, backwards: bool) -> None:
    parts = [_weight(4, 512, 70, seed=1), _weight(3, 128, 70, 64, act_order=True, symmetric=False)]
    xs = [_inputs(num_tokens, part.in_features, seed=s) for s, part in enumerate(parts)]
    residual_TN, bias_N = _inputs(num_tokens, 70, seed=5), _inputs(70, seed=6)
    exact_TN = residual_TN.double() + bias_N.double()
    for part, x_TK in zip(parts, xs, strict=True):
        exact_TN = exact_TN + x_TK.double() @ dequantize(part, torch.float64)
    weights = [stream([part], torch.float16) for part in parts]
    for _ in range(2):  # the first leaves the arrivals as it found them
        out_TN = residual_TN.clone()
        total = triton.SumOfProducts(weights, out_TN, out_TN, bias_N)
        for index in (1, 0) if backwards else (0, 1):
            total.add(index, xs[index])
        error = (out_TN.double() - exact_TN).norm() / exact_TN.norm()
        assert error < 3 * ROUNDING[torch.float16]


@pytest.mark.parametrize("num_tokens", [1, 5, 12])
def test_a_sum_may_be_of_products_by_digits_and_by_numbers(num_tokens: int) -> None:
    parts = [_weight(3, 256, 70, 32), _weight(8, 512, 70, 64, seed=1)]
    xs = [_inputs(num_tokens, part.in_features, seed=s) for s, part in enumerate(parts)]
    exact_TN = sum(
        x_TK.double() @ dequantize(part, torch.float64)
        for part, x_TK in zip(parts, xs, strict=True)
    )
    weights = [stream([part], torch.float16) for part in parts]
    for order in ((0, 1), (1, 0)):
        out_TN = _inputs(num_tokens, 70).zero_()
        total = triton.SumOfProducts(weights, None, out_TN)
        for index in order:
            total.add(index, xs[index])
        error = (out_TN.double() - exact_TN).norm() / exact_TN.norm()
        assert error < 3 * ROUNDING[torch.float16]
        assert not weights[0].arrivals.any()


@pytest.mark.parametrize("num_tokens", [8, 9, 64])
def test_inputs_may_be_written_in_the_order_that_many_tokens_take(num_tokens: int) -> None:
    first, second = _weight(4, 256, 128, seed=1), _weight(4, 128, 40, seed=2)
    one, other = stream([first], torch.float16), stream([second], torch.float16)
    x_TK = _inputs(num_tokens, 256)
    arrange = triton.arranges(other, num_tokens)
    assert arrange == (num_tokens > 8)
    assert not triton.arranges(stream([_weight(4, 256, 8, act_order=True)], torch.float16), 30)
    plain_TN = triton.packed_matmul(triton.packed_matmul(x_TK, one, act="gelu"), other)
    between_TN = triton.packed_matmul(x_TK, one, act="gelu", arrange=arrange)
    assert torch.equal(triton.packed_matmul(between_TN, other, arranged=arrange), plain_TN)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_greatest_whole_numbers_there_are_still_add_up_exactly(
    bits: int, symmetric: bool
) -> None:
    """All digits -128, all weights as far from their zero points as can be."""
    weight = _weight(bits, 128, 32, symmetric=symmetric)
    fill = {"zeros_GN": torch.zeros_like(weight.zeros_GN)} if not symmetric else {}
    for value in (0, 2**bits - 1):
        q_KN = torch.full((128, 32), value)
        extreme = replace(weight, qweight_WN=pack(q_KN, bits, 0).to(DEVICE), **fill)
        ones_TK = Digits.of(torch.ones(1, 128, dtype=torch.float16, device=DEVICE))
        digits = replace(
            ones_TK,
            digits_3TK=torch.full_like(ones_TK.digits_3TK, -128),
            steps_CT=torch.full_like(ones_TK.steps_CT, 2.0**-30),
        )
        exact_TN = digits.values() @ dequantize(extreme, torch.float64)
        found_TN = triton.packed_matmul(digits, stream([extreme], torch.float16))
        torch.testing.assert_close(found_TN.double(), exact_TN, rtol=1e-3, atol=1e-6)


def test_scales_keep_the_checkpoints_own_bits() -> None:
    """float16 has three bits more than bfloat16, and activations in bfloat16 do not cost them."""
    weight = _weight(4, 256, 40, dtype=torch.float16)
    assert stream([weight], torch.bfloat16).scales_GN.dtype == torch.float16
    if DEVICE == "cuda":
        dense_NK = dense.dequantize(stream([weight], torch.bfloat16))[:40]
        assert torch.equal(dense_NK.T, dequantize(weight, torch.bfloat16))


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_word_has_one_use(bits: int) -> None:
    used = [
        (word, place + bit)
        for pieces in places(bits)
        for word, place, _, width in pieces
        for bit in range(width)
    ]
    assert sorted(used) == [(word, bit) for word in range(bits) for bit in range(16)]


def test_what_a_cell_cannot_hold_is_refused_and_left_to_the_reference() -> None:
    fine, uneven = _weight(4, 256, 8, 16), _weight(4, 256, 8, 128, act_order=True)
    assert uneven.g_idx_K is not None
    uneven.g_idx_K[:] = uneven.g_idx_K.sort().values
    uneven.g_idx_K[127] = 1
    assert fits(_weight(4, 256, 8))
    assert not fits(fine)
    with pytest.raises(ValueError, match="groups of 16"):
        stream([fine], torch.float16)
    assert fits(uneven)  # alone, its groups are filled up: test_even_groups.py
    with pytest.raises(ValueError, match="equal groups of 128"):
        stream([uneven, uneven], torch.float16)


def test_mismatches_are_refused() -> None:
    weight = _weight(4, 256, 8)
    streamed = stream([weight], torch.float16)
    with pytest.raises(ValueError, match="float32"):
        stream([weight], torch.float32)
    with pytest.raises(ValueError, match="4 bits and 256 inputs"):
        stream([weight, _weight(3, 256, 8)], torch.float16)
    with pytest.raises(ValueError, match="order of inputs"):
        stream([weight, _weight(4, 256, 8, act_order=True)], torch.float16)
    with pytest.raises(ValueError, match="128 features"):
        triton.packed_matmul(_inputs(1, 128), streamed)
    with pytest.raises(ValueError, match="2 parts"):
        triton.packed_matmul(_inputs(1, 256), stream([weight, weight], torch.float16))
