r"""Perplexity of a model quantised by several methods, on text that calibration never saw.

    python bench/quantise_perplexity.py --model DIR --text NOVEL.txt ... --bits 8 4 3 2 \\
        --group-sizes 64 -1 --methods rtn plain default full --jobs 8 --out results.jsonl

"plain" is GPTQ as published: scales from the range, columns in order. "default" is what `longwing
quantize` does unasked; the rest change one thing of it. All share the bundled calibration text, 128
samples of 2,048 tokens. Of each text the characters from 100,000 to 200,000 are read.

Perplexity: exp of the mean loss over consecutive windows of 2,048 tokens, each read on its own, in
float32; the loop is that of `longwing eval --tasks perplexity`.
"""

import argparse
import json
import math
import multiprocessing
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longwing.cli.eval_model import LocalModel
from longwing.engine.generator import Generator
from longwing.errors import LongwingError
from longwing.evals.run import Plan, run
from longwing.evals.table import rows
from longwing.models import load_model
from longwing.quant.calibration import Calibration, make_calibration
from longwing.quant.quantize import quantize
from longwing.quant.spec import QuantSpec
from longwing.tokenizer import Tokenizer

WINDOW = 2048
LENGTH = 100_000
"""Characters of a text that are read; as many are skipped before them."""

PUBLISHED = {"method": "gptq", "grid": "minmax", "static_groups": False, "damp_percent": 0.01}

METHODS: dict[str, dict[str, object]] = {
    "rtn": {"method": "rtn", "grid": "minmax"},
    "plain": {**PUBLISHED, "act_order": False},
    "plain, act-order": PUBLISHED,
    "gptaq": {"method": "gptaq"},
    "default": {},
    "refit": {"refits": 1},
    "refit, 2 sweeps": {"refits": 1, "sweeps": 2},
    "heads": {"rotate": "heads"},
    "full": {"rotate": "full"},
    "full, refit, 2 sweeps": {"rotate": "full", "refits": 1, "sweeps": 2},
}


def perplexity(folder: Path, args: argparse.Namespace, text: Path) -> dict[str, object]:
    """Perplexity, and the tokens that it is about; the first token of a window is not foretold."""
    model = load_model(folder, device=args.device, dtype=torch.float32, unpack=True)
    asked = LocalModel(Generator(model, Tokenizer.from_folder(folder)), folder.name)
    plan = Plan(tasks=("perplexity",), lengths=(WINDOW,), texts=(text,), tokens=args.tokens)
    (row,) = rows(run(asked, plan).records)
    return {"tokens": row.tokens, "perplexity": round(row.perplexity or math.inf, 4)}


def machine(device: str) -> str:
    """What this ran on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"


def main() -> None:
    """Measure every combination, several at a time, and write one JSON object a line."""
    args = arguments()
    jobs: list[tuple[str, dict[str, object]]] = [("dense", {})]
    for bits in args.bits:
        for group_size in args.group_sizes:
            for name in args.methods:
                spec = {"bits": bits, "group_size": group_size, **METHODS[name]}
                jobs.append((name, spec))
    deadline = time.time() + args.seconds
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as text,
        args.out.open("a") as out,
    ):
        parts = [file.read_text(encoding="utf-8")[LENGTH : 2 * LENGTH] for file in args.text]
        text.write("\n\n".join(parts))
        text.flush()
        pool = context.Pool(args.jobs, prepare, (args, deadline, Path(text.name)))
        with pool:
            for row in pool.imap_unordered(measure, jobs):
                told = {**row, "machine": machine(args.device), "commit": commit}
                out.write(json.dumps(told) + "\n")
                out.flush()
                print(row, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 64, -1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="combinations at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after this")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


@dataclass
class Shared:
    """What one process needs for all its combinations."""

    args: argparse.Namespace
    deadline: float
    text: Path
    calibration: Calibration


shared: list[Shared] = []


def prepare(args: argparse.Namespace, deadline: float, text: Path) -> None:
    """Cut the calibration samples, once a process."""
    torch.set_num_threads(1)
    calibration = make_calibration(Tokenizer.from_folder(args.model), num_samples=args.samples)
    shared.append(Shared(args, deadline, text, calibration))


def measure(job: tuple[str, dict[str, Any]]) -> dict[str, object]:
    """One combination: quantise, and read the held-out text."""
    name, settings = job
    mine = shared[0]
    if name == "dense":
        return {"name": name, **perplexity(mine.args.model, mine.args, mine.text)}
    row: dict[str, object] = {"name": name, **settings}
    if time.time() > mine.deadline:
        return {**row, "error": "out of time; not begun"}
    with tempfile.TemporaryDirectory() as base:
        started = time.monotonic()
        folder = Path(base) / "out"
        try:
            quantize(
                mine.args.model,
                folder,
                QuantSpec(**settings),
                mine.calibration,
                device=mine.args.device,
            )
        except LongwingError as error:
            return {**row, "error": str(error)}
        seconds = round(time.monotonic() - started, 1)
        return {
            **row,
            **perplexity(folder, mine.args, mine.text),
            "quantise_s": seconds,
        }


if __name__ == "__main__":
    main()
