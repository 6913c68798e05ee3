"""What begins and ends a decoding step, in Triton: what PyTorch gives, to the last bit."""

import os
from typing import Any

import pytest
import torch

from longwing.kernels import likeliest, take_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
step_triton: Any = pytest.importorskip("longwing.kernels.step_triton")
if DEVICE == "cpu" and type(step_triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("V", [1, 100, 16_384, 40_001])
def test_the_likeliest_token_is_the_first_of_the_highest(V: int, dtype: torch.dtype) -> None:
    """Rounded to few values, so that most rows have several."""
    generator = torch.Generator().manual_seed(V)
    whole_SV = (torch.randn(6, V + 3, generator=generator) * 2).round().to(dtype)
    logits_SV = whole_SV[:, :V]
    found = step_triton.likeliest(logits_SV.to(DEVICE))
    expected = likeliest(logits_SV)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert expected.chosen_S2[:, 0].tolist() == [
        row.index(max(row)) for row in logits_SV.float().tolist()
    ]


def test_a_row_without_a_usable_token_says_so_and_names_one_that_there_is() -> None:
    logits_SV = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(0)).half()
    logits_SV[0, 19_999] = torch.nan
    logits_SV[1, 0] = torch.inf
    logits_SV[2] = -torch.inf
    logits_SV[3, 1:] = -torch.inf
    logits_SV[4] = torch.nan
    for chosen_S2 in (
        step_triton.likeliest(logits_SV.to(DEVICE)).chosen_S2.cpu(),
        likeliest(logits_SV).chosen_S2,
    ):
        assert chosen_S2[:, 1].tolist() == [0, 0, 0, 1, 0, 1]
        assert chosen_S2[3, 0] == 0
        assert ((chosen_S2[:, 0] >= 0) & (chosen_S2[:, 0] < 20_000)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("D", [3, 64, 4544])
def test_rows_are_taken_as_they_lie(D: int, index: torch.dtype, dtype: torch.dtype) -> None:
    tables = [torch.randn(2, 11, D).to(dtype)[i] for i in range(2)]
    index_T = torch.tensor([[10, 1], [0, 2], [0, 3], [7, 4]], dtype=index)[:, 0]
    for num in (1, 2):
        moved = [table_LD.to(DEVICE) for table_LD in tables[:num]]
        found = step_triton.take_rows(index_T.to(DEVICE), *moved)
        expected = take_rows(index_T, *tables[:num])
        assert len(found) == num
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(expected[-1], tables[num - 1][index_T])


def test_no_rows_are_no_work() -> None:
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    (rows_TD,) = step_triton.take_rows(empty, torch.randn(5, 8, device=DEVICE))
    assert rows_TD.shape == (0, 8)
    assert step_triton.likeliest(torch.empty(0, 9, device=DEVICE)).chosen_S2.shape == (0, 2)
