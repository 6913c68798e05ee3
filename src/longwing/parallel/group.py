"""`Group`: the processes that run one model together, and the sums between them.

Over `torch.distributed`: NCCL between GPUs, gloo on CPUs. Only tensors travel, never pickled
objects. A group of one is free: every method returns what it was given, and torch.distributed is
not even imported.

The one idea: all ranks run the same steps in the same order, so a sum is where they meet. A rank
that does not come (dead, hung) is noticed there, by the others' timeout, and ends them too: half a
model cannot answer. On CPUs the sum raises `EngineError`. On GPUs a sum is only queued: what waits
is NCCL's watchdog, which ends the process after the same time, and so frees its GPU; whoever
watches the process sees it go.

GPUs that reach into each other's memory add small tensors without NCCL (`peers.py`), sooner. Such a
sum no watchdog sees, and none that a graph replays: whoever launches it watches the GPU himself
(`engine/step_clock.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import torch
from torch import Tensor

from longwing.errors import EngineError, RequestError

if TYPE_CHECKING:  # the kernels' file, and torch.distributed, are for those who are several
    from longwing.kernels.norm_fold import Scaled
    from longwing.parallel.peers import Peers

TIMEOUT_S = 10.0
"""How long a sum waits for the other ranks before the group counts as lost."""


class Group:
    """Some processes of which this is one.

    Attributes:
        rank: which of them this is, from 0.
        size: how many they are.
        device: of the tensors to be summed.
        timeout_s: how long a sum waits for the others.
        peers: what adds small tensors of GPUs; None where NCCL or gloo adds all of them.
    """

    peers: "Peers | None" = None

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if not 0 <= rank < size:
            raise RequestError(f"rank {rank} is not one of a group of {size}: 0 to {size - 1}")
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self.timeout_s = timeout_s

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        meeting: str,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = TIMEOUT_S,
        meeting_timeout_s: float = 60.0,
    ) -> "Group":
        """Meet the other ranks; a group of one meets nobody.

        One group a process: torch.distributed knows no more.

        Args:
            rank: of this process.
            size: of the group.
            meeting: where they meet: "tcp://HOST:PORT", of rank 0, or "file:///PATH" on a disk they
                share, of a file that does not exist yet.
            device: of the tensors to be summed: gloo for a CPU, NCCL for GPUs.
            timeout_s: how long a sum waits for the others.
            meeting_timeout_s: how long the meeting itself may take; loading is not counted.

        Raises:
            RequestError: a rank outside the group, or a meeting that is no place.
            EngineError: not all came in time, or torch lacks the backend.
        """
        group = cls(rank, size, device=device, timeout_s=timeout_s)
        if size == 1:
            return group
        import torch.distributed as dist

        on_gpu = group.device.type == "cuda"
        if on_gpu:  # NCCL and kernels are queued on the current device
            torch.cuda.set_device(group.device)
        with group._lost_if_it_fails(f"could not be met within {meeting_timeout_s:g} s"):
            store = _meet(rank, size, meeting, timedelta(seconds=meeting_timeout_s))
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=group.device if on_gpu else None,
            )
        if on_gpu:
            from longwing.parallel.peers import Peers

            group.peers = Peers.meet(group)
        return group

    def shard_of(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim`, one of `size` equal ones: a view, or all of it if alone.

        Raises:
            RequestError: the dimension is not a multiple of the group's size.
        """
        length = tensor.shape[dim]
        if length % self.size:
            raise RequestError(
                f"{length} of dimension {dim} are not a multiple of {self.size} ranks"
            )
        part = length // self.size
        return tensor.narrow(dim, self.rank * part, part)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, the same bits on each of them.

        On a GPU it is queued on the current stream and waits for nothing, so a CUDA graph can hold
        it.

        Raises:
            EngineError: another rank did not come in time, or is gone.
        """
        if self.peers is not None and self.peers.takes(tensor):
            self.peers.add(tensor)
        elif self.size > 1:
            whole = tensor.contiguous()
            self._run("all_reduce", lambda dist: dist.all_reduce(whole))
            if whole is not tensor:
                tensor.copy_(whole)
        return tensor

    def add_sum(
        self, hidden_TD: Tensor, part_TD: Tensor, norms_D: "Sequence[Tensor]" = ()
    ) -> "Scaled | None":
        """Add the sum over all ranks of their parts to hidden states that each has whole, in place.

        Args:
            hidden_TD: (T, D), written over.
            part_TD: this rank's part of the sum; what it holds afterwards is not said.
            norms_D: (D,) weights of the LayerNorms that follow, to be folded (`kernels/norm_fold`).

        Returns:
            What the norms' products need; None where whoever follows is to norm for itself.

        Raises:
            EngineError: as `all_reduce`.
        """
        if self.peers is None or not (self.peers.takes(part_TD) and hidden_TD.is_contiguous()):
            hidden_TD.add_(self.all_reduce(part_TD))
            return None
        return self.peers.add(part_TD, hidden_TD, norms_D=norms_D)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The ranks' tensors side by side along `dim`, in order of rank; all of one shape.

        Raises:
            EngineError: as `all_reduce`.
        """
        if self.size == 1:
            return tensor
        whole = tensor.contiguous()
        parts = [torch.empty_like(whole) for _ in range(self.size)]
        self._run("all_gather", lambda dist: dist.all_gather(parts, whole))
        return torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The source's values in everybody's tensor, in place.

        Raises:
            EngineError: as `all_reduce`.
        """
        if self.size > 1:
            self._run("broadcast", lambda dist: dist.broadcast(tensor, source))
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here.

        Raises:
            EngineError: as `all_reduce`.
        """
        nothing = torch.zeros((), device=self.device)  # of a shape that peers leave to NCCL
        self.all_reduce(nothing).item()

    def close(self) -> None:
        """Leave the group; the others' next sum fails. Closing twice is harmless."""
        self.peers = None
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, what: str, work: Callable[[Any], object]) -> None:
        import torch.distributed as dist

        with self._lost_if_it_fails(f"was lost in {what} (after {self.timeout_s:g} s at most)"):
            work(dist)

    @contextmanager
    def _lost_if_it_fails(self, how: str) -> Iterator[None]:
        """Turn torch's faults into the house's; gloo and NCCL raise RuntimeErrors of many words."""
        try:
            yield
        except (RuntimeError, ValueError) as fault:
            first = str(fault).strip().splitlines()[0] if str(fault).strip() else "no reason given"
            raise EngineError(
                f"the group of {self.size} {how} by rank {self.rank}: {first}"
            ) from fault


def _meet(rank: int, size: int, meeting: str, timeout: timedelta) -> Any:
    """The store in which ranks find each other, once all of them are there."""
    import torch.distributed as dist

    place = urlsplit(meeting)
    if place.scheme == "tcp" and place.hostname and place.port:
        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            place.hostname, place.port, size, is_master=rank == 0, timeout=timeout
        )
    elif place.scheme == "file" and place.path:
        store = dist.FileStore(place.path, size)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
    else:
        raise RequestError(f'meeting "{meeting}" is neither tcp://HOST:PORT nor file:///PATH')
    # Sums wait for less long than a meeting may take, so everybody must be here before the first.
    store.set(f"rank {rank} is here", "yes")
    store.wait([f"rank {other} is here" for other in range(size)], timeout)
    return store
