"""The memory of this machine, for plans.

A GPU's is asked of the driver's own tool: asking through PyTorch would take half a gigabyte of it
for this process. The host's is what Linux says is available. Both block for a moment.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

GPU_SHARE = 0.92
"""Part of a GPU that an engine takes where no limit is given (engine/loading.py)."""

_ASK = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_PATIENCE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How much there is, and where.

    Attributes:
        source: "gpu" or "host".
        name: of the card, or "this machine".
        num_bytes: that an engine may use.
    """

    source: str
    name: str
    num_bytes: int


def gpus() -> list[Memory]:
    """Every GPU of the machine, by its number; none where the driver's tool is not there."""
    try:
        done = subprocess.run(
            _ASK, capture_output=True, text=True, timeout=_PATIENCE_S, check=True, errors="replace"
        )
        lines = [line.rpartition(",") for line in done.stdout.splitlines() if line.strip()]
        return [
            Memory(source="gpu", name=name.strip(), num_bytes=int(GPU_SHARE * int(mib) * 2**20))
            for name, _, mib in lines
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def host(held: int = 0) -> Memory:
    """The host's memory.

    Args:
        held: bytes that the running engine holds of it, and would give back.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return Memory(source="host", name="this machine", num_bytes=free + held)


def memory_of(device: str, held: int = 0) -> Memory:
    """The memory that a model on `device` ("auto", "cpu", "cuda" or "cuda:N") would be in."""
    cards = [] if device == "cpu" else gpus()
    number = int(device.partition(":")[2] or 0)
    return cards[number] if number < len(cards) else host(held)
