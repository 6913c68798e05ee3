"""How kernels are launched, as far as the driver can be asked."""

import ctypes
from typing import Any

import pytest
import torch

from longwing.kernels.launch import PREFERRED_SHARE, starts_early, take_all_shared

triton: Any = pytest.importorskip("triton")


@triton.jit
def clear(x_ptr):  # type: ignore[no-untyped-def]  # Triton reads annotations, too
    triton.language.store(x_ptr, 0)


def test_without_a_gpu_there_is_nothing_to_do() -> None:
    take_all_shared(None)
    assert not starts_early(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_launched_kernel_asks_for_all_shared_memory() -> None:
    kernel = clear[(1,)](torch.ones(1, dtype=torch.int32, device="cuda"))
    driver, share = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()

    def ask() -> int:
        function = ctypes.c_void_p(kernel.function)
        assert driver.cuFuncGetAttribute(ctypes.byref(share), PREFERRED_SHARE, function) == 0
        return share.value

    assert ask() != 100
    take_all_shared(kernel)
    assert ask() == 100
