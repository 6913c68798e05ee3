"""One of several processes that tune together: runs, one after another, from a file of cases.

    torchrun --nproc-per-node 2 shard_worker.py CASES.json RESULTS.json

A start costs some seconds, so a test makes it once, with every case that it has claims about.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longwing.errors import LongwingError
from longwing.tune import Tuned, TuneSpec, tune
from longwing.tune.group import Group

Case = Mapping[str, Any]


def tuned(case: Case, stops: Callable[[], bool] = lambda: True) -> Tuned:
    """One run. `stop_after` ends it after so many steps, if this process `stops`."""
    done = [0]

    def count(_step: object) -> None:
        done[0] += 1

    return tune(
        Path(case["source"]),
        Path(case["target"]),
        [Path(case["data"])],
        TuneSpec(**{"batch": 3, "steps": 4, "lr": 3e-3, "warmup": 2, "rank": 4, **case["spec"]}),
        context=64,
        device=case.get("device", "cpu"),
        shard=case.get("shard", "auto"),
        held_out=[Path(case["data"])] if case.get("held_out") else [],
        should_stop=lambda: stops() and 0 < case.get("stop_after", 0) <= done[0],
        on_step=count,
    )


def launch(cases: Sequence[Case], folder: Path) -> subprocess.Popen[bytes]:
    """Two of these processes, by torchrun; `results` waits for them."""
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [__file__, folder / "cases.json", folder / "results"]
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def results(child: subprocess.Popen[bytes], folder: Path) -> list[list[dict[str, Any]]]:
    """What each process says of each case."""
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said.decode()
    return [json.loads((folder / f"results-{rank}").read_text()) for rank in (0, 1)]


def main() -> None:

    cases, found = json.loads(Path(sys.argv[1]).read_text()), []
    group = Group(torch.device(cases[0].get("device", "cpu")))
    for case in cases:
        try:
            if "words" in case:
                found.append(_commanded(case["words"]))
                continue
            # One process alone is asked to stop, and both do.
            done = tuned(case, lambda: group.rank == 0)
            found.append(
                {"losses": done.losses, "steps": done.steps, "resumed": done.num_resumed,
                 "trained": done.num_trained, "sharded": done.sharded}
            )  # fmt: skip
        except LongwingError as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    Path(f"{sys.argv[2]}-{group.rank}").write_text(json.dumps(found))
    group.leave()
    os._exit(0)  # as the command line does under torchrun


def _commanded(words: Sequence[str]) -> dict[str, Any]:
    """A command of the line, which leaves the group when it ends; so it comes last."""
    from typer.testing import CliRunner

    from longwing.cli.app import app

    done = CliRunner().invoke(app, list(words))
    return {"stdout": done.stdout, "stderr": done.stderr, "code": done.exit_code}


if __name__ == "__main__":
    main()
