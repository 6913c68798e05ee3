"""Tokens a second, time to the first token and between tokens at 1, 8 and 32 streams, side by side.

    python bench/serve.py --model smollm2-4bit --dense smollm2 --gguf smollm2.gguf \
        --llama-python llama-venv/bin/python

The systems run one after another, in rounds, in one run, on the same prompts: `longwing serve` over
HTTP with as many streaming clients; its engine alone, in process; transformers' `generate` on the
dense model, all prompts in one padded batch; and llama.cpp (through llama-cpp-python's own
interpreter, if one is given) decoding as many sequences at once through its batch interface. All
get the same number of threads.
The ratio of two systems in one round is what counts: machines are noisy.

Prompts are passages of English; answers are greedy, of a fixed length. The figures of `longwing`
are those of its clients, which run on the same cores: they include HTTP, two processes and the
clients' own work. The others are called in process and have none of that.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PASSAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered the rightful property of some one or other of "
    "their daughters. My dear Mr. Bennet, said his lady to him one day, have you heard that "
    "Netherfield Park is let at last? Mr. Bennet replied that he had not. "
)


@dataclass(frozen=True)
class Figures:
    """One system at one number of streams.

    Attributes:
        tokens_per_s: generated tokens of all streams over the time from start to end.
        decode_per_s: the same from the first token on, all streams decoding.
        ttft_ms: median time to the first token.
        itl_ms: median time between two tokens of a stream.
    """

    tokens_per_s: float
    decode_per_s: float
    ttft_ms: float
    itl_ms: float


def figures(starts: list[float], arrivals: list[list[float]]) -> Figures:
    """From the time each stream began, and the times its tokens came."""
    first, last = min(starts), max(times[-1] for times in arrivals)
    total = sum(len(times) for times in arrivals)
    all_begun = max(times[0] for times in arrivals)
    first_end = min(times[-1] for times in arrivals)
    decoding = sum(sum(all_begun < at <= first_end for at in times) for times in arrivals)
    gaps = [b - a for times in arrivals for a, b in itertools.pairwise(times)]
    return Figures(
        tokens_per_s=total / (last - first),
        decode_per_s=decoding / (first_end - all_begun) if first_end > all_begun else 0.0,
        ttft_ms=1000 * statistics.median(
            times[0] - start for times, start in zip(arrivals, starts, strict=True)
        ),
        itl_ms=1000 * statistics.median(gaps),
    )  # fmt: skip


def prompts(num: int) -> list[str]:
    """Passages that begin differently, so that no prefix is shared."""
    return [f"Page {7 * place + 3}. {PASSAGE}" for place in range(num)]


@contextmanager
def serving(model: Path, threads: int, options: list[str]) -> Iterator[str]:
    """A running `longwing serve`; its URL."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "longwing", "serve", str(model), "--port", "0", *options],
            stderr=log,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        try:
            while True:
                text = os.pread(log.fileno(), 2**20, 0).decode(errors="replace")
                if found := re.search(r" at (http://\S+)", text):
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start:\n{text}")
                time.sleep(0.2)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def longwing(url: str, num: int, num_new: int) -> Figures:
    """Streaming clients, all at once."""
    import httpx

    async def one(client: httpx.AsyncClient, prompt: str) -> tuple[float, list[float]]:
        parameters = {"max_new_tokens": num_new, "details": True}
        times = []
        began = time.perf_counter()
        body = {"inputs": prompt, "parameters": parameters}
        async with client.stream("POST", f"{url}/generate_stream", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    times.append(time.perf_counter())
        return began, times

    async def main() -> list[tuple[float, list[float]]]:
        async with httpx.AsyncClient(timeout=600) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts(num)))

    found = asyncio.run(main())
    return figures([began for began, _ in found], [times for _, times in found])


class EngineAlone:
    """The batching engine in this process, driven step by step."""

    def __init__(self, folder: Path, threads: int, options: dict[str, Any]) -> None:
        import torch

        from longwing.engine.loading import load_engine
        from longwing.engine.options import EngineOptions
        from longwing.engine.warmup import warm_up

        torch.set_num_threads(threads)
        self.engine, _ = load_engine(folder, EngineOptions(prefix_cache=False, **options))
        warm_up(self.engine)

    def __call__(self, num: int, num_new: int) -> Figures:
        from longwing.engine.events import Step
        from longwing.engine.request import Request, SamplingParams

        params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
        began = time.perf_counter()
        for place, prompt in enumerate(prompts(num)):
            ids = tuple(self.engine.tokenizer.encode(prompt))
            self.engine.add(str(place), Request(prompt_ids=ids, params=params))
        times: list[list[float]] = [[] for _ in range(num)]
        while self.engine.busy:
            events = self.engine.step()
            now = time.perf_counter()
            for name, event in events:
                if isinstance(event, Step):
                    times[int(name)].append(now)
        return figures([began] * num, times)


class Transformers:
    """`generate` on the dense model in float32, one padded batch."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, num: int, num_new: int) -> Figures:
        from transformers import LogitsProcessor, LogitsProcessorList

        times: list[float] = []

        class Clock(LogitsProcessor):
            def __call__(self, _ids: Any, scores: Any) -> Any:
                times.append(time.perf_counter())
                return scores

        inputs = self.tokenizer(prompts(num), return_tensors="pt", padding=True)
        began = time.perf_counter()
        self.model.generate(
            **inputs,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            logits_processor=LogitsProcessorList([Clock()]),
        )
        times.append(time.perf_counter())
        # The clock ticks before a token is chosen: a token's time is the next tick.
        return figures([began] * num, [times[1:]] * num)


LLAMA = """
import ctypes, json, sys, time
import llama_cpp as L
path, threads = sys.argv[1], int(sys.argv[2])
silent = L.llama_log_callback(lambda *a: None)
L.llama_log_set(silent, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
vocab = L.llama_model_get_vocab(model)
for line in sys.stdin:
    job = json.loads(line)
    num, new, texts = job["num"], job["new"], job["prompts"]
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512 * num, 2048, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = num, threads, threads
    ctx = L.llama_init_from_model(model, params)
    tokens = []
    for text in texts:
        room = (L.llama_token * 1024)()
        raw = text.encode()
        tokens.append(list(room[: L.llama_tokenize(vocab, raw, len(raw), room, 1024, False, True)]))
    batch = L.llama_batch_init(2048, 0, 1)

    def run(rows):
        batch.n_tokens = len(rows)
        for i, (token, pos, seq, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos, 1
            batch.seq_id[i][0], batch.logits[i] = seq, wanted
        assert L.llama_decode(ctx, batch) == 0

    size = L.llama_vocab_n_tokens(vocab)
    sampler = L.llama_sampler_init_greedy()
    began, times, last = time.perf_counter(), [[] for _ in range(num)], [0] * num
    for seq, prompt in enumerate(tokens):
        run([(t, p, seq, p == len(prompt) - 1) for p, t in enumerate(prompt)])
        last[seq] = L.llama_sampler_sample(sampler, ctx, len(prompt) - 1)
        times[seq].append(time.perf_counter())
    for step in range(new - 1):
        run([(last[s], len(tokens[s]) + step, s, True) for s in range(num)])
        last = [L.llama_sampler_sample(sampler, ctx, s) for s in range(num)]
        now = time.perf_counter()
        for s in range(num):
            times[s].append(now)
    print(json.dumps({"began": began, "times": times}), flush=True)
    L.llama_batch_free(batch)
    L.llama_free(ctx)
"""


class Llama:
    """llama.cpp in its own interpreter, told what to do a line at a time."""

    def __init__(self, python: Path, gguf: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [str(python), "-c", LLAMA, str(gguf), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, num: int, num_new: int) -> Figures:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"num": num, "new": num_new, "prompts": prompts(num)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        return figures([found["began"]] * num, found["times"])


def main() -> None:
    """Run the rounds and print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="4-bit folder, for longwing")
    parser.add_argument("--dense", type=Path, help="dense folder, for transformers")
    parser.add_argument("--gguf", type=Path, help="GGUF file, for llama.cpp")
    parser.add_argument("--llama-python", type=Path, help="an interpreter with llama-cpp-python")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--new", type=int, default=64, help="tokens an answer has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve-options", nargs="*", default=[], help="for longwing serve")
    args = parser.parse_args()
    options = [option for word in args.serve_options for option in word.split()]
    options += ["--max-sequences", str(max(args.streams)), "--no-prefix-cache"]
    with serving(args.model, args.threads, options) as url:
        systems: dict[str, Any] = {"longwing": lambda num, new: longwing(url, num, new)}
        limits = {"max_sequences": max(args.streams)}
        systems["longwing engine"] = EngineAlone(args.model, args.threads, limits)
        if args.dense:
            systems["transformers"] = Transformers(args.dense, args.threads)
        if args.gguf and args.llama_python:
            systems["llama.cpp"] = Llama(args.llama_python, args.gguf, args.threads)
        for num in args.streams:
            rounds: dict[str, list[Figures]] = {name: [] for name in systems}
            for _ in range(args.rounds):
                for name, system in systems.items():
                    rounds[name].append(system(num, args.new))
            report(num, rounds)


def report(num: int, rounds: dict[str, list[Figures]]) -> None:
    """One line of JSON a system; ratios are medians over rounds of longwing over the other."""
    for name, found in rounds.items():
        middle = {
            field: round(statistics.median(getattr(one, field) for one in found), 1)
            for field in asdict(found[0])
        }
        ratios = {}
        if not name.startswith("longwing"):
            for field in ("tokens_per_s", "decode_per_s"):
                for ours in ("longwing", "longwing engine"):
                    pairs = zip(rounds[ours], found, strict=True)
                    each = [getattr(a, field) / getattr(b, field) for a, b in pairs]
                    word = ours.replace(" ", "_")
                    ratios[f"{word}_over_{field}"] = round(statistics.median(each), 2)
        print(json.dumps({"streams": num, "system": name, **middle, **ratios}), flush=True)


if __name__ == "__main__":
    main()
