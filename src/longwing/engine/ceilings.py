"""What a device can do at most, measured: bytes a second and multiply-adds a second.

A benchmark's percentages refer to these, not to a datasheet's figures, which no program reaches.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_REPEATS = 7
_BUFFER_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""By kind of device: far beyond its caches, and some milliseconds to pass over."""

_MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices multiplied."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The rates of one device.

    Attributes:
        bytes_per_s: what its memory delivers: the better of a large copy (bytes read and written)
            and a large sum (bytes read).
        flops_per_s: a large matrix product of random numbers, two for each multiply-add.
    """

    bytes_per_s: float
    flops_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a device's rates; well under a second, and the memory is given back.

    Args:
        device: where.
        dtype: of the matrix product.
    """
    ceilings = Ceilings(
        bytes_per_s=_bandwidth(device),
        flops_per_s=_matrix_rate(device, dtype),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings


def _bandwidth(device: torch.device) -> float:
    source = torch.ones(_BUFFER_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    return max(copied, source.nbytes / _seconds(source.sum, device))


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _MATRIX[device.type]
    # Random: a product of zeros runs faster than any that is of use.
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: one @ other, device)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """The median of some runs after two that do not count."""
    times = []
    for _ in range(2 + _REPEATS):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
