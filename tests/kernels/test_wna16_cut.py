"""How products are cut: what holds for all shapes, and what was measured for Falcon's."""

import pytest
import torch

from longwing.kernels.streamed import CELL_IN, CELL_OUT, TILE_OUT, StreamedWeight
from longwing.kernels.wna16_cut import Cut, ParallelBlock, choose_cut


def _weight(K: int, N: int) -> StreamedWeight:
    """Shapes alone: its tensors hold nothing."""
    panels, chunks = -(-N // TILE_OUT) * (TILE_OUT // CELL_OUT), -(-K // CELL_IN)
    nothing = torch.empty(0, device="meta")
    return StreamedWeight(
        bits=4,
        group_size=128,
        in_features=K,
        parts=(N,),
        dtype=torch.bfloat16,
        words=torch.empty(panels, chunks, 4, 128, device="meta"),
        scales_GN=nothing,
        zeros=None,
        order_K=None,
        arrivals=nothing,
    )


def _block(D: int, qkv: int, F: int, num_tokens: int, ranks: int = 1) -> dict[str, Cut]:
    weights = {
        "attention_in": _weight(D, qkv // ranks),
        "attention_out": _weight(D // ranks, D),
        "mlp_in": _weight(D, F // ranks),
        "mlp_out": _weight(F // ranks, D),
    }
    block = ParallelBlock.of(**weights)
    return {
        name: choose_cut(weight, num_tokens, getattr(block, name))
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9, 16, 17, 32, 64, 200])
@pytest.mark.parametrize(("K", "N"), [(64, 40), (576, 1536), (4544, 18176), (32768, 8192)])
def test_every_program_has_inputs_and_every_token_a_program(
    K: int, N: int, num_tokens: int
) -> None:
    cut = choose_cut(_weight(K, N), num_tokens)
    assert 1 <= cut.splits <= -(-K // CELL_IN)
    assert cut.wide == (num_tokens > 8)
    assert cut.tokens >= min(num_tokens, 64)


def test_falcons_blocks_are_cut_as_was_measured_best() -> None:
    """In splits: bench/cuts.py on an H200, docs/LOG.md."""
    falcon_40b = _block(8192, 9216, 32768, 1)
    assert [cut.splits for cut in falcon_40b.values()] == [8, 2, 1, 8]
    assert [cut.stages for cut in falcon_40b.values()] == [4, 4, 4, 3]
    falcon_7b = _block(4544, 4672, 18176, 1)
    assert [cut.splits for cut in falcon_7b.values()] == [6, 6, 2, 8]
    assert [cut.stages for cut in falcon_7b.values()] == [3, 3, 3, 3]
    assert [cut.splits for cut in _block(8192, 9216, 32768, 8).values()] == [6, 6, 2, 8]


@pytest.mark.parametrize("num_tokens", [1, 8, 16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shape", [(128, 192, 512), (4544, 4672, 18176), (14848, 15872, 59392)])
def test_blocks_of_any_size_leave_every_program_inputs(
    shape: tuple[int, int, int], ranks: int, num_tokens: int
) -> None:
    for name, cut in _block(*shape, num_tokens, ranks).items():
        K = shape[2] if name == "mlp_out" else shape[0]
        shared = ranks if name.endswith("out") else 1
        assert 1 <= cut.splits <= max(-(-K // shared // CELL_IN), 1)
