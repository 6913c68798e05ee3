"""`Footprint`: the most memory this process has held, on its device and on the host.

On a GPU the driver's own count is asked, so that what lies outside of PyTorch's allocator (the
context, compiled kernels, CUDA graphs) is in it; and `limit_device` makes a limit hard.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from longwing.errors import CapacityError
from longwing.plan import CONTEXT_BYTES, format_size


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peaks in bytes.

    Attributes:
        device_peak: the most of the GPU's memory held; None on a CPU. The allocator's peak, and
            what this machine's programs hold beside it now: right if no other uses the card.
        reserved_peak: of it, the most that PyTorch's allocator held.
        allocated_peak: of that, the most in tensors at once.
        host_peak: the most of the host's memory resident since `forget_host_peak`.
    """

    device_peak: int | None
    reserved_peak: int | None
    allocated_peak: int | None
    host_peak: int


def footprint(device: torch.device) -> Footprint:
    """The peaks so far."""
    if device.type != "cuda":
        return Footprint(
            device_peak=None, reserved_peak=None, allocated_peak=None, host_peak=_host_peak()
        )
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return Footprint(
        device_peak=beside + reserved,
        reserved_peak=reserved,
        allocated_peak=torch.cuda.max_memory_allocated(device),
        host_peak=_host_peak(),
    )


def limit_device(device: torch.device, memory: int, *, set_aside: int = 0) -> None:
    """Let no allocation of this process go beyond `memory` bytes of a GPU: it fails instead.

    PyTorch's limit is on its own allocator; what the process takes beside it is set aside as plans
    do: CONTEXT_BYTES, and more.

    Args:
        device: the GPU.
        memory: bytes for all.
        set_aside: of them, for CUDA graphs that will be recorded (`plan.graphs_bytes`), and NCCL.

    Raises:
        CapacityError: not even what is set aside fits.
    """
    beside = CONTEXT_BYTES + set_aside
    if memory <= beside:
        raise CapacityError(
            f"{format_size(memory)} of GPU memory is no more than the {format_size(beside)} that "
            "a process takes for context, kernels and graphs, beside its tensors; allow more"
        )
    _, total = torch.cuda.mem_get_info(device)
    share = min((memory - beside) / total, 1.0)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(share, index)


def forget_host_peak() -> None:
    """Count the host's peak from now on, where the system can (Linux); elsewhere from the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _host_peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
