"""Decode speed on a CPU: the plain model, its prepared forms, and transformers, in one run.

    python bench/cpu_decode.py MODEL-4BIT [--dense MODEL] [--streams 1 8 32] [--context 128]

Steps of all contenders are interleaved, so that whatever else the machine does hits all alike; the
table gives each one's median step and its ratio to the plain model's. MODEL-4BIT is a GPTQ folder;
with --dense, transformers runs that (unquantised) folder in float32 and bfloat16.

Shape key: S sequences.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from longwing.kernels import AttentionInputs, KVPages
from longwing.models import Decoder, load_model
from longwing.models.prepare import prepare

PAGE_LEN = 64


def our_step(model: Decoder, S: int, context: int, room: int) -> Callable[[int], None]:
    """A function that decodes token i of S sequences, each `context` tokens in."""
    config = model.config
    count = -(-(context + room) // PAGE_LEN)
    pages = tuple(
        KVPages.allocate(S * count, PAGE_LEN, config.num_kv_heads, config.head_dim, "float32")
        for _ in range(config.num_layers)
    )
    tables_SM = torch.randperm(S * count).view(S, count).int()
    tokens_S = torch.randint(0, config.vocab_size, (S,))
    rung = model.rotary.rung_for(context + room, 0) if model.rotary else 0

    @torch.inference_mode()
    def step(i: int) -> None:
        at = context + i
        positions_S = torch.full((S,), at)
        cos_TF, sin_TF = model.rotary.rows(rung, positions_S) if model.rotary else (None, None)
        inputs = AttentionInputs(
            starts_S1=torch.arange(S + 1, dtype=torch.int32),
            context_lens_S=torch.full((S,), at + 1, dtype=torch.int32),
            page_tables_SM=tables_SM,
            slots_T=tables_SM[:, at // PAGE_LEN].long() * PAGE_LEN + at % PAGE_LEN,
            pages=pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
        )
        model.logits(model(tokens_S, positions_S, inputs)).argmax(-1)

    return step


def their_step(model: torch.nn.Module, S: int, context: int) -> Callable[[int], None]:
    """The same for transformers, with its own cache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.randint(0, 1000, (S, context)), past_key_values=cache, logits_to_keep=1)
    tokens_S1 = torch.randint(0, 1000, (S, 1))

    @torch.inference_mode()
    def step(i: int) -> None:
        model(tokens_S1, past_key_values=cache).logits.argmax(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    ours = {
        "plain float32": load_model(arguments.model, unpack=True),
        "prepared float32": prepare(load_model(arguments.model, unpack=True), "float32"),
        "prepared small": prepare(load_model(arguments.model, unpack=False), "small"),
        "prepared fast": prepare(load_model(arguments.model, unpack=False), "fast"),
    }
    theirs = {}
    if arguments.dense:
        from transformers import AutoModelForCausalLM

        for dtype in ("float32", "bfloat16"):
            model = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=dtype)
            theirs[f"transformers {dtype}"] = model.eval()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.model.name}")
    for S in arguments.streams:
        steps = {n: our_step(m, S, arguments.context, arguments.steps) for n, m in ours.items()}
        steps |= {n: their_step(m, S, arguments.context) for n, m in theirs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(arguments.steps):
            for name, step in steps.items():
                started = time.perf_counter()
                step(i)
                seconds[name].append(time.perf_counter() - started)
        plain = statistics.median(seconds["plain float32"])
        for name, taken in seconds.items():
            median = statistics.median(taken)
            print(
                f"S={S:3d}  {name:24s} {1e3 * median:8.2f} ms/step (best {1e3 * min(taken):7.2f})"
                f"  {S / median:7.1f} tok/s  {plain / median:5.2f} x plain",
                flush=True,
            )


if __name__ == "__main__":
    main()
