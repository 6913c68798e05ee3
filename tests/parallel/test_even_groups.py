"""A rank's part under act-order, brought into equal groups: the same product, ready to stream."""

import pytest
import torch

from longwing.kernels import PackedWeight, dequantize, pack
from longwing.kernels.even_groups import even_groups
from longwing.kernels.streamed import fits, stream

N = 64


def part_of_act_order(K: int, group_size: int, bits: int) -> PackedWeight:
    """Half of the inputs of a layer whose groups lie anyhow."""
    generator = torch.Generator().manual_seed(bits)
    G = 2 * K // group_size
    shuffled_K = torch.randperm(2 * K, generator=generator)[:K] // group_size
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=pack(torch.randint(0, 2**bits, (K, N), generator=generator), bits, 0),
        zeros_GN=torch.randint(0, 2**bits, (G, N), generator=generator).to(torch.uint8),
        scales_GN=torch.rand((G, N), generator=generator).half() + 0.5,
        g_idx_K=shuffled_K.int(),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("K", "group_size"), [(128, 32), (512, 128), (480, 96)])
def test_a_part_with_equal_groups_multiplies_to_the_same(
    K: int, group_size: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = part_of_act_order(K, group_size, bits)
    monkeypatch.setattr("longwing.kernels.even_groups.VALUES_AT_ONCE", 700 * 20)  # several slices
    evened, order_E = even_groups(weight)
    assert evened.in_features == len(order_E) > K
    assert evened.in_features < K + len(weight.scales_GN) * evened.group_size
    x_TK = torch.randn(3, K, dtype=torch.float64)
    expected_TN = x_TK @ dequantize(weight, torch.float64)
    found_TN = x_TK[:, order_E] @ dequantize(evened, torch.float64)
    torch.testing.assert_close(found_TN, expected_TN)


def test_groups_cut_on_a_whole_number_of_inputs_are_not_filled_up() -> None:
    """128 in a group, 192 inputs a rank: the first has one whole group and half of the next."""
    weight = part_of_act_order(384, 128, 4)
    g_idx_K = torch.arange(192, 576, dtype=torch.int32) // 128
    evened, order_E = even_groups(replace_g_idx(weight, g_idx_K))
    assert order_E.tolist() == list(range(384))
    assert evened.group_size == 64


def replace_g_idx(weight: PackedWeight, g_idx_K: torch.Tensor) -> PackedWeight:
    return PackedWeight(**{**vars(weight), "g_idx_K": g_idx_K})


def test_a_gpu_streams_it_and_knows_how_many_inputs_it_is_given() -> None:
    weight = part_of_act_order(512, 128, 4)
    assert fits(weight)
    streamed = stream([weight], torch.float16)
    assert streamed.num_inputs == 512 < streamed.in_features
    assert streamed.order_K is not None
    assert len(streamed.order_K) == streamed.in_features
    with pytest.raises(ValueError, match="g_idx must share"):
        stream([weight, weight], torch.float16)
