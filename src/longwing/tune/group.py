"""`Group`: several processes that tune one model, each on its share of a step's rows.

Start them with torchrun, one for each GPU:

    torchrun --nproc-per-node 4 -m longwing tune MODEL OUT …

All take the same steps, and the result is that of one process but for the order of sums. Each holds
the whole model, and gradients are added up here; or they hold a part each (`shards.py`).

The one idea: every process does the same calls in the same order, because each call may be one in
which they meet. So shares are equally long, and what may fail for one is agreed upon.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longwing.errors import LongwingError, RequestError, TuningError

R = TypeVar("R")

_PATIENCE = timedelta(hours=1)
"""How long one waits for the others: the first may be writing a large state to a slow disk."""


class FailedElsewhereError(TuningError):
    """Another process of the group failed, and says why; this one ends with it."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"process {rank} of the group failed; what it says is the reason")


class Group:
    """This process among those that torchrun started, or alone.

    A process joins once, however many of these it makes; who made the first `leave`s at the end.

    Args:
        device: where to compute; of several processes on "cuda", each takes a GPU of its own.

    Attributes:
        rank: its number; 0 writes and speaks.
        size: how many there are.
        device: where this process computes.

    Raises:
        RequestError: one GPU for several processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return
        on_gpu = device.type == "cuda"
        if on_gpu:
            self.device = _own_gpu(device)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=_PATIENCE,
                device_id=self.device if on_gpu else None,
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:  # else others may wait where this one will not come; torchrun ends them
            self.leave()

    def mesh(self) -> DeviceMesh:
        """The processes as what tensors are sharded over."""
        return init_device_mesh(self.device.type, (self.size,))

    def share(self, rows: list[R], nothing: R) -> list[R]:
        """The rows of a step that are this process's; all get as many, filled up with `nothing`."""
        filled = [*rows, *[nothing] * (-len(rows) % self.size)]
        return filled[self.rank :: self.size]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the sum of all processes'."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # unreachable: every pass goes through all that is trained
                raise RuntimeError("a trained weight without a gradient")
            dist.all_reduce(parameter.grad)

    def total(self, value: Tensor) -> Tensor:
        """The sum of all processes' numbers, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it holds for one of them at least."""
        if self.size == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)) > 0)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Go on only where none of them has failed.

        Raises:
            FailedElsewhereError: here, if another process failed too and has a lower rank, or
                failed alone. That one raises what was wrong, so it is said once.
        """
        fault: LongwingError | None = None
        try:
            yield
        except LongwingError as error:
            fault = error
        if self.size > 1:
            failed = torch.zeros(self.size, device=self.device)
            failed[self.rank] = float(fault is not None)
            ranks = self.total(failed).nonzero()[:, 0].tolist()
            if ranks and ranks[0] != self.rank:
                raise FailedElsewhereError(ranks[0]) from fault
        if fault is not None:
            raise fault

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """The work is done."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    number, have = dist.get_node_local_rank(), torch.cuda.device_count()
    if device.index is not None:
        raise RequestError(
            f"device {device} is one GPU, and torchrun may start several processes; give cuda, and "
            "each takes its own"
        )
    if number >= have:
        raise RequestError(
            f"process {number} of this machine has no GPU of its own, there are {have}; start "
            f"torchrun with --nproc-per-node {have}"
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own
