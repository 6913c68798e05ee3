"""Sums by GPUs that write into each other's memory: by two processes that share some of the host's.

Triton's interpreter runs the kernel, in each of two forked processes, on memory that both have
mapped at one address; flags and waits are real. GPUs are in `models/test_tensor_parallel.py`.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton: Any = pytest.importorskip("triton")
if type(triton.language.max).__name__ == "JITFunction":
    pytest.skip("this needs Triton's interpreter", allow_module_level=True)

from longwing.kernels.digits import Digits  # noqa: E402
from longwing.kernels.norm_fold import Scaled  # noqa: E402
from longwing.parallel import Group  # noqa: E402
from longwing.parallel import peers as module  # noqa: E402
from longwing.parallel.peers import TILE, Peers, memory_bytes  # noqa: E402

SIZE, T, D = 2, 3, 2 * TILE
SHAPES = [(T, D), (1, 7), (T, D), (5, 300), (1, 7), (T, D)]
"""Of sums after each other: programs come unequally often."""


def _part(rank: int, turn: int, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(10 * turn + rank)
    return torch.randn(SHAPES[turn], generator=generator).to(dtype)


def _by_two(work: Callable[[Peers], dict[str, Tensor]], room: Path) -> list[dict[str, Tensor]]:
    """What a call gives each of two processes."""
    memories = [torch.zeros(memory_bytes(SIZE), dtype=torch.uint8) for _ in range(SIZE)]
    for memory in memories:
        memory.share_memory_()
    pids = []
    for rank in range(SIZE):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                signal.alarm(60)  # whoever waits in vain ends
                torch.set_num_threads(1)
                addresses = [memory.data_ptr() for memory in memories]
                torch.save(work(Peers(rank, addresses, torch.device("cpu"))), room / str(rank))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        pids.append(pid)
    assert not any(os.waitpid(pid, 0)[1] for pid in pids)
    return [torch.load(room / str(rank)) for rank in range(SIZE)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_sums_of_many_shapes_after_each_other_are_exact_and_equal_on_all_ranks(
    tmp_path: Path,
) -> None:
    def sums(peers: Peers) -> dict[str, Tensor]:
        parts = [_part(peers.rank, turn) for turn in range(len(SHAPES))]
        for part in parts:
            assert peers.takes(part)
            assert peers.add(part) is None
        return {str(turn): part for turn, part in enumerate(parts)}

    first, second = _by_two(sums, tmp_path)
    for turn in range(len(SHAPES)):
        expected = (_part(0, turn).float() + _part(1, turn).float()).half()
        assert torch.equal(first[str(turn)], expected)
        assert torch.equal(second[str(turn)], expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_is_added_to_and_the_norms_that_follow_are_part_of_the_sum(tmp_path: Path) -> None:
    hidden_TD, norms_XD = torch.randn(T, D).half(), torch.randn(2, D).half()

    def step(peers: Peers) -> dict[str, Tensor]:
        own_TD = hidden_TD.clone()
        group = Group(peers.rank, SIZE)
        group.peers = peers
        scaled = group.add_sum(own_TD, _part(peers.rank, 0), tuple(norms_XD))
        assert isinstance(scaled, Scaled)
        return {
            "hidden": own_TD,
            "digits": scaled.digits_X3TK,
            "steps": scaled.steps_XCT,
            "stats": scaled.stats_ST2,
        }

    for found in _by_two(step, tmp_path):
        whole_TD = (_part(0, 0).float() + _part(1, 0).float() + hidden_TD.float()).half()
        assert torch.equal(found["hidden"], whole_TD)
        for norm_D, digits_3TK, steps_CT in zip(
            norms_XD, found["digits"], found["steps"], strict=True
        ):
            scaled = Digits.of((whole_TD.float() * norm_D.float()).half())
            assert torch.equal(digits_3TK, scaled.digits_3TK)
            assert torch.equal(steps_CT, scaled.steps_CT)
        tiles_TSN = whole_TD.double().unflatten(1, (-1, TILE))
        sums_ST2 = torch.stack((tiles_TSN.sum(-1), tiles_TSN.square().sum(-1)), -1).transpose(0, 1)
        assert torch.equal(found["stats"], sums_ST2.float())


class _Ranks:
    """Two ranks in threads of one process: who they are, and two ways to meet."""

    device = torch.device("cpu")

    def __init__(self, rank: int, meeting: threading.Barrier, left: dict[int, Tensor]) -> None:
        self.rank, self.size, self._meeting, self._left = rank, SIZE, meeting, left

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        self._left[self.rank] = tensor.clone()
        self._meeting.wait(10)
        whole = torch.stack([self._left[rank] for rank in range(SIZE)])
        self._meeting.wait(10)
        return whole.flatten()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.all_gather(tensor, 0).sum()


def test_nobody_maps_memory_unless_all_ranks_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever went on alone would wait a minute for the others."""
    mapped: list[int] = []

    def symmetric(group: _Ranks) -> Tensor:
        if group.rank == 1:
            raise RuntimeError("no memory on rank 1")
        return torch.zeros(1)

    monkeypatch.setattr(module, "_check_links", lambda group: None)
    monkeypatch.setattr(module, "_symmetric", symmetric)
    monkeypatch.setattr(Peers, "_mapped", lambda group, own: mapped.append(group.rank))
    meeting, left = threading.Barrier(SIZE), dict[int, Tensor]()
    with ThreadPoolExecutor(SIZE) as pool:
        groups: list[Any] = [_Ranks(rank, meeting, left) for rank in range(SIZE)]
        assert list(pool.map(Peers.meet, groups)) == [None, None]
    assert not mapped


def test_what_is_too_large_or_lies_apart_is_left_to_others() -> None:
    peers = Peers(0, [0, 0], torch.device("cpu"))
    assert peers.takes(torch.zeros(64, 8192, dtype=torch.bfloat16))
    assert not peers.takes(torch.zeros(65, 8192, dtype=torch.bfloat16))
    assert not peers.takes(torch.zeros(8, 8).T[:4])
    assert not peers.takes(torch.zeros(8, dtype=torch.int64))
