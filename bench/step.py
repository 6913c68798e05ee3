"""Whole steps of Falcon-40B and 7B on one GPU: milliseconds, the share of the floor, and the parts.

    python bench/step.py --out bench/results/step.jsonl

Exact shapes, random 4-bit weights made on the GPU (no folder is needed), through the product: the
model as `stream_weights` leaves it, `Runner` with its graphs, logits, greedy sampling, and the one
question a step that the host asks. What is not in it: the scheduler, detokenising and the server;
`longwing bench` has those. Caches are filled with random keys and values.

    python bench/step.py --models falcon-40b --kinds overlap

has them too: the engine's own steps, each one's events written as the server gets them, with the
host's work on a step done beside the next one and after it, by turns in one run of one batch. Its
texts end at the context that is named, so what is measured lies some hundred tokens below.

Floors are those of bytes and operations at 4.3 TB/s and 790 TFLOP/s, attention's operations at 55%
of them in a prefill, as head dimension 64 allows.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from longwing import tiny
from longwing.engine.cache import CacheKey
from longwing.engine.engine import Engine
from longwing.engine.events import Step, to_wire
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams
from longwing.engine.runner import Runner
from longwing.engine.sampler import sample
from longwing.engine.sampling_state import SamplingState
from longwing.engine.sequence import Sequence, Work
from longwing.engine.wire import to_frame
from longwing.kernels import KVPages, PackedWeight
from longwing.layers import Linear
from longwing.models import Decoder, ModelConfig, empty_model
from longwing.models.prepare import weight_bytes
from longwing.models.streaming import stream_weights
from longwing.plan.speed import attention_flops, prefill_flops
from longwing.tokenizer import Tokenizer

BYTES_PER_MS = 4.3e9
FLOPS_PER_MS = 790e9
PAGE_LEN = 128
KINDS = ("decode", "overlap", "prefill")

BUDGET = 2048
"""Tokens of a step of the engine at most."""

TURNS = 5
"""Windows with overlap, and as many without."""

SETTLING = 2
"""Steps before each window: the first belongs to the window before, in part."""

COMMON: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 65024,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 11,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "falcon-40b": {
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
    },
    "falcon-7b": {
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "new_decoder_architecture": False,
    },
}
GROUPS = {"falcon-40b": 128, "falcon-7b": 64}
DECODE = {  # batch, context
    "falcon-40b": [(1, 1024), (1, 24_576), (16, 1024), (32, 1024)],
    "falcon-7b": [(1, 1024), (1, 24_576)],
}
PREFILL = {"falcon-40b": [(24_000, 12_000), (24_000, 2048)], "falcon-7b": [(24_000, 12_000)]}
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
GOALS_MS = {
    ("falcon-40b", 1, 1024): 6.2,
    ("falcon-40b", 1, 24_576): 7.0,
    ("falcon-40b", 16, 1024): 8.5,
    ("falcon-40b", 32, 1024): 11.0,
    ("falcon-40b", 24_000, 12_000): 4000.0,
    ("falcon-7b", 1, 1024): 1.5,
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model, its runner, and how to say what was measured."""

    name: str
    runner: Runner
    record: Callable[[dict[str, Any]], None]
    steps: int

    @property
    def model(self) -> Decoder:
        return self.runner.model

    def works(self, batch: int, start: int, tokens: list[list[int]]) -> list[Work]:
        """Sequences that lie side by side in the cache."""
        rung = self.model.context
        each = min(self.runner.num_pages // batch, -(-rung // PAGE_LEN))
        works = []
        for s in range(batch):
            sequence = Sequence(
                id=str(s), prompt_ids=[1], max_len=rung, key=CacheKey(salt="", rung=rung)
            )
            sequence.pages = list(range(s * each, (s + 1) * each))
            works.append(Work(sequence, start, tokens[s], 0, True))
        return works


def random_model(
    name: str, bits: int, context: int, before: Callable[[Decoder], object] | None = None
) -> Decoder:
    """A model of that shape with random weights, laid out for streaming after `before`."""
    torch.manual_seed(0)
    model = empty_model(ModelConfig.from_hf({**COMMON, **MODELS[name]}), context)
    for path, linear in list(model.linears()):
        if path != "lm_head":
            linear.set_packed(random_packed(linear, bits, GROUPS[name]))
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        numbers = torch.randn(parameter.shape, device="cuda") * (
            0.02 if parameter.ndim > 1 else 0.1
        )
        if parameter.ndim == 1 and leaf == "weight":
            numbers += 1
        setattr(model.get_submodule(owner), leaf, nn.Parameter(numbers.bfloat16(), False))
    model.lm_head.weight = model.embedding.weight
    model.place_tables(torch.device("cuda"))
    if before is not None:
        before(model)
    stream_weights(model)
    return model.eval()


def random_packed(linear: Linear, bits: int, group_size: int) -> PackedWeight:
    """Any words are some weights; scales keep products near 1."""
    K, N = linear.in_features, linear.out_features
    shape = (K // group_size, N)
    words = torch.randint(-(2**31), 2**31, (K * bits // 32, N), dtype=torch.int32, device="cuda")
    scales_GN = (torch.rand(shape, device="cuda") + 0.5) * 2 / 2**bits / K**0.5
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=words,
        zeros_GN=torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8, device="cuda"),
        scales_GN=scales_GN.half(),
    )


def fill(pages: KVPages) -> None:
    for numbers in (pages.keys_PBKH, pages.values_PBKH):
        numbers.normal_()


def decode(bench: Bench, batch: int, context: int) -> None:
    """Steps one after another, each beginning with the tokens that the one before gave."""
    states = [SamplingState(SamplingParams(max_new_tokens=1)) for _ in range(batch)]
    runner, rows = bench.runner, range(batch)
    works = bench.works(batch, 0, [[1 + s] for s in range(batch)])
    tokens = [work.token_ids for work in works]

    def step(start: int) -> None:
        now = [
            Work(work.sequence, start, own, 0, True)
            for work, own in zip(works, tokens, strict=True)
        ]
        logits_SV = runner.logits(runner.forward(now), rows)
        for own, token_id in zip(tokens, sample(logits_SV, states).ids, strict=True):
            own[0] = token_id

    first = context - bench.steps - 3
    for i in range(3):
        step(first + i)
    times = []
    for i in range(bench.steps):
        began = time.perf_counter()
        step(first + 3 + i)
        times.append((time.perf_counter() - began) * 1e3)
    ms = statistics.median(times)
    parts = profiled(lambda: step(context - 1), 4)
    config = bench.model.config
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * config.num_layers * 2
    read = weight_bytes(bench.model) + batch * context * kv_bytes
    goal = GOALS_MS.get((bench.name, batch, context))
    report(bench, f"decode {batch} x {context}", ms, read / BYTES_PER_MS, goal, parts)


def overlap(bench: Bench, batch: int, context: int, what: str, settings: dict[str, Any]) -> None:
    """The engine's steps with overlap and without, in windows by turns; and what the host takes."""
    runner, new_len = bench.runner, answer_len(batch, context, bench.steps)
    runner.record_graphs()
    options = EngineOptions(
        num_pages=runner.num_pages,
        page_len=PAGE_LEN,
        max_batch_tokens=BUDGET,
        max_sequences=batch,
        max_draft=0,
        draft_sequences=0,
    )
    tokenizer = Tokenizer.from_folder(tiny.FOLDER)  # Falcon's
    engine = Engine(bench.model, tokenizer, options, runner=lambda *_, **__: runner)
    for place in range(batch):
        params = SamplingParams(max_new_tokens=new_len, ignore_eos=True, seed=place, **settings)
        prompt = tuple(torch.randint(100, 60_000, (context - new_len,)).tolist())
        engine.add(str(place), Request(prompt_ids=prompt, params=params))
    times: dict[bool, list[float]] = {False: [], True: []}
    with open("/dev/null", "wb") as sink:
        while len(engine.scheduler.running) < batch or not all(
            sequence.num_left == 1 for sequence in engine.scheduler.running
        ):
            tell(engine, sink)
        for turn in range(2 * TURNS):
            engine._overlaps = bool(turn % 2)
            for _ in range(SETTLING):
                tell(engine, sink)
            began = time.perf_counter()
            for _ in range(bench.steps):
                if tell(engine, sink) != batch:
                    raise RuntimeError("a step without a token for each")
            times[engine._overlaps].append((time.perf_counter() - began) * 1e3 / bench.steps)
    off, on = statistics.median(times[False]), statistics.median(times[True])
    print(
        f"{bench.name} overlap {batch} x {context} {what}: {on:.3f} ms with, {off:.3f} without "
        f"({off - on:+.3f} gained); windows with {spread(times[True])}, without "
        f"{spread(times[False])}",
        flush=True,
    )
    name = f"overlap {batch} x {context} {what}"
    bench.record({"model": bench.name, "what": name, "ms": on, "without_ms": off, "times": times})


def answer_len(batch: int, context: int, steps: int) -> int:
    """Tokens that each text of `overlap` may have beside its prompt, to end at the context.

    A text whose prompt has been read gets a token in every step that reads of the others', and a
    step reads all that its budget leaves. Then come the windows; and nobody may be at his end while
    they last, as a step ahead goes without who is.

    Raises:
        SystemExit: they leave no room for a prompt.
    """
    reading = -(-batch * context // (BUDGET - batch))
    num = reading + 2 * TURNS * (steps + SETTLING) + 2
    if num >= context:
        most = (context - reading - 3) // (2 * TURNS) - SETTLING
        raise SystemExit(
            f"--steps {steps} makes {num} tokens a text, and a context of {context} has room for "
            f"fewer; {most} steps are the most"
        )
    return num


def tell(engine: Engine, sink: IO[bytes]) -> int:
    """A step, its events written as the worker writes them; the number of tokens it gave."""
    said = engine.step()
    steps = [vars(step) for step in engine.take_steps()]
    wire = [[name, to_wire(event)] for name, event in said]
    message = {"op": "events", "events": wire, "steps": steps, "stats": vars(engine.stats)}
    sink.write(to_frame(message))
    return sum(isinstance(event, Step) for _, event in said)


def spread(times: list[float]) -> str:
    return f"{min(times):.3f} to {max(times):.3f}"


def prefill(bench: Bench, length: int, chunk: int) -> None:
    """A whole prompt in chunks, to the first token."""
    prompt = torch.randint(1, 60_000, (length,)).tolist()
    (work,) = bench.works(1, 0, [prompt])
    runner, state = bench.runner, SamplingState(SamplingParams(max_new_tokens=1))

    def read() -> None:
        hidden_TD = None
        for start in range(0, length, chunk):
            ids = prompt[start : start + chunk]
            wants = start + chunk >= length
            one = [Work(work.sequence, start, ids, 0, wants)]
            hidden_TD = runner.forward(one, ends_only=True)
        assert hidden_TD is not None
        sample(runner.logits(hidden_TD, [0]), [state])

    read()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        read()
        times.append((time.perf_counter() - began) * 1e3)
    config = bench.model.config
    attention = attention_flops(config, length)
    floor = (prefill_flops(config, length) + attention * (1 / 0.55 - 1)) / FLOPS_PER_MS
    goal = GOALS_MS.get((bench.name, length, chunk))
    what = f"prefill {length} in {chunk}"
    report(bench, what, min(times), floor, goal, profiled(read, 1))


def profiled(call: Callable[[], object], times: int) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches a call, by kernel; they may overlap."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            part = parts[event.key[:60]]
            part[0] += event.self_device_time_total / 1e3 / times
            part[1] += event.count / times
    by_time = sorted(parts.items(), key=lambda item: -item[1][0])
    return {name: (round(ms, 3), round(count)) for name, (ms, count) in by_time[:14]}


def report(
    bench: Bench,
    what: str,
    ms: float,
    floor_ms: float,
    goal_ms: float | None,
    parts: dict[str, tuple[float, int]],
) -> None:
    goal = "" if goal_ms is None else f", goal {goal_ms:g}: {'met' if ms <= goal_ms else 'MISSED'}"
    print(
        f"{bench.name} {what}: {ms:.3f} ms, floor {floor_ms:.3f} ({floor_ms / ms:.0%}){goal}",
        flush=True,
    )
    for name, (part_ms, count) in parts.items():
        print(f"    {part_ms:9.3f} ms {count:5} x {name}", flush=True)
    bench.record(
        {
            "model": bench.name,
            "what": what,
            "ms": ms,
            "floor_ms": floor_ms,
            "goal_ms": goal_ms,
            "parts": parts,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append a JSON line for each measurement")
    parser.add_argument("--commit", default="", help="to be noted")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    if "overlap" in args.kinds:  # to be refused now, not after minutes
        for batch, length in (shape for name in args.models for shape in DECODE[name]):
            answer_len(batch, length, args.steps)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": args.commit,
        "command": " ".join(["python", *sys.argv]),
        "bits": args.bits,
    }
    print(about, flush=True)

    def record(line: dict[str, Any]) -> None:
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(line | about) + "\n")

    for name in args.models:
        began = time.perf_counter()
        context = 24_576 + PAGE_LEN
        with torch.inference_mode():
            model = random_model(name, args.bits, context)
            num_pages = 32 * 1024 // PAGE_LEN + context // PAGE_LEN
            runner = Runner(model, num_pages=num_pages, page_len=PAGE_LEN, kv_dtype="bfloat16")
            for pages in runner.pages:
                fill(pages)
            bench = Bench(name=name, runner=runner, record=record, steps=args.steps)
            print(f"{name}: made in {time.perf_counter() - began:.1f} s", flush=True)
            if "decode" in args.kinds:
                for batch, length in DECODE[name]:
                    decode(bench, batch, length)
                if runner.graphs is not None:
                    free = torch.cuda.mem_get_info()[0]
                    began = time.perf_counter()
                    for shape in runner.graphs.usual_shapes():
                        runner.graphs.record(shape)
                    used = (free - torch.cuda.mem_get_info()[0]) / 2**20
                    print(
                        f"    {len(runner.graphs)} graphs, the last of them in "
                        f"{time.perf_counter() - began:.1f} s and {used:.0f} MiB",
                        flush=True,
                    )
            if "overlap" in args.kinds:
                for batch, length in DECODE[name]:
                    overlap(bench, batch, length, "greedy", {})
                overlap(bench, 1, 1024, "drawn", DRAWN)
            if "prefill" in args.kinds:
                for length, chunk in PREFILL[name]:
                    prefill(bench, length, chunk)
        del model, runner, bench
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
