"""Evaluating and quantising over a Ray cluster: is the result that of one process? For cluster.py.

Two workers of one core each, against this process on one thread; tiny models, so the seconds say
what starting workers costs, and nothing of what they save.
"""

import hashlib
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from longwing.cli.app import app
from longwing.cli.eval_engine import open_model
from longwing.cli.options import LoadOptions
from longwing.cli.spread import spread_model
from longwing.cluster.options import SpreadOptions
from longwing.evals.run import Plan, run

TWO = SpreadOptions(ray=True, address="auto", workers=2, cpus=1)


def evaluated(model: Path, cases: int) -> dict[str, Any]:
    """A pass key to find and a text to foretell, with one of the workers killed on the way."""
    torch.set_num_threads(1)
    make = partial(open_model, model, "bench", "plain", LoadOptions(device="cpu"), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(" ".join(str(number) for number in range(9000)))
        plan = Plan(tasks=("passkey", "perplexity"), lengths=(512,), cases=cases, texts=(text,))
        run(make(), plan, folder / "alone.jsonl")
        started = time.perf_counter()
        with spread_model(TWO, make, model, "plain", device="cpu", per_worker=1) as pool:

            def kill_one(done: int, total: int) -> None:
                nonlocal has_killed
                if done > total / 3 and not has_killed:
                    has_killed = True
                    next(iter(pool._room)).dismiss()

            has_killed = False
            out = folder / "spread.jsonl"
            run(pool, plan, out, concurrency=pool.concurrency, progress=kill_one)
        seconds = time.perf_counter() - started
        return {
            "cases": len(_cases(out)) - 1,
            "killed": int(has_killed),
            "same": _cases(out) == _cases(folder / "alone.jsonl"),
            "seconds": round(seconds, 1),
        }


def quantized(model: Path) -> dict[str, Any]:
    """The command line with --ray and without it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        outs = [Path(name) / "alone", Path(name) / "spread"]
        small = ["--samples", "6", "--seqlen", "128", "--group-size", "32", "--device", "cpu"]
        ray = ["--ray", "--address", "auto", "--workers", "2", "--cpus", "1"]
        for out, more in zip(outs, ([], ray), strict=True):
            started = time.perf_counter()
            done = CliRunner().invoke(app, ["quantize", str(model), str(out), *small, *more])
            if done.exception is not None:
                raise done.exception
        seconds = time.perf_counter() - started
        return {
            "files": len(_digests(outs[1])),
            "same": _digests(outs[0]) == _digests(outs[1]),
            "seconds": round(seconds, 1),
        }


def _cases(file: Path) -> list[str]:
    """A record's lines in the plan's order, without what the clock says."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(json.dumps({**line, "seconds": 0, "begun": 0}) for line in lines)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
