"""The whole GPU test-suite in one go, then greedy text of a real model, GPU against CPU.

    python bench/gpu_tests.py --model SMALL-MODEL [--jobs 12] [--logs FOLDER]

All tests marked `gpu`, in so many processes at once, and those that take a GPU where there is one:
the kernels', which elsewhere run in Triton's interpreter, and the fused blocks'. Then MODEL (small,
real, its text worth comparing) answers prompts in the batching engine on the GPU, in each number
type, and on the plain path of the CPU in float32. The texts must be equal; where they part, it must
be at a near tie: the CPU's own logits there may differ by no more than the type's rounding can turn
over (TIE). Exit status 1 if anything fails. The tests' two halves run beside each other, half of
the processes each; what they print goes to LOGS as it comes, so that a run that is cut off has left
it.
"""

import argparse
import lzma
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from longwing.cli.ask import LONG_EXAMPLE
from longwing.engine.events import Failed, Step
from longwing.engine.generator import Generator, load
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams

TIE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Greatest gap between two logits that rounding in this type may turn over."""

CUTS = (40, 400, 1500, 4000)
"""Characters of the document that the prompts hold."""

AUTO = '"cuda" if torch.cuda.is_available()'
"""What a test file says that runs on a GPU where there is one, on the CPU elsewhere."""

NUM_NEW = 48


def suite(jobs: int, logs: Path) -> bool:
    """Run the tests; whether all passed."""
    parallel = ["-n", str(max(jobs // 2, 1))] if jobs > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel]
    # By name, for the rest of the suite may import what a machine with a GPU has not installed.
    files = sorted(Path("tests").rglob("test_*.py"))
    marked = [str(file) for file in files if "mark.gpu" in file.read_text()]
    others = [
        str(file) for file in files if file.parent.name == "kernels" or AUTO in file.read_text()
    ]
    began = time.perf_counter()
    halves = {"gpu": marked, "not gpu": others}
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = {}
        for half, names in halves.items():
            path = logs / f"{half.replace(' ', '-')}.txt"
            log = stack.enter_context(path.open("w"))
            running[path] = subprocess.Popen(
                [*command, "-m", half, *names], stdout=log, stderr=subprocess.STDOUT
            )
        codes = [process.wait() for process in running.values()]
    for path in running:
        print("\n".join(path.read_text().splitlines()[-30:]), flush=True)
    print(f"suite: {time.perf_counter() - began:.0f} s, all of it in {logs}", flush=True)
    return codes == [0, 0]


def answers(folder: Path, dtype: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of all prompts at once, in the engine on the GPU."""
    options = EngineOptions(device="cuda", dtype=dtype, context=2048, max_sequences=len(prompts))
    engine, _ = load_engine(folder, options)
    params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    ids: list[list[int]] = [[] for _ in prompts]
    for place, prompt in enumerate(prompts):
        engine.add(str(place), Request(prompt_ids=tuple(prompt), params=params))
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Failed):
                raise SystemExit(f"prompt {name}: {event.message}")
            if isinstance(event, Step):
                ids[int(name)].append(event.id)
    engine.close()
    return ids


def gap(plain: Generator, prompt: list[int], ours: list[int], expected: list[int]) -> float:
    """Where two texts part: how much the CPU prefers its own token; 0 if they never do."""
    for at, (own, other) in enumerate(zip(expected, ours, strict=True)):
        if own != other:
            logits_V = plain.logits([*prompt, *expected[:at]])[-1]
            return float(logits_V[own] - logits_V[other])
    return 0.0


def compare(folder: Path) -> bool:
    """Whether every number type gives the CPU's text."""
    plain = load(folder, device="cpu", dtype="float32", context=2048)
    text = lzma.decompress(LONG_EXAMPLE.read_bytes()).decode()
    prompts = [plain.tokenizer.encode(text[:cut]) for cut in CUTS]
    expected = [
        plain.generate(prompt, max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
        for prompt in prompts
    ]
    good = True
    for dtype, tie in TIE.items():
        found = answers(folder, dtype, prompts)
        gaps = [gap(plain, *three) for three in zip(prompts, found, expected, strict=True)]
        equal = sum(ours == own for ours, own in zip(found, expected, strict=True))
        verdict = max(gaps) <= tie
        good &= verdict
        print(
            f"greedy {dtype}: {equal} of {len(prompts)} texts of {NUM_NEW} tokens equal the CPU's; "
            f"where they part, the CPU's logits differ by {max(gaps):.3f} at most: "
            f"{'ok' if verdict else 'WRONG'}",
            flush=True,
        )
    return good


def main() -> None:
    """Test, compare, exit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="without it: the tests alone")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--no-suite", action="store_true", help="compare texts alone")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "gpu_tests")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    good = args.no_suite or suite(args.jobs, args.logs)
    if args.model:
        good &= compare(args.model)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
