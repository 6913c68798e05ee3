"""`Branch`: a second line of work beside the first, inside a CUDA graph."""

from collections.abc import Callable
from functools import cache

import torch


class Branch:
    """A second line of work, where a CUDA graph is being captured; elsewhere the same line.

    In a graph two branches run beside each other, and the GPU fills the gaps of one with the other:
    attention waits for memory where a product streams. The line that is captured on has the higher
    priority (`engine/graphs.py`). What runs here must write to tensors that were there before and
    stay until `join`, or to its own that nothing else uses: the allocator knows nothing of other
    lines.
    """

    def __init__(self, device: torch.device) -> None:
        self._main = self._side = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._main, self._side = torch.cuda.current_stream(), _side_stream(device)

    def run(self, call: Callable[..., object], *args: object, only_beside: bool = False) -> None:
        """Do this after what has been begun so far; not at all if it helps only beside others."""
        if self._main is None or self._side is None:
            if not only_beside:
                call(*args)
            return
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            call(*args)

    def join(self) -> None:
        """Let what follows wait for all that was run here."""
        if self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
