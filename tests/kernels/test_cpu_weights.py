"""The CPU's forms of a weight against dequantise-and-multiply."""

import pytest
import torch
from torch import Tensor

from longwing.kernels import (
    CpuWeight,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    PackedWeight,
    dequantize,
    pack,
)
from longwing.kernels.cpu import NARROW_TOKENS, offers_int4, offers_int8

BF16 = 2**-9
needs_int4 = pytest.mark.skipif(not offers_int4(), reason="no fast 4-bit kernel for this processor")
needs_int8 = pytest.mark.skipif(not offers_int8(), reason="no VNNI")


def packed(
    bits: int, group_size: int, sym: bool, act_order: bool = False, K: int = 256, N: int = 48
) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + group_size)
    own = K if group_size == -1 else group_size
    shape = (K // own, N)
    zeros = torch.randint(0, 2**bits, shape, generator=generator)
    if sym:
        zeros = torch.full(shape, 2 ** (bits - 1))
    g_idx = torch.randperm(K, generator=generator) // own
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=pack(torch.randint(0, 2**bits, (K, N), generator=generator), bits, 0),
        zeros_GN=zeros.to(torch.uint8),
        scales_GN=torch.rand(shape, generator=generator) * 0.02 + 0.001,
        g_idx_K=g_idx.to(torch.int32) if act_order else None,
    )


def tokens(T: int, K: int = 256) -> Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(T))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


@needs_int4
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_multiplies_as_the_dequantised_weight_does(
    bits: int, group_size: int, sym: bool, act_order: bool
) -> None:
    weight = packed(bits, group_size, sym, act_order)
    assert Int4Weight.fits(weight)
    fast, dense = Int4Weight([weight]), dequantize(weight, torch.float32)
    for T in (1, 3, 8, 40):
        x = tokens(T)
        # Activation, scale and result are each rounded to bfloat16 once, the offset too.
        limit = 2 * BF16 if sym else 4 * BF16
        assert relative_error(fast.matmul(x), x @ dense) < limit


@needs_int4
@pytest.mark.parametrize("N", [1, 15, 17, 40])
def test_outputs_that_fill_no_tile_are_padded_and_cut_off_again(N: int) -> None:
    weight = packed(4, 64, sym=True, N=N)
    out = Int4Weight([weight]).matmul(tokens(3))
    assert out.shape == (3, N)
    assert relative_error(out, tokens(3) @ dequantize(weight, torch.float32)) < 2 * BF16


@needs_int4
def test_stacked_matrices_with_reordered_rows_give_their_outputs_in_that_order() -> None:
    parts = [packed(4, 64, sym=False, N=32), packed(4, 64, sym=True, N=16)]
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    dense = torch.cat([dequantize(part, torch.float32) for part in parts], 1)[:, rows]
    assert relative_error(Int4Weight(parts, rows).matmul(tokens(2)), tokens(2) @ dense) < 4 * BF16


def test_what_the_4_bit_kernel_cannot_hold_is_not_said_to_fit() -> None:
    assert not Int4Weight.fits(packed(8, 64, sym=True))
    assert not Int4Weight.fits(packed(4, 48, sym=True, K=192))
    lopsided = packed(4, 64, sym=True, act_order=True)
    assert lopsided.g_idx_K is not None
    lopsided.g_idx_K[:2] = 0
    lopsided.g_idx_K[2:40] = 1
    assert not Int4Weight.fits(lopsided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "N"), [(64, 48), (37, 11), (576, 1)])
def test_dense_form_multiplies_as_its_matrix_does(K: int, N: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    for T in (1, 5, 40):
        error = relative_error(
            DenseWeight(weight, dtype).matmul(tokens(T, K)), tokens(T, K) @ weight.T
        )
        assert error < (1e-6 if dtype == torch.float32 else 2 * BF16)


@needs_int8
@pytest.mark.parametrize("T", [1, 7, 33])
def test_int8_form_rounds_weights_alone_and_each_token_keeps_its_own_scale(T: int) -> None:
    weight = torch.randn(83, 64, generator=torch.Generator().manual_seed(1))
    scales = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scales).round() * scales
    sizes = 10.0 ** torch.arange(T).remainder(7)[:, None]
    x = tokens(T, 64) * sizes
    out = Int8Weight(weight).matmul(x)
    for t in range(T):
        assert relative_error(out[t], x[t] @ rounded.T) < 1e-4
        assert relative_error(out[t], x[t] @ weight.T) < 0.02


@needs_int8
def test_int8_form_of_a_row_of_zeros_gives_zeros() -> None:
    weight = torch.zeros(16, 32)
    assert Int8Weight(weight).matmul(torch.zeros(2, 32)).abs().max() == 0


@needs_int4
def test_number_of_tokens_chooses_the_form_and_both_add_the_bias() -> None:
    weight, bias = packed(4, 64, sym=True), torch.arange(48.0)
    dense = dequantize(weight, torch.float32)
    both = CpuWeight(
        narrow=Int4Weight([weight]), wide=DenseWeight(dense.T, torch.float32), bias_N=bias
    )
    for T in (1, NARROW_TOKENS, NARROW_TOKENS + 1):
        error = relative_error(both.matmul(tokens(T)), tokens(T) @ dense + bias)
        assert (error > 1e-6) == (T <= NARROW_TOKENS)
        assert error < 2 * BF16
    assert both.nbytes > dense.nbytes


def test_weight_without_any_form_is_refused() -> None:
    with pytest.raises(ValueError, match="one form at least"):
        CpuWeight()
