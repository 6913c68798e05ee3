"""`StepClock`: whether the step that a GPU is at takes longer than any step can.

Ranks of a group meet inside every step, so when one of them hangs the others' GPUs wait for it, and
wait for ever where the meeting is part of a CUDA graph, into which NCCL's own watchdog does not
look, or goes without NCCL (`parallel/peers.py`). So the first rank asks its own GPU, from another
thread, whether it is through; that speaks for all. On a CPU there is no clock: a sum that waits too
long raises by itself (`parallel.Group`).
"""

import time
from collections.abc import Hashable, Sequence

import torch

from longwing.engine.sequence import Work

_PAIRS_PER_S = 2e7
"""Pairs of a new token and one before it that a step attends in a second, on a slow GPU: a tenth of
what an H200 does for Falcon-40B."""

_TOKEN_PAIRS = 40_000
"""What all else costs for a new token, in pairs: Falcon-40B's multiplications."""

_FIRST_S = 300.0
"""Longest time for the first step of its kind: kernels are compiled, graphs recorded."""


class StepClock:
    """Times the steps of one device.

    `begin` and `end` are for the thread that runs them, `overdue` is for any other.

    Args:
        device: where the steps run.
        limit_s: longest time for a step, beside what attention over a long context takes.
    """

    def __init__(self, device: torch.device, limit_s: float) -> None:
        self._limit_s = limit_s
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._kinds: set[Hashable] = set()
        self._kind: Hashable = None
        self._deadline: float | None = None
        self._is_launched = True

    def begin(self, kind: Hashable, pairs: float = 0.0) -> None:
        """A step is about to be launched.

        Args:
            kind: equal for steps that run the same kernels.
            pairs: new tokens times tokens they attend to.
        """
        first = 0.0 if kind in self._kinds else _FIRST_S
        deadline = time.monotonic() + self._limit_s
        if self._deadline is not None and self._is_busy():  # it waits for those before it
            deadline = max(deadline, self._deadline)
        self._kind = kind
        self._deadline = deadline + first + pairs / _PAIRS_PER_S
        self._is_launched = False

    def end(self) -> None:
        """The step is launched; the device may still be at it."""
        self._kinds.add(self._kind)
        if self._done is not None:
            self._done.record()
        self._is_launched = True

    def overdue(self) -> bool:
        """Whether the device should long be through."""
        if self._done is None or self._deadline is None or not self._is_busy():
            return False
        return time.monotonic() > self._deadline

    def is_awaited(self) -> bool:
        """Whether a step was launched that the device is not through with."""
        return self._done is not None and self._is_launched and not self._done.query()

    def _is_busy(self) -> bool:
        """Whether a step was begun that the device is not through with."""
        return self._done is not None and not (self._is_launched and self._done.query())


def kind_of(batch: Sequence[Work], shape: Hashable | None) -> tuple[Hashable, float]:
    """What `StepClock.begin` is told of a batch.

    Args:
        batch: the step's.
        shape: of the graph that it is to run in; None if in none.
    """
    ends = [work.start + len(work.token_ids) for work in batch]
    tokens = sum(len(work.token_ids) for work in batch)
    pairs = sum(
        len(work.token_ids) * (end + _TOKEN_PAIRS) for work, end in zip(batch, ends, strict=True)
    )
    if shape is None:
        shape = (tokens.bit_length(), len(batch).bit_length(), max(ends).bit_length())
    return shape, pairs
