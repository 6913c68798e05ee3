"""How kernels are launched that run beside and right behind each other.

The driver shares a multiprocessor's memory out between its L1 cache and its programs, for each
kernel as it thinks best, and to change that the multiprocessor must come to rest. So kernels that
run beside each other, each with another share, wait for each other: a block of Falcon-7B takes
61 us behind 24K tokens where the driver chooses, and 46 where all its kernels ask for the same
(H200).
"""

import ctypes
from functools import cache
from typing import Any

import torch

PREFERRED_SHARE = 9
"""The driver's CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent."""


def take_all_shared(kernel: Any) -> None:
    """Let a compiled Triton kernel ask for as much shared memory as there is, from now on.

    Args:
        kernel: what a launch returned; None in Triton's interpreter, where there is nothing to do.
    """
    if kernel is not None and kernel.metadata.target.backend == "cuda":
        _prefer(kernel.function, 100)


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends (Hopper and later).

    A kernel so launched may look up where its work lies, and only then waits for the memory of
    those before it; so what it looks up must be older than the launch just before. Page tables are.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _prefer(function: int, percent: int) -> None:
    """Once for each loaded kernel. It is a hint: that a driver does not take it is no error."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_SHARE, percent)
