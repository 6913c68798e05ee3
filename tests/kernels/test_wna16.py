"""The packed layout against a bit stream written by hand; multiplication against unpacking."""

import pytest
import torch
from torch import Tensor

from longwing.kernels import BITS, PackedWeight, dequantize, pack, packed_matmul, unpack


def _stream(values: list[int], bits: int) -> list[int]:
    """Words of the little-endian bit stream, in Python integers."""
    number = sum(value << (bits * k) for k, value in enumerate(values))
    words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(len(values) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def _random(bits: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
def test_packing_writes_the_little_endian_bit_stream(bits: int) -> None:
    values = _random(bits, 96)
    assert pack(values[:, None], bits, 0)[:, 0].tolist() == _stream(values.tolist(), bits)


def test_known_values_give_the_words_that_autogptq_writes() -> None:
    # Worked out by hand from the shifts in its qlinear_cuda_old.pack, 4 and 3 bits.
    assert pack(torch.arange(8)[:, None], 4, 0).tolist() == [[0x76543210]]
    three_bits = pack((torch.arange(32) % 8)[:, None], 3, 0).flatten().tolist()
    assert [word & 0xFFFFFFFF for word in three_bits] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_unpacking_undoes_packing(bits: int, dim: int) -> None:
    values = _random(bits, 64, 96)
    assert torch.equal(unpack(pack(values, bits, dim), bits, dim).long(), values)


@pytest.mark.parametrize("bits", BITS)
def test_values_that_do_not_fill_words_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="do not fill whole 32-bit words"):
        pack(torch.zeros(33, 1, dtype=torch.int64), bits, 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_multiplying_packed_is_multiplying_each_value_by_its_scale(
    bits: int, group_size: int, act_order: bool
) -> None:
    K, N = 96, 20
    groups = 1 if group_size == -1 else K // group_size
    q, zeros = _random(bits, K, N), _random(bits, groups, N, seed=1)
    scales = torch.rand(groups, N, generator=torch.Generator().manual_seed(2)) + 0.1
    g_idx = torch.randperm(K, generator=torch.Generator().manual_seed(3)) * groups // K
    weight = PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=pack(q, bits, 0),
        zeros_GN=zeros.to(torch.uint8),
        scales_GN=scales,
        g_idx_K=g_idx.to(torch.int32) if act_order else None,
    )
    dense = torch.empty(K, N)
    for k in range(K):
        g = int(g_idx[k]) if act_order else 0 if group_size == -1 else k // group_size
        dense[k] = (q[k] - zeros[g]) * scales[g]
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(dequantize(weight, torch.float32), dense, rtol=0, atol=0)
    torch.testing.assert_close(packed_matmul(x, weight), x @ dense)
