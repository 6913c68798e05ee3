"""`Peers`: small sums over GPUs that write into each other's memory, without NCCL.

In decoding a sum is of some kilobytes, and what it costs is the waiting: NCCL's takes several times
as long as the bytes travel, in each of 60 blocks of a token, and what is added to the sum and
normed after it are launches of their own. Here all of that is one launch (`peers_device.py`), which
a CUDA graph can hold: each GPU writes its part into all others' memory, waits for theirs in its
own, and adds.

The memory is what torch calls symmetric: allocated by each rank, mapped by all. It is asked for
without multicast, which nothing here uses. All ranks have it, or none: they agree when they meet.

The one idea: nobody waits for a rank to have read. There are two slots, and who has heard from all
others at one turn knows that they are done with the turn before.

Shape key: T tokens, D model dim, X norms.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from longwing.kernels.launch import take_all_shared
from longwing.kernels.norm_fold import Scaled

if TYPE_CHECKING:
    from longwing.parallel.group import Group

_log = logging.getLogger(__name__)

TILE = 1024
"""Numbers that a program adds: 16 bytes of a 16-bit type for each of 128 lanes."""

PROGRAMS = 512
"""At most: all run at once, as they must where each waits for another GPU's. 64 tokens of 8,192."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of CUDA's driver."""


def memory_bytes(size: int) -> int:
    """Bytes of each rank's memory, for a group of `size`: two slots of tiles, and flags."""
    return 2 * size * PROGRAMS * TILE * 4 + size * PROGRAMS * 4


class Peers:
    """Adds tensors over ranks; every rank calls the same with equal shapes, in the same order.

    Args:
        rank: of this process.
        addresses: of every rank's memory as this one sees it, `memory_bytes` of zeros each.
        device: of the tensors.
        keep: what keeps that memory mapped.
    """

    _num_meetings: ClassVar[int] = 0

    def __init__(
        self, rank: int, addresses: Sequence[int], device: torch.device, keep: object = None
    ) -> None:
        self.rank, self.size = rank, len(addresses)
        self._memories = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._turns = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        self._keep = keep

    @classmethod
    def meet(cls, group: "Group") -> "Peers | None":
        """Map each other's memory; None, on every rank, where one of them cannot.

        Raises:
            EngineError: another rank did not come.
        """
        own, found, reason = None, None, ""
        # Whatever keeps this machine from it (an OS, a driver, a torch of another mind): NCCL can.
        try:
            cls._check_meetings(group)
            _check_links(group)
            own = _symmetric(group)
        except Exception as error:
            reason = _first_line(error)
        if _all(group, own is not None):  # a rank that waited for one which does not come: a minute
            try:
                found = cls._mapped(group, own)
            except Exception as error:
                reason = _first_line(error)
            if _all(group, found is not None):
                _log.info("sums of few tokens go straight from GPU to GPU")
                return found
        _log.warning("all sums go through NCCL: %s", reason or "another rank has no peers")
        return None

    @classmethod
    def _check_meetings(cls, group: "Group") -> None:
        """See that every rank's process has met as often: torch numbers meetings by process.

        Raises:
            RuntimeError: they have not, and would wait for each other in vain.
        """
        own = torch.tensor([cls._num_meetings], device=group.device)
        if len({*group.all_gather(own, 0).tolist()}) > 1:
            raise RuntimeError("a process that has met other ranks before cannot meet new ones")

    @classmethod
    def _mapped(cls, group: "Group", own: Tensor | None) -> "Peers":
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symmetric

        world = dist.group.WORLD
        if world is None or own is None:  # unreachable: the group has met, and all have memory
            raise RuntimeError("there is no process group, or no memory to be shared")
        cls._num_meetings += 1
        handle = symmetric.rendezvous(own, world.group_name)
        addresses = [
            handle.get_buffer(rank, own.shape, own.dtype).data_ptr() for rank in range(group.size)
        ]
        if addresses[group.rank] != own.data_ptr() or any(at % 16 for at in addresses):
            raise RuntimeError("memory that was mapped is not where it should be")
        torch.cuda.synchronize(group.device)
        return cls(group.rank, addresses, group.device, keep=(own, handle))

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor can be added here: the same answer on every rank."""
        return (
            tensor.ndim > 0
            and 0 < tensor.numel() <= PROGRAMS * TILE
            and tensor.dtype in DTYPES
            and tensor.is_contiguous()
        )

    def add(
        self, x: Tensor, more: Tensor | None = None, *, norms_D: Sequence[Tensor] = ()
    ) -> Scaled | None:
        """Write the sum over ranks over x; or over `more`, with that added.

        On the current stream, and waits for nothing on the host.

        Args:
            x: this rank's part; see `takes`.
            more: what is added to the sum, the same on every rank.
            norms_D: weights of the LayerNorms that follow, one or two, of (T, D) tensors.

        Returns:
            What those norms' products need; None without norms, and where D is no multiple of TILE,
            so that a tile may be of two tokens.
        """
        from longwing.parallel.peers_device import add_over_ranks

        out = x if more is None else more
        numel, D = x.numel(), x.shape[-1]
        if D % TILE:
            norms_D = ()
        scaled = Scaled.like(out, norms_D, TILE) if norms_D else None
        norms = (*norms_D, None, None)[:2]
        to: tuple[Tensor | None, ...] = (None, None, None)
        if scaled is not None:
            to = (scaled.digits_X3TK, scaled.steps_XCT, scaled.stats_ST2)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernel = add_over_ranks[(-(-numel // TILE),)](
                *(x, more, out, *norms, *to, self._memories, self._turns),
                *(numel // D, D, numel),
                RANK=self.rank,
                SIZE=self.size,
                PROGRAMS=PROGRAMS,
                TILE=TILE,
                num_warps=4,
            )
            take_all_shared(kernel)
        return scaled


def _symmetric(group: "Group") -> Tensor:
    """This rank's memory, zeroed, to be mapped by the others."""
    # Torch would make a multicast object of its own accord; nothing here needs one.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric

    from longwing.parallel import peers_device  # noqa: F401  # is there Triton?

    own: Tensor = symmetric.empty(memory_bytes(group.size), dtype=torch.uint8, device=group.device)
    return own.zero_()


def _all(group: "Group", mine: bool) -> bool:
    """Whether every rank says yes."""
    return float(group.all_reduce(torch.tensor(float(mine), device=group.device))) == group.size


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_links(group: "Group") -> None:
    """See that the GPUs can do atomics in each other's memory: over NVLink they can.

    Raises:
        RuntimeError: they cannot.
    """
    own = torch.tensor([group.device.index or 0], device=group.device)
    numbers = group.all_gather(own, 0).tolist()
    driver = ctypes.CDLL("libcuda.so.1")
    devices = []
    for number in numbers:
        device = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), number):
            raise RuntimeError(f"rank {group.rank} does not see GPU {number}")
        devices.append(device)
    mine = devices[group.rank]
    for rank, device in enumerate(devices):
        can = ctypes.c_int()
        failed = rank != group.rank and driver.cuDeviceGetP2PAttribute(
            ctypes.byref(can), _NATIVE_ATOMICS, mine, device
        )
        if rank != group.rank and (failed or not can.value):
            raise RuntimeError(
                f"GPU {numbers[group.rank]} cannot do atomics in the memory of GPU {numbers[rank]}"
            )
