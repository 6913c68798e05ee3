"""How a multiprocessor's memory is shared out between its L1 cache and its programs.

The driver chooses a share for each kernel, and to change it a multiprocessor must come to rest
first. So kernels that run beside each other, each with another share, wait for each other: a block
of Falcon-7B takes 61 us behind 24K tokens where the driver chooses, and 46 where all its kernels
ask for the same (H200).
"""

import ctypes
from functools import cache
from typing import Any

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
def _prefer(function: int, percent: int) -> None:
    """Once for each loaded kernel. It is a hint: that a driver does not take it is no error."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_SHARE, percent)
