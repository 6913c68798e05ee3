"""Two processes, started by torchrun, tune as one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longwing.tune import TuneSpec, tune
from longwing.tune.group import Group


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(
    tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("llama-mqa")
    settings = {"batch": 3, "steps": 3, "rank": 2, "lr": 3e-3, "warmup": 1}
    alone = tune(
        folder, tmp_path / "alone", [records], TuneSpec(**settings), context=64, device="cpu"
    )
    flags = [f"--{name}={value}" for name, value in settings.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "longwing", "tune", folder, tmp_path / "both", "--data", records, *flags]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words), "--context=64", "--device=cpu", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)  # one process alone has spoken
    assert facts["losses"] == pytest.approx(alone.losses, rel=1e-4)
    assert (tmp_path / "both" / "adapter_model.safetensors").exists()


def test_process_that_nobody_launched_is_alone() -> None:
    group = Group()
    assert (group.rank, group.size) == (0, 1)
    assert group.share([1, 2, 3]) == [1, 2, 3]
    group.wait()
    group.leave()
