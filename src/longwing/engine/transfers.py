"""Numbers between host and device, without waiting for what the device is doing.

That takes pinned memory: a copy from or to any other lets the device first finish all it was given.

Shape key: R rows; R1 is a column, a number of each row.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def placed(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers on a device, one a row: (R, 1)."""
    return placed(values, dtype, device)[:, None]


def take(x_R: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, which ascend; the tensor itself if they are all."""
    if len(rows) == len(x_R):
        return x_R
    return x_R.index_select(0, placed(rows, torch.int64, x_R.device))


def put(x_R: Tensor, rows: Sequence[int], new_R: Tensor) -> Tensor:
    """The tensor with some rows replaced; the new one itself if they are all."""
    if len(rows) == len(x_R):
        return new_R
    return x_R.index_copy(0, placed(rows, torch.int64, x_R.device), new_R)


class Answer:
    """Tensors on their way from a device to the host, behind all that the device was given before.

    What it is given afterwards does not wait for them.

    Args:
        tensors: of one device, one at least; not to be changed before they have been read.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._on_host = list(tensors)
        self._arrived: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            self._on_device = list(tensors)  # as long as they are under way
            self._arrived = torch.cuda.Event()
            stream = _stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._on_host = [_sent(tensor) for tensor in tensors]
                self._arrived.record(stream)

    def read(self) -> list[Tensor]:
        """Them, on the host, once they are there; what the device was given since goes on."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._on_device = []
        return self._on_host


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """A line for copies: to begin and end one among kernels takes them some 8 µs."""
    return torch.cuda.Stream(device)


def _sent(tensor: Tensor) -> Tensor:
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)
