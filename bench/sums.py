"""What a sum over GPUs costs: NCCL's, and that of GPUs that write into each other's memory.

    python bench/sums.py                          # two GPUs, Falcon-40B's hidden states
    python bench/sums.py --ranks 4 --out bench/results/sums.jsonl

As a decoding step has them: one after the other in a CUDA graph, of T tokens of 8,192 numbers in
bfloat16, then added to hidden states; by peers that is one launch, and gives the norms' inputs too.
Each rank is a process. Large sums, as prompts have them, are NCCL's alone.
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from longwing.parallel import Group

IN_A_GRAPH = 60
"""Sums: those of a token of Falcon-40B."""

REPLAYS, REPEATS = 20, 5
WIDTH = 8192
SMALL, LARGE = (1, 4, 16, 64), (2048, 8192)
"""Tokens."""

PATIENCE_S = 300
"""After which a rank ends, whatever it waits for."""


def milliseconds(work: Callable[[], object], calls: int) -> float:
    """Of one call, on the device; the best of REPEATS."""
    work()
    found = []
    for _ in range(REPEATS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / calls)
    return min(found)


def in_graph(group: Group, num_tokens: int, norms: int) -> float:
    """Microseconds of a sum, added to hidden states."""
    hidden_TD, part_TD = (
        torch.zeros(num_tokens, WIDTH, dtype=torch.bfloat16, device=group.device) for _ in range(2)
    )
    norms_D = (torch.ones(WIDTH, dtype=torch.bfloat16, device=group.device),) * norms
    group.add_sum(hidden_TD, part_TD, norms_D)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(IN_A_GRAPH):
            group.add_sum(hidden_TD, part_TD, norms_D)
    took = milliseconds(graph.replay, REPLAYS) * 1e3 / IN_A_GRAPH
    graph.reset()  # before its communicator goes
    return took


def lines(group: Group) -> list[dict[str, object]]:
    with_nccl = Group(group.rank, group.size, device=group.device)
    ways = [("NCCL", with_nccl, 0)]
    if group.peers is not None:
        ways += [("peers", group, 0), ("peers, two norms folded", group, 2)]
    found: list[dict[str, object]] = [
        {"sum": name, "tokens": num, "us": in_graph(way, num, norms)}
        for num in SMALL
        for name, way, norms in ways
    ]
    for num in LARGE:
        part_TD = torch.zeros(num, WIDTH, dtype=torch.bfloat16, device=group.device)
        us = milliseconds(partial(with_nccl.all_reduce, part_TD), 20) * 1e3
        found.append({"sum": "NCCL", "tokens": num, "us": us})
    return found


def run(rank: int, size: int, meeting: str, out: Path | None) -> None:
    began = time.perf_counter()
    with Group.join(rank, size, meeting, device=f"cuda:{rank}", timeout_s=60.0) as group:
        met = time.perf_counter() - began
        found = lines(group)
    if rank:
        return
    print(f"{size} ranks have met in {met:.1f} s")
    for line in found:
        print(f"    {line['sum']:24} {line['tokens']:5} tokens: {line['us']:8.2f} us", flush=True)
    if out is not None:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        of = {"ranks": size, "gpu": torch.cuda.get_device_name(), "nccl": nccl}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps({**of, "torch": torch.__version__, "lines": found}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append a line of JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with tempfile.TemporaryDirectory() as room:
        pids = []
        for rank in range(args.ranks):
            pid = os.fork()
            if not pid:
                status = 1
                signal.alarm(PATIENCE_S)  # a sum of peers waits for a dead rank for ever
                try:
                    run(rank, args.ranks, f"file://{room}/meeting", args.out)
                    status = 0
                except Exception:
                    logging.exception("rank %d", rank)
                sys.stdout.flush()
                os._exit(status)
            pids.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    sys.exit(any(statuses))


if __name__ == "__main__":
    main()
