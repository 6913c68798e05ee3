"""Peaks of memory are the system's own, and a limit on a GPU is hard."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longwing.engine.ceilings import measure_ceilings
from longwing.engine.footprint import footprint, limit_device
from longwing.errors import CapacityError
from longwing.plan import CONTEXT_BYTES

CPU = torch.device("cpu")
MIB = 2**20


PEAKS = """
import torch
from longwing.engine.footprint import footprint, forget_host_peak

cpu, MiB = torch.device("cpu"), 2**20
large = torch.ones(128 * MiB, dtype=torch.uint8)
with_large = footprint(cpu).host_peak
del large
forget_host_peak()
assert footprint(cpu).host_peak < with_large - 64 * MiB
small = torch.ones(96 * MiB, dtype=torch.uint8)
assert footprint(cpu).host_peak > with_large - 64 * MiB
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_hosts_peak_is_of_what_came_after_it_was_forgotten() -> None:
    # A process of its own: one that has freed much before may have room for both tensors.
    subprocess.run([sys.executable, "-c", PEAKS], check=True, timeout=100)


def test_a_cpu_has_no_device_peak() -> None:
    assert footprint(CPU).device_peak is footprint(CPU).allocated_peak is None


def test_ceilings_of_this_machine_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longwing.engine.ceilings._BUFFER_BYTES", {"cpu": MIB})
    monkeypatch.setattr("longwing.engine.ceilings._MATRIX", {"cpu": 64})
    found = measure_ceilings(CPU, torch.float32)
    assert found.bytes_per_s > 1e8
    assert found.flops_per_s > 1e7


def test_a_limit_below_what_a_process_takes_is_refused() -> None:
    with pytest.raises(CapacityError, match="beside its tensors"):
        limit_device(torch.device("cuda"), CONTEXT_BYTES + MIB, set_aside=MIB)


def test_tensors_may_take_what_context_and_graphs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    total, told = 140 * 2**30, []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (total, total))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given)
    )
    limit_device(torch.device("cuda", 1), 24 * 2**30, set_aside=68 * MIB)
    ((share, index),) = told
    assert share * total + CONTEXT_BYTES + 68 * MIB == pytest.approx(24 * 2**30, abs=1)
    assert index == 1


@pytest.fixture
def _unlimited_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("_unlimited_again")
def test_an_allocation_beyond_the_limit_fails() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    limit_device(device, torch.cuda.memory_reserved() + CONTEXT_BYTES + 512 * MIB)
    held = torch.empty(400 * MIB, dtype=torch.uint8, device=device)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(400 * MIB, dtype=torch.uint8, device=device)
    found = footprint(device)
    assert found.device_peak is not None
    assert held.nbytes <= found.device_peak
