"""Groups: of one, for nothing; and of two processes over gloo."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longwing.errors import EngineError, RequestError
from longwing.parallel import Group

SCRIPT = Path(__file__).with_name("two_ranks.py")


def two_ranks(trial: str, meeting: str) -> list[dict[str, Any] | None]:
    """Run both ranks of a trial; what each says, None of one that said nothing."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), meeting, trial],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = []
    for rank in ranks:
        out, errors = rank.communicate(timeout=60)
        assert out or rank.returncode == 7 or trial == "hangs", errors
        said.append(json.loads(out.splitlines()[-1]) if out else None)
    return said


def test_a_group_of_one_gives_back_what_it_is_given() -> None:
    with Group() as group:
        tensor = torch.randn(4, 6)
        assert group.all_reduce(tensor) is tensor
        assert group.all_gather(tensor, 0) is tensor
        assert group.broadcast(tensor) is tensor
        assert torch.equal(group.shard_of(tensor, 1), tensor)
        group.barrier()
    with Group.join(0, 1, "nowhere") as group:
        assert (group.rank, group.size) == (0, 1)


def test_parts_are_views_and_must_be_equal() -> None:
    whole = torch.arange(12).view(2, 6)
    part = Group(2, 3).shard_of(whole, 1)
    assert part.tolist() == [[4, 5], [10, 11]]
    assert part.data_ptr() == whole[0, 4].data_ptr()
    with pytest.raises(RequestError, match="6 of dimension 1 are not a multiple of 4 ranks"):
        Group(0, 4).shard_of(whole, 1)


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_is_one_of_its_group(rank: int, size: int) -> None:
    with pytest.raises(RequestError, match=f"rank {rank} is not one of a group of {size}"):
        Group(rank, size)


def test_a_meeting_must_be_a_place() -> None:
    with pytest.raises(RequestError, match="neither tcp"):
        Group.join(0, 2, "over there")


def test_two_ranks_add_gather_and_tell_and_share_a_block_bit_for_bit() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = two_ranks("sums", f"tcp://127.0.0.1:{port}")
    assert first is not None
    assert second is not None
    for said in (first, second):
        assert said["sum"] == [3.0, 3.0, 3.0]
        assert said["gathered"] == [[0, 1]]
        assert said["told"] == [6]
        assert said["half"] == [2.0, 2.0]
        assert said["block_error"] < 1e-5
    assert (first["shard"], second["shard"]) == ([0, 1, 2], [3, 4, 5])
    assert first["block"] == second["block"]


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["dies", "hangs"])
def test_a_rank_that_does_not_come_ends_the_others_in_words(trial: str, tmp_path: Path) -> None:
    first, _ = two_ranks(trial, f"file://{tmp_path}/meeting")
    assert first is not None
    assert "the group of 2 was lost in all_reduce (after 3 s at most) by rank 0" in first["error"]
    assert first["seconds"] < 10


def test_a_meeting_that_nobody_comes_to_ends_in_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"could not be met within 0\.2 s by rank 0"):
        Group.join(0, 2, f"file://{tmp_path}/meeting", meeting_timeout_s=0.2)
