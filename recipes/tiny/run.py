"""Train both stages, quantise, and evaluate the report's rows, within a time and on one GPU.

    python recipes/tiny/run.py --corpus FILE --tokenizer FILE --longchat DIR --out DIR --seconds 560

Each step is a process with a limit of its own, and what it made is put into --out before the next
one starts: the weights in parts of at most 15 MiB (parcel.py), then `results.tar.xz` with logs, the
records of every evaluation and the quantised blocks, packed anew after each step. Whatever fails,
or is stopped by --seconds, takes nothing of the others with it. While the second stage trains, the
base and the base rounded to 4 bits are asked a few pass keys: kernels are compiled before time
depends on them, and should they fail or answer wrongly, the rows are made by the reference. So is
the row `check` in any case, a fifth of the 4-bit lines, to be compared.

    out/base.00 …     the base               out/results.tar.xz   logs/, runs/*.jsonl, tiny/,
    out/long.00 …     FalconLite2's step                          summary.json

The rows: the base; the base with FalconLite's dynamic NTK; the second step, dense and in 4 bits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    "check": ("tiny", ("--cases", "5")),
}
"""Row of the report -> its model's folder, and what the evaluation is told besides."""

SHOWN: Mapping[str, str] = {
    "base": "a: base",
    "falconlite": "b: dynamic NTK",
    "long": "c: 16 bits",
    "longwing-tiny": "c: longwing-tiny",
}
"""What a row is called on the page."""

CAREFUL = ("--chunk", "2048", "--concurrency", "8")
"""Of an evaluation without the kernels, which takes more memory."""

QUANTISED = ("--group-size", "32", "--seqlen", "2048", "--dtype", "float32")
SAMPLES = ("--samples", "96", "--long-samples", "16", "--long-seqlen", "8192")
TOY_SAMPLES = ("--samples", "4", "--long-samples", "0")
GRACE_S = 75.0
"""How much longer than it trains a stage may take, to start, to save and to be examined."""

TOY_GRACE_S = 240.0
"""The same on a laptop's CPU."""

FOR_ROWS_S = 150.0
"""Left after the second stage's training to save it, to quantise and to evaluate."""

QUANTISED_ALONE_S = 60.0
"""How long the base's rows wait for the quantising; after that they share the GPU with it."""

KILLED_S = 3.0
"""How long a killed process is waited for; one that hangs in a driver is left behind."""

PACKED_EVERY_S = 15.0
"""How often at most the records are packed while they come in."""

TO_END_S = 12.0
"""Left at the end to pack what there is."""


@dataclass
class Steps:
    """The processes, and how the time is spent.

    Attributes:
        work: where they work.
        until: when all must be over, in seconds since the start.
        notes: what became of each, in the order of their ends.
        careful: models whose rows are made without the kernels.
    """

    work: Path
    until: float
    notes: dict[str, str] = field(default_factory=dict)
    careful: set[str] = field(default_factory=set)
    _start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def start(
        self, name: str, command: Sequence[str], threads: int = 8, kernels: str = "auto"
    ) -> subprocess.Popen[bytes]:
        """Begin a step; what it prints goes to logs/NAME.txt."""
        log = self.work / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environ = {
            **os.environ,
            "OMP_NUM_THREADS": str(min(threads, os.cpu_count() or 1)),
            "PYTHONUNBUFFERED": "1",
            "LONGWING_KERNELS": kernels,
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
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)
            told = "stopped at its limit"
        self.notes[name] = f"{told} at {self.seconds:.0f} s"
        print(f"== {name}: {self.notes[name]}", flush=True)
        if told != "done":
            log = (self.work / "logs" / f"{name}.txt").read_text(errors="replace")
            print("\n".join(log.splitlines()[-8:]), flush=True)
        return told == "done"


def _grace(given: argparse.Namespace) -> float:
    return TOY_GRACE_S if given.toy else GRACE_S


@contextmanager
def excused(steps: Steps, name: str) -> Iterator[None]:
    """What fails in it is told, and noted, and the rest goes on."""
    try:
        yield
    except Exception as fault:
        steps.notes[name] = f"failed at {steps.seconds:.0f} s: {fault!r}"
        print(f"== {name}: {steps.notes[name]}", flush=True)


def script(name: str, *arguments: object) -> list[str]:
    """A command line of this folder's."""
    return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]


def train(
    steps: Steps, stage: str, given: argparse.Namespace, most: float, share: float = 1.0
) -> bool:
    """One stage, in a second try if need be, and its weights into --out; whether there are any.

    Args:
        steps: the processes.
        stage: of train.py.
        given: the command line.
        most: seconds of training.
        share: of the time that the rows leave, no more is trained.
    """
    folder = steps.work / stage
    for seed in (0, 1):
        seconds = min(most, max(30.0, share * (steps.until - steps.seconds - FOR_ROWS_S)))
        command = script("train", stage, "--corpus", given.corpus, "--tokenizer", given.tokenizer)
        command += ["--out", str(folder), "--seconds", str(seconds), "--seed", str(seed)]
        command += ["--start", str(steps.work / "base")] if stage != "base" else []
        command += ["--toy"] if given.toy else []
        name = f"{stage} again" if seed else stage
        steps.finish(name, steps.start(name, command), seconds + _grace(given))
        if (folder / "embedding.rounded").is_file():  # the last thing it saves
            break
    else:
        return False
    with excused(steps, f"{stage}'s parts"):
        write_parts(wrap(folder), given.out, stage, PART_BYTES)
        pack(steps, given.out)
    return True


def quantise(
    steps: Steps, given: argparse.Namespace, device: str = "auto"
) -> subprocess.Popen[bytes]:
    """Begin to bring the second step to 4 bits, from the beginning."""
    shutil.rmtree(steps.work / "tiny", ignore_errors=True)
    command = [sys.executable, "-m", "longwing", "quantize", str(steps.work / "long")]
    command += [str(steps.work / "tiny"), "--data", str(steps.work / "calibration.jsonl")]
    command += [*QUANTISED, *(TOY_SAMPLES if given.toy else SAMPLES)]
    command += ["--device", device]
    return steps.start("quantize", command, threads=16)


def evaluation(
    given: argparse.Namespace, folder: Path, row: str, task: str, out: Path, *more: str
) -> list[str]:
    """The command line of one row and task."""
    command = script("evaluate", folder, "--name", SHOWN.get(row, row), "--task", task, *more)
    command += ["--longchat", str(given.longchat), "--out", str(out)]
    small = ["--cases", "2", "--short", "--cache-tokens", "24576", "--chunk", "2048"]
    return command + small if given.toy else command


def rehearse(steps: Steps, given: argparse.Namespace) -> None:
    """Once through what comes last, with the base and little of it, while the second stage trains.

    Kernels are compiled here for the first time, which the machine remembers. The base knows pass
    keys of this length by heart; if it does not, or fails, the kernels are to blame.
    """
    base, packed, out = (steps.work / name for name in ("base", "rehearsal", "rehearsed"))
    command = [sys.executable, "-m", "longwing", "quantize", str(base), str(packed)]
    command += [*QUANTISED[:2], "--method", "rtn"]
    few = ("--cases", "8", "--short")
    steps.finish("rehearsal-quantize", steps.start("rehearsal-quantize", command), 60)
    for kind, folder, models in (("dense", base, ("base", "long")), ("packed", packed, ("tiny",))):
        name, records = f"rehearsal-{kind}", out / f"rehearsal-{kind}.jsonl"
        step = evaluation(given, folder, name, "passkey", records, *few)
        done = steps.finish(name, steps.start(name, step, threads=1), 60)
        right, asked = counts(records).get("passkey 2000 characters", (0, 0))
        print(f"== {name}: {right} of {asked} right", flush=True)
        if not done or 2 * right < asked:
            steps.careful |= set(models)


def ask(
    steps: Steps, row: str, given: argparse.Namespace, tasks: Sequence[str] = TASKS
) -> dict[str, subprocess.Popen[bytes]]:
    """Start the evaluations of a row, one process a task; or go on with what their records lack."""
    folder, more = ROWS[row]
    kernels = "auto"
    if row == "check" or folder in steps.careful:
        kernels, more = "reference", (*more, *CAREFUL)
    started = {}
    for task in tasks:
        name = f"{row}-{task}"
        out = steps.work / "runs" / f"{name}.jsonl"
        command = evaluation(given, steps.work / folder, row, task, out, *more)
        started[name] = steps.start(name, command, threads=1, kernels=kernels)
    return started


def watch(
    steps: Steps, given: argparse.Namespace, running: dict[str, subprocess.Popen[bytes]]
) -> None:
    """Until all have ended, or the time has; what is quantised is asked, what fails asked again."""
    failed: set[str] = set()
    packed = steps.seconds
    while running and steps.seconds < steps.until:
        for name in [name for name, process in running.items() if process.poll() is not None]:
            done = steps.finish(name, running.pop(name), KILLED_S)
            row, _, task = name.rpartition("-")
            if name == "quantize" and done:
                running |= ask(steps, "longwing-tiny", given)
                running |= ask(steps, "check", given, ("lines",))
                with excused(steps, "the quantised blocks"):
                    cut_folder(steps.work / "tiny", steps.work / "parcel" / "tiny")
            elif not done and name not in failed:
                failed.add(name)
                if name == "quantize":
                    running[name] = quantise(steps, given, "cpu")
                else:
                    steps.careful.add(ROWS[row][0])
                    running |= ask(steps, row, given, (task,))
        if steps.seconds > packed + PACKED_EVERY_S:
            packed = steps.seconds
            with excused(steps, "packing"):
                pack(steps, given.out)
        time.sleep(0.2)
    for process in running.values():
        process.kill()
    for name, process in running.items():
        steps.finish(name, process, KILLED_S)


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
        columns = {column: f"{right} of {asked}" for column, (right, asked) in counts(file).items()}
        found.setdefault(row, {}).update(columns)
    return found


def counts(records: Path) -> dict[str, tuple[int, int]]:
    """Column -> (right, asked), of one evaluation's records; nothing if there are none."""
    found: dict[str, tuple[int, int]] = {}
    text = records.read_text(encoding="utf-8") if records.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off in the middle
            continue
        if record.get("kind") == "case" and "correct" in record:
            column = f"{record['task']} {record['size']} {record['unit']}"
            right, asked = found.get(column, (0, 0))
            found[column] = right + bool(record["correct"]), asked + 1
    return found


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("corpus", "tokenizer", "longchat", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where to work; without it, --out")
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything")
    parser.add_argument("--base-seconds", type=float, default=170.0, help="of training")
    parser.add_argument("--long-seconds", type=float, default=195.0, help="of training at most")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does it run?")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    steps = Steps(work=given.work or given.out, until=given.seconds - TO_END_S)
    steps.work.mkdir(parents=True, exist_ok=True)
    calibration = script("calibration", "--corpus", given.corpus)
    calibration += ["--out", str(steps.work / "calibration.jsonl")]
    calibration += ["--toy"] if given.toy else []
    beside = steps.start("calibration", calibration, threads=2)
    running: dict[str, subprocess.Popen[bytes]] = {}
    has_long = False
    has_base = train(steps, "base", given, given.base_seconds, share=0.5)
    if has_base:
        threading.Thread(target=rehearse, args=(steps, given), daemon=True).start()
        has_long = train(steps, "long", given, given.long_seconds)
    steps.finish("calibration", beside, 10)
    if has_long:  # what matters most first: the rest may be cut off by the end
        quantising = quantise(steps, given)
        running = {"quantize": quantising, **ask(steps, "long", given)}
        with suppress(subprocess.TimeoutExpired):
            quantising.wait(QUANTISED_ALONE_S)
    for row in ("falconlite", "base") * has_base:
        running |= ask(steps, row, given)
    watch(steps, given, running)
    pack(steps, given.out)
    print(json.dumps(table(steps.work / "runs"), indent=1))


if __name__ == "__main__":
    main()
