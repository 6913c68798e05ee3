r"""Retrieval and perplexity by length, for several models under several ways of stretching RoPE.

    python bench/length_grid.py smollm2 smollm2-4bit --text NOVEL.txt ... --out runs/smollm2

Each model folder is asked once under each of ROPES by `longwing eval`, a process each, `--jobs` of
them at a time; then `longwing report` draws one page of all the records. Run the command again and
it goes on where it was interrupted: the records are those of `longwing eval --out`.

The factors are made for four times the trained length: SmolLM2's 8,192 positions, say, for 32,768.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

ROPES: dict[str, str | None] = {
    "as trained": None,
    "dynamic": "dynamic,factor=4",
    "theta": "theta={theta}",
    "yarn": "yarn,factor=4",
}
"""By the name that the report shows; {theta} is --theta."""


def main() -> None:
    """Ask every model under every method, then draw the report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(args, folder, name) for folder in args.models for name in ROPES]
    began = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        records = [file for files in pool.map(lambda run: ask(*run), runs) for file in files]
    print(f"{len(runs)} runs in {time.monotonic() - began:.0f} s", flush=True)
    page = ["--out", args.out / "report.html", "--title", args.title]
    sys.exit(longwing("report", *filter(Path.exists, records), *page))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="model folders")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="texts for perplexity")
    parser.add_argument("--out", type=Path, required=True, help="folder for records and report")
    parser.add_argument("--tasks", default="lines,passkey")
    parser.add_argument("--lengths", default="1k,2k,4k,8k,12k,16k")
    parser.add_argument("--context", default="16k", help="what the models are loaded with")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--cases", type=int, default=25, help="of each length")
    parser.add_argument("--tokens", default="32k", help="of each text")
    parser.add_argument("--theta", default="400000", help="the raised base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--concurrency", type=int, default=32, help="questions at a time in a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--title", default="SmolLM2-135M-Instruct at length")
    return parser.parse_args()


def ask(args: argparse.Namespace, folder: Path, name: str) -> list[Path]:
    """One model under one method: its losses, then retrieval in batches; the two records."""
    rope = ROPES[name]
    shared: list[object] = ["--name", f"{folder.name}, {name}", "--device", args.device]
    shared += ["--lengths", args.lengths, "--context", args.context]
    if rope is not None:
        shared += ["--rope", rope.format(theta=args.theta)]
    stem = f"{folder.name}-{name.replace(' ', '-')}"
    asked: dict[Path, list[object]] = {}
    if args.text:
        texts = [word for text in args.text for word in ("--data", text)]
        losses = ["--tasks", "perplexity", "--tokens", args.tokens, *texts]
        asked[args.out / f"{stem}-loss.jsonl"] = losses
    asked[args.out / f"{stem}.jsonl"] = [
        *("--tasks", args.tasks, "--depths", args.depths, "--cases", args.cases),
        *("--concurrency", args.concurrency),
    ]
    for out, options in asked.items():
        began = time.monotonic()
        with out.with_suffix(".log").open("w") as log:
            code = longwing("eval", folder, *shared, *options, "--out", out, log=log)
        print(f"{out.name}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)
    return list(asked)


def longwing(verb: str, *words: object, log: IO[str] | None = None) -> int:
    """Run one verb of the command line with this Python; its exit status."""
    command = [sys.executable, "-m", "longwing", verb, *map(str, words)]
    return subprocess.run(command, stdout=log, stderr=log, check=False).returncode


if __name__ == "__main__":
    main()
