"""One model on one GPU and on several, in one run: decoding, a long prompt, and what it gains.

    python bench/make_folder.py falcon-40b MODEL --tokenizer TOKENIZER      # exact shapes, 4 bits
    python bench/tensor_parallel.py MODEL --deaths --out bench/results/tensor_parallel.jsonl
    python bench/tensor_parallel.py TINY --device cpu --context 64 --prompt 160

Everything goes through the engine that serves (`engine/bench.py`): requests are added, steps taken,
and the clock read between tokens; the first rank is this process. A context's pages hold random
numbers in the first rank and none in the others, which costs the same time.

With --deaths a server's engine of the most ranks is then started, and while it answers, one rank
after another is killed or stopped: how long until every process of the group is gone, and until a
new one answers. A model of few layers (`make_folder.py --layers 2`) says it as well, and sooner.

Goals, with two H200s and Falcon-40B: 1.6 times one GPU's decoding at batch 1, and 1.8 times its
reading.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longwing.engine.bench import Bench
from longwing.engine.events import Step
from longwing.engine.findings import BenchSpec, Measured
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams
from longwing.engine.service import EngineService, engine_process

GOALS = {"decode": 1.6, "prefill": 1.8}
"""How many times as fast two GPUs are to be, at batch 1."""

NUM_NEW = 32
"""Tokens of the answer that is compared."""

DEATHS = [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)]
"""Rank, and what it is sent. As many as an engine is started anew after."""

DEATH_S = 10.0
"""Within which no process of a group may be left."""

DEATH_SEQUENCES = 4

_ENOUGH_S = 60.0
"""After which nobody waits for that any longer."""


def measure(folder: Path, options: EngineOptions, spec: BenchSpec) -> dict[str, Any]:
    """All lines of one number of ranks, and a greedy answer."""
    began = time.perf_counter()
    bench = Bench.load(folder, options, spec)
    try:
        info = bench.info
        seconds = time.perf_counter() - began
        print(f"{info.ranks} ranks, ready in {seconds:.1f} s: {info.device_name}", flush=True)
        lines = []
        for call in bench.measurements():
            lines.append(call())
            print(f"    {label(lines[-1])}", flush=True)
        direct = bench.engine.model.group.peers is not None
        prompt = tuple(7 * at % info.vocab_size for at in range(min(spec.contexts)))
        answer = greedy(bench, prompt)
    finally:
        bench.engine.close()
    return {
        "ranks": info.ranks,
        "engine": asdict(info),
        "sums_without_nccl": direct,
        "ready_s": round(seconds, 1),
        "lines": lines,
        "answer": answer,
    }


def greedy(bench: Bench, prompt: tuple[int, ...]) -> list[int]:
    """The ids of a greedy answer."""
    engine = bench.engine
    params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    engine.forget()
    engine.add("compared", Request(prompt_ids=prompt, params=params))
    ids: list[int] = []
    while engine.busy:
        ids += [event.id for _, event in engine.step() if isinstance(event, Step)]
    return ids


def label(line: Measured) -> str:
    where = f"{line.what} batch {line.batch} context {line.context:,}"
    if line.ms is None:
        return f"{where}: {line.note}"
    floor = "" if line.floor_ms is None else f", floor {line.floor_ms:.2f}"
    return f"{where}: {line.ms:.3f} ms ({line.ms_low:.3f} to {line.ms_high:.3f}){floor}"


def gains(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast as the first each line of the others is; goals are GPUs'."""
    made = []
    for other in found[1:]:
        for one, many in zip(found[0]["lines"], other["lines"], strict=True):
            if one.ms is None or many.ms is None:
                continue
            ranks, gain = other["ranks"], one.ms / many.ms
            on_gpus = other["engine"]["device"] != "cpu"
            goal = GOALS.get(one.what) if on_gpus and (ranks, one.batch) == (2, 1) else None
            made.append(
                {
                    "what": one.what,
                    "batch": one.batch,
                    "context": one.context,
                    "ranks": ranks,
                    "gain": gain,
                    "goal": goal,
                }
            )
            verdict = (
                "" if goal is None else f", goal {goal}: {'met' if gain >= goal else 'MISSED'}"
            )
            print(f"{ranks} ranks, {one.what} {one.context:,}: x {gain:.2f}{verdict}", flush=True)
    return made


def agreement(found: list[dict[str, Any]]) -> list[int]:
    """Of each other's greedy answer the tokens, from the first, that are the first's.

    Sums of 16 bits in another order round otherwise, so at a near tie answers may part; answers of
    random weights do so soon.
    """
    first = found[0]["answer"]
    same = []
    for other in found[1:]:
        pairs = list(zip(first, other["answer"], strict=True))
        same.append(next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs)))
    print(f"greedy tokens in common, of {NUM_NEW}: {same}", flush=True)
    return same


async def deaths(folder: Path, options: EngineOptions) -> list[dict[str, Any]]:
    """Kill or stop ranks of a served engine while it answers."""
    service = EngineService(engine_process(folder, options))
    await service.start()
    found = []
    try:
        for rank, sent in DEATHS:
            found.append(await one_death(service, rank, sent))
            print(f"    {found[-1]}", flush=True)
    finally:
        await service.stop(0)
    return found


async def one_death(service: EngineService, rank: int, sent: signal.Signals) -> dict[str, Any]:
    """Seconds until the group is gone, and until another answers."""
    leader = service._host._process.pid  # type: ignore[union-attr]
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    group = [leader, *(int(child) for child in children if "follower" in command(int(child)))]
    began, last = 0.0, None
    context = service.info.context if service.info else 0
    with service.submit([request(min(context, 4096) - 8)]) as answers:
        async for _, event in answers:
            if not began and isinstance(event, Step):
                began = time.perf_counter()
                os.kill(group[rank], sent)
            last = event
    failed_s = time.perf_counter() - began
    while any(command(pid) for pid in group) and time.perf_counter() - began < _ENOUGH_S:
        await asyncio.sleep(0.01)
    gone_s = time.perf_counter() - began
    while service.status == "starting":
        await asyncio.sleep(0.05)
    with service.submit([request(4)]) as answers:
        async for _ in answers:
            pass
    return {
        "rank": rank,
        "signal": sent.name,
        "client": type(last).__name__,
        "failed_s": round(failed_s, 2),
        "gone_s": round(gone_s, 2),
        "answers_again_s": round(time.perf_counter() - began, 2),
        "in_time": gone_s <= DEATH_S,
    }


def request(max_new: int) -> Request:
    params = SamplingParams(max_new_tokens=max_new, ignore_eos=True)
    return Request(prompt_ids=(1, 2, 3), params=params)


def command(pid: int) -> str:
    """A process's command line; "" if there is none of that number, or only its end is untold."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def hardware(device: str) -> dict[str, object]:
    """What this was measured on."""
    if device == "cpu" or not torch.cuda.is_available():
        return {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    links = subprocess.run(
        ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "nccl_settings": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
        "topology": links.stdout,
    }


def main() -> None:
    """Measure every number of ranks, compare, and write one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--prompt", type=int, nargs="+", default=[24_000])
    parser.add_argument("--chunk", type=int, help="tokens of a prompt in a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--deaths", action="store_true", help="kill ranks, too")
    parser.add_argument("--out", type=Path, help="append a line of JSON")
    parser.add_argument("--commit", default="", help="to be noted")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    spec = BenchSpec(
        batches=tuple(args.batch),
        contexts=tuple(args.context),
        prompts=tuple(args.prompt),
        repeats=args.repeats,
    )
    found = []
    for ranks in args.ranks:
        options = EngineOptions(
            device=args.device, tensor_parallel=ranks, max_batch_tokens=args.chunk
        )
        found.append(measure(args.folder, options, spec))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "model": args.folder.name,
        "gains": gains(found),
        "same_tokens": agreement(found),
        "found": [
            {**one, "lines": [asdict(line) for line in one["lines"]], "answer": None}
            for one in found
        ],
        "torch": torch.__version__,
        "commit": args.commit,
        "command": " ".join(["python", *sys.argv]),
        **hardware(args.device),
    }
    if args.deaths:
        print(f"deaths of {max(args.ranks)} ranks:", flush=True)
        # Few sequences: there are graphs to record for each number of them, at every start.
        served = EngineOptions(
            device=args.device, tensor_parallel=max(args.ranks), max_sequences=DEATH_SEQUENCES
        )
        result["deaths"] = asyncio.run(deaths(args.folder, served))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
