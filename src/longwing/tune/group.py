"""`Group`: several processes that tune one model, each on its share of a step's rows.

Every process holds the whole model; gradients are added up before each step, so all take the same
one, and the result is that of one process but for the order of sums. Start them with torchrun:

    torchrun --nproc-per-node 4 -m longwing tune MODEL OUT …
"""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

R = TypeVar("R")


class Group:
    """This process among those that torchrun started, or alone.

    Attributes:
        rank: its number; 0 writes and speaks.
        size: how many there are.
        local_rank: its number on this machine, and of its GPU.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0
        if dist.is_available() and dist.is_torchelastic_launched():
            if not dist.is_initialized():
                on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
                dist.init_process_group("nccl" if on_gpu else "gloo")
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.local_rank = dist.get_node_local_rank()

    def device(self, device: torch.device) -> torch.device:
        """Where this process computes: of several, each on its own GPU."""
        if self.size == 1 or device.type != "cuda":
            return device
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    def share(self, rows: list[R]) -> list[R]:
        """The rows of a step that are this process's."""
        return rows[self.rank :: self.size]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the sum of all processes'."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process had no row in the step
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def total(self, value: Tensor) -> Tensor:
        """The sum of all processes' numbers."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it holds for one of them at least."""
        if self.size == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=device)) > 0)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """The work is done."""
        if self.size > 1:
            dist.destroy_process_group()
