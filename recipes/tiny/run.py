"""Train both stages, quantise, and evaluate the report's rows, within a time and on one GPU.

    python recipes/tiny/run.py --corpus FILE --tokenizer FILE --longchat DIR --out DIR --seconds 500

Each step is a process with a limit of its own, and what it made is put into --out before the next
one starts: the weights in parts of at most 15 MiB (parcel.py), then `results.tar.xz` with logs, the
records of every evaluation and the quantised blocks, packed anew after each step. Whatever fails,
or is stopped by --seconds, takes nothing of the others with it.

    out/base.00 …     the base               out/results.tar.xz   logs/, runs/*.jsonl, tiny/,
    out/long.00 …     FalconLite2's step                          summary.json

The rows: the base; the base with FalconLite's dynamic NTK; the second step, dense and in 4 bits.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parcel import cut_folder, wrap, write_parts

HERE = Path(__file__).parent
PART_BYTES = 15 * 2**20
TASKS = ("lines", "topics", "passkey")
ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "longwing-tiny": ("tiny", ()),
    "long": ("long", ()),
    "falconlite": ("base", ("--rope", "falconlite,alpha=0.25")),
    "base": ("base", ()),
}
"""Row of the report -> its model's folder, and what the evaluation is told besides."""

QUANTISED = ("--group-size", "32", "--seqlen", "2048")
SAMPLES = ("--samples", "96", "--long-samples", "16", "--long-seqlen", "8192")
TOY_SAMPLES = ("--samples", "4", "--long-samples", "0")
GRACE_S = 120.0
"""How much longer than it trains a stage may take, to start, to save and to be examined."""

TOY_GRACE_S = 240.0
"""The same on a laptop's CPU."""

TO_END_S = 12.0
"""Left at the end to pack what there is."""


@dataclass
class Steps:
    """The processes, and how the time is spent.

    Attributes:
        work: where they work.
        until: when all must be over, in seconds since the start.
        notes: what became of each, in the order of their ends.
    """

    work: Path
    until: float
    notes: dict[str, str] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def start(self, name: str, command: Sequence[str], threads: int = 8) -> subprocess.Popen[bytes]:
        """Begin a step; what it prints goes to logs/NAME.txt."""
        log = self.work / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environ = {
            **os.environ,
            "OMP_NUM_THREADS": str(min(threads, os.cpu_count() or 1)),
            "PYTHONUNBUFFERED": "1",
        }
        with log.open("wb") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=environ)

    def finish(self, name: str, process: subprocess.Popen[bytes], limit: float) -> bool:
        """Wait until it ends, or end it; whether it ended well."""
        try:
            code = process.wait(max(0.1, min(limit, self.until - self.seconds)))
            told = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            told = "stopped at its limit"
        self.notes[name] = f"{told} at {self.seconds:.0f} s"
        print(f"== {name}: {self.notes[name]}", flush=True)
        if told != "done":
            log = (self.work / "logs" / f"{name}.txt").read_text(errors="replace")
            print("\n".join(log.splitlines()[-8:]), flush=True)
        return told == "done"


def _grace(given: argparse.Namespace) -> float:
    return TOY_GRACE_S if given.toy else GRACE_S


def script(name: str, *arguments: object) -> list[str]:
    """A command line of this folder's."""
    return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]


def train(steps: Steps, stage: str, given: argparse.Namespace, seconds: float) -> bool:
    """One stage, and its weights into --out; whether there are any."""
    folder = steps.work / stage
    command = script("train", stage, "--corpus", given.corpus, "--tokenizer", given.tokenizer)
    command += ["--out", str(folder), "--seconds", str(seconds)]
    command += ["--start", str(steps.work / "base")] if stage != "base" else []
    command += ["--toy"] if given.toy else []
    steps.finish(stage, steps.start(stage, command), seconds + _grace(given))
    if not (folder / "embedding.rounded").is_file():  # the last thing it saves
        return False
    write_parts(wrap(folder), given.out, stage, PART_BYTES)
    pack(steps, given.out)
    return True


def quantise(steps: Steps, given: argparse.Namespace) -> bool:
    """The second step in 4 bits."""
    command = [sys.executable, "-m", "longwing", "quantize", str(steps.work / "long")]
    command += [str(steps.work / "tiny"), "--data", str(steps.work / "calibration.jsonl")]
    command += [*QUANTISED, *(TOY_SAMPLES if given.toy else SAMPLES)]
    if not steps.finish("quantize", steps.start("quantize", command), 90 + _grace(given)):
        return False
    cut_folder(steps.work / "tiny", steps.work / "parcel" / "tiny")
    pack(steps, given.out)
    return True


def ask(steps: Steps, row: str, given: argparse.Namespace) -> dict[str, subprocess.Popen[bytes]]:
    """Start the evaluations of a row, one process a task."""
    folder, more = ROWS[row]
    started = {}
    for task in TASKS:
        name = f"{row}-{task}"
        command = script("evaluate", steps.work / folder, "--name", row, "--task", task, *more)
        command += ["--longchat", str(given.longchat)]
        command += ["--out", str(steps.work / "runs" / f"{name}.jsonl")]
        if given.toy:
            command += ["--cases", "2", "--short", "--cache-tokens", "24576", "--chunk", "2048"]
        started[name] = steps.start(name, command, threads=1)
    return started


def pack(steps: Steps, out: Path) -> None:
    """Write results.tar.xz anew: it is whole whenever this is over."""
    facts = {"notes": steps.notes, "table": table(steps.work / "runs")}
    (steps.work / "summary.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    fresh = out / "results.new"
    with tarfile.open(fresh, "w:xz", preset=1) as archive:
        for name in ("logs", "runs", "summary.json"):
            if (steps.work / name).exists():
                archive.add(steps.work / name, name)
        for stage in ("base", "long"):
            if (steps.work / stage / "log.jsonl").is_file():
                archive.add(steps.work / stage / "log.jsonl", f"logs/{stage}.jsonl")
        if (steps.work / "parcel" / "tiny").is_dir():
            archive.add(steps.work / "parcel" / "tiny", "tiny")
    fresh.rename(out / "results.tar.xz")


def table(runs: Path) -> dict[str, dict[str, str]]:
    """Row -> column -> right of asked, from the records that there are."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(runs.glob("*.jsonl")):
        row, _, _ = file.stem.rpartition("-")
        counts: dict[str, list[int]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off in the middle
                continue
            if record.get("kind") == "case" and "correct" in record:
                column = f"{record['task']} {record['size']} {record['unit']}"
                right = counts.setdefault(column, [0, 0])
                right[0] += bool(record["correct"])
                right[1] += 1
        columns = {column: f"{right} of {asked}" for column, (right, asked) in counts.items()}
        found.setdefault(row, {}).update(columns)
    return found


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("corpus", "tokenizer", "longchat", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where to work; without it, --out")
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything")
    parser.add_argument("--base-seconds", type=float, default=165.0, help="of training")
    parser.add_argument("--long-seconds", type=float, default=185.0, help="of training")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does it run?")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    steps = Steps(work=given.work or given.out, until=given.seconds - TO_END_S)
    steps.work.mkdir(parents=True, exist_ok=True)
    calibration = script("calibration", "--corpus", given.corpus, "--tokenizer", given.tokenizer)
    calibration += ["--out", str(steps.work / "calibration.jsonl")]
    calibration += ["--toy"] if given.toy else []
    beside = steps.start("calibration", calibration, threads=2)
    asked: dict[str, subprocess.Popen[bytes]] = {}
    has_base = train(steps, "base", given, given.base_seconds)
    has_long = has_base and train(steps, "long", given, given.long_seconds)
    steps.finish("calibration", beside, 60)
    if has_long:  # what matters most first: the rest may be cut off by the end
        asked |= ask(steps, "long", given)
        if quantise(steps, given):
            asked |= ask(steps, "longwing-tiny", given)
    for row in ("falconlite", "base") * has_base:
        asked |= ask(steps, row, given)
    for name, process in asked.items():
        steps.finish(name, process, steps.until)
    pack(steps, given.out)
    print(json.dumps(table(steps.work / "runs"), indent=1))


if __name__ == "__main__":
    main()
