"""Rotation and the write to the pages in Triton: the reference's bits."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from longwing.kernels import KVPages, rotate, write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
write_triton: Any = pytest.importorskip("longwing.kernels.write_triton")
if DEVICE == "cpu" and type(write_triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def _projection(T: int, N: int, K: int, H: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as parts of one tensor, of which some vectors are zero or tiny."""
    torch.manual_seed(0)
    qkv_TXH = torch.randn(T, N + 2 * K, H)
    qkv_TXH[0] = 0
    qkv_TXH[-1] *= 1e-5
    return list(qkv_TXH.to(dtype).split([N, K, K], 1))


def _assert_same_bits(
    parts: list[Tensor], cos_TF: Tensor | None, sin_TF: Tensor | None, kv: str
) -> None:
    """Against the reference on the CPU: torch's division by a number is inexact on a GPU."""
    q_TNH, k_TKH, v_TKH = parts
    T, K, H = k_TKH.shape
    slots_T = torch.randperm(4 * 16)[:T]
    expected, actual = (KVPages.allocate(4, 16, K, H, kv, device) for device in ("cpu", DEVICE))
    moved = [x.to(DEVICE) if x is not None else None for x in (*parts, cos_TF, sin_TF)]
    rotated = write_triton.rotate_and_write(*moved, actual, slots_T.to(DEVICE))
    if cos_TF is not None and sin_TF is not None:
        q_TNH, k_TKH = (rotate(x, cos_TF, sin_TF) for x in (q_TNH, k_TKH))
    write_kv(k_TKH, v_TKH, expected, slots_T)
    assert torch.equal(rotated.cpu(), q_TNH)
    for ours, theirs in zip(vars(actual).values(), vars(expected).values(), strict=True):
        assert ours is theirs is None or torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("kv", ["float32", "float16", "int8"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "K"), [(4, 4), (20, 3), (71, 1)])
def test_one_launch_leaves_the_bits_of_rotate_and_write(
    N: int, K: int, dtype: torch.dtype, kv: str
) -> None:
    angles_TF = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    parts = _projection(7, N, K, 64, dtype)
    _assert_same_bits(parts, angles_TF.cos(), angles_TF.sin(), kv)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 256])
def test_every_head_dimension_is_rotated_and_written(head_dim: int) -> None:
    angles_TF = torch.randn(3, head_dim // 2, generator=torch.Generator().manual_seed(1))
    parts = _projection(3, 5, 2, head_dim, torch.float16)
    _assert_same_bits(parts, angles_TF.cos(), angles_TF.sin(), "int8")


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_without_rotation_keys_are_written_as_they_are(kv: str) -> None:
    _assert_same_bits(_projection(5, 4, 2, 64, torch.float32), None, None, kv)


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_a_token_without_a_slot_is_stored_nowhere(kv: str) -> None:
    q_TNH, k_TKH, v_TKH = (x.to(DEVICE) for x in _projection(3, 4, 2, 64, torch.float16))
    slots_T = torch.tensor([5, -1, 17], dtype=torch.int32, device=DEVICE)
    written, whole = (KVPages.allocate(2, 16, 2, 64, kv, DEVICE) for _ in "ab")
    write_triton.rotate_and_write(q_TNH, k_TKH, v_TKH, None, None, written, slots_T)
    stored = [0, 2]
    write_kv(k_TKH[stored], v_TKH[stored], whole, slots_T[stored].long())
    for ours, theirs in zip(vars(written).values(), vars(whole).values(), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
