"""Norms and activations in Triton against PyTorch's: interpreted on a CPU, or on a GPU."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.layers import RMSNorm, activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
fused: Any = pytest.importorskip("longwing.kernels.fused_triton")
if DEVICE == "cpu" and type(fused.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def _numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=random) + 0.5).to(DEVICE, dtype)


def _assert_rounded(found: Tensor, expected: Tensor) -> None:
    """Equal but for the last bit here and there, where float32 sums went another way."""
    step = 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=step, atol=step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 4544])
def test_two_layer_norms_of_one_input_are_pytorchs(size: int, dtype: torch.dtype) -> None:
    x_TD = _numbers(3, size, dtype=dtype, seed=0)
    pairs = [tuple(_numbers(size, dtype=dtype, seed=s + i) for i in (1, 2)) for s in (0, 2)]
    both = fused.layer_norms(x_TD, pairs[0], pairs[1], 1e-5)
    for found, (weight_D, bias_D) in zip(both, pairs, strict=True):
        _assert_rounded(found, F.layer_norm(x_TD, (size,), weight_D, bias_D, 1e-5))
    for plain_TD, found_TD in zip(
        both, fused.layer_norms(x_TD, pairs[0], pairs[1], 1e-5, arrange=True), strict=True
    ):
        by_lane = plain_TD.unflatten(1, (-1, 4, 2, 2, 2)).permute(0, 1, 3, 5, 2, 4)
        assert torch.equal(found_TD, by_lane.flatten(1))
    one, same = fused.layer_norms(x_TD, pairs[1], None, 1e-5)
    assert one is same
    assert torch.equal(one, both[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 576])
def test_rms_norm_is_the_layers(size: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(size, 1e-6).to(DEVICE, dtype)
    norm.weight.data = _numbers(size, dtype=dtype, seed=1)
    x_TD = _numbers(4, size, dtype=dtype, seed=2)
    with torch.no_grad():
        _assert_rounded(fused.rms_norm(x_TD, norm.weight, 1e-6), norm(x_TD))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", fused.ACTIVATIONS)
def test_activations_are_pytorchs_alone_and_as_a_gate(act: str, dtype: torch.dtype) -> None:
    around_TF = _numbers(3, 2500, dtype=dtype, seed=3)
    gate_TF, up_TF = around_TF[:, :1100], around_TF[:, 1200:2300]
    _assert_rounded(fused.gated(gate_TF, up_TF, act), activation(act)(gate_TF) * up_TF)
    expected_TF, right_TF = activation(act)(gate_TF), up_TF.clone()
    assert fused.activate_(gate_TF, act) is gate_TF
    _assert_rounded(gate_TF, expected_TF)
    assert torch.equal(around_TF[:, 1200:2300], right_TF)


def test_gelu_is_right_where_next_to_nothing_is_left_of_it() -> None:
    """To a rounding of each value, as far out as float16 can tell."""
    x_TF = torch.linspace(-9, 9, 4001)[None].half()
    exact_TF = x_TF.double() * torch.special.ndtr(x_TF.double())
    found_TF = fused.activate_(x_TF.to(DEVICE), "gelu").cpu().double()
    smallest = torch.finfo(torch.float16).smallest_normal
    assert ((found_TF - exact_TF).abs() / exact_TF.abs().clamp(min=smallest)).max() < 2**-10


def test_gelu_of_nan_is_nan() -> None:
    """The hardware's minimum would make it a number, and the interpreter's would not."""
    x_TF = torch.tensor([[1.0, torch.nan, -1.0]], dtype=torch.float16, device=DEVICE)
    assert fused.activate_(x_TF, "gelu").isnan().tolist() == [[False, True, False]]


def test_what_the_kernels_lack_is_refused() -> None:
    x_TF = _numbers(1, 8, dtype=torch.float16, seed=0)
    with pytest.raises(ValueError, match="not one of gelu"):
        fused.activate_(x_TF, "mish")
    with pytest.raises(ValueError, match="holds up to 65536"):
        fused.rms_norm(x_TF.new_empty(1, 70_000), x_TF.new_empty(70_000), 1e-5)


@pytest.mark.parametrize("size", [(0, 64), (1, 1)])
def test_nothing_and_almost_nothing_pass(size: tuple[int, int]) -> None:
    x_TD = torch.ones(size, dtype=torch.float16, device=DEVICE)
    weight_D = torch.ones(size[1], dtype=torch.float16, device=DEVICE)
    assert fused.rms_norm(x_TD, weight_D, 1e-5).shape == size
    assert fused.gated(x_TD, x_TD, "silu").shape == size
