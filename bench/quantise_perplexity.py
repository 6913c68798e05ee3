r"""Perplexity of a model quantised by several methods, on text that calibration never saw.

    python bench/quantise_perplexity.py --model DIR --text NOVEL.txt ... --bits 8 4 3 2 \\
        --group-sizes 64 -1 --methods rtn plain default full --jobs 8 --out results.jsonl

"plain" is GPTQ as published: scales from the range, columns in order. "default" is what `longwing
quantize` does unasked; the rest change one thing of it. All share the bundled calibration text, 128
samples of 2,048 tokens. Of each text the characters from 100,000 to 200,000 are read.

Perplexity: exp of the mean loss over consecutive windows of 2,048 tokens, each read on its own.
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
import torch.nn.functional as F

from longwing.errors import LongwingError
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


@torch.inference_mode()
def perplexity(folder: Path, device: str, token_ids: list[int]) -> float:
    """exp(mean loss) over windows, in float32; the first token of each is not predicted."""
    model = load_model(folder, device=device, dtype=torch.float32, unpack=True)
    loss, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, WINDOW):
        window_T = torch.tensor(token_ids[start : start + WINDOW], device=device)
        positions_T = torch.arange(len(window_T), device=device)
        logits_TV = model.logits(model(window_T, positions_T))[:-1]
        loss += float(F.cross_entropy(logits_TV, window_T[1:], reduction="sum"))
        count += len(window_T) - 1
    return round(math.exp(loss / count), 4)


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
        args.out.open("a") as out,
        context.Pool(args.jobs, prepare, (args, deadline)) as pool,
    ):
        for row in pool.imap_unordered(measure, jobs):
            out.write(json.dumps({**row, "machine": machine(args.device), "commit": commit}) + "\n")
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
    ids: list[int]
    calibration: Calibration


shared: list[Shared] = []


def prepare(args: argparse.Namespace, deadline: float) -> None:
    """Encode both texts, once a process."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_folder(args.model)
    texts = [file.read_text(encoding="utf-8")[LENGTH : 2 * LENGTH] for file in args.text]
    text = "\n\n".join(texts)
    ids: list[int] = []
    for start in range(0, len(text), LENGTH):
        ids += tokenizer.encode(text[start : start + LENGTH])
    calibration = make_calibration(tokenizer, num_samples=args.samples)
    shared.append(Shared(args, deadline, ids[: args.tokens], calibration))


def measure(job: tuple[str, dict[str, Any]]) -> dict[str, object]:
    """One combination: quantise, and read the held-out text."""
    name, settings = job
    mine = shared[0]
    if name == "dense":
        value = perplexity(mine.args.model, mine.args.device, mine.ids)
        return {"name": name, "tokens": len(mine.ids), "perplexity": value}
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
            "perplexity": perplexity(folder, mine.args.device, mine.ids),
            "quantise_s": seconds,
        }


if __name__ == "__main__":
    main()
