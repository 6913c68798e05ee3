"""How the products of a decoding step had best be cut: some blocks of Falcon-40B under each way.

    python bench/cuts.py --out bench/results/cuts.jsonl

`bench/kernels.py --cuts` times products alone; here they run as the product runs them, beside
attention, in a CUDA graph, so what a cut does to its neighbours counts. Exact shapes, random 4-bit
weights, through the engine's `Runner`. Printed: microseconds of a block for each number of
sequences, and how far hidden states are from those of the first way.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from step import MODELS, PAGE_LEN, Bench, fill, random_model

from longwing.engine.runner import Runner
from longwing.kernels import StreamedWeight
from longwing.kernels import wna16_triton as kernels
from longwing.kernels.wna16_cut import Beside, Cut, ParallelBlock
from longwing.models import Decoder
from longwing.models.fused_norm import Handover

LAYERS = 12
"""4.3 GB of weights: the L2 cache forgets each before it is read again."""

CONTEXT = 1024
STEPS = 30

WAYS: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "norms by themselves": {"fold": False},
    "as if alone": {"alone": True},
    "attention_in twice": {"attention_in": 2.0},
    "attention_in half": {"attention_in": 0.5},
    "attention_out twice": {"attention_out": 2.0},
    "attention_out half": {"attention_out": 0.5},
    "mlp_in twice": {"mlp_in": 2.0},
    "mlp_out half": {"mlp_out": 0.5},
    "mlp_out twice": {"mlp_out": 2.0},
    "3 stages": {"stages": 3},
    "4 stages": {"stages": 4},
    "5 stages": {"stages": 5},
    "as chosen, again": {},
}


@contextmanager
def cut(model: Decoder, way: dict[str, Any]) -> Iterator[None]:
    """Let a model's products be cut in another way than `choose_cut` would.

    A way may say: whether norms `fold`; whether all are cut as if `alone`; how many times as many
    programs one of a `ParallelBlock`'s products has, by its name; and the `stages` of all.
    """
    choose = kernels.choose_cut

    def chosen(weight: StreamedWeight, num_tokens: int, beside: Beside | None = None) -> Cut:
        found = choose(weight, num_tokens, None if way.get("alone") else beside)
        return replace(found, stages=way.get("stages", found.stages)) if beside else found

    with ExitStack() as stack:
        if not way.get("fold", True):
            stack.enter_context(patch.object(Handover, "norms_for", lambda *_: ()))
        stack.enter_context(patch.object(kernels, "choose_cut", chosen))
        for block in model.blocks:
            stack.enter_context(patch.object(block, "shares", _scaled(block.shares, way)))
        yield


def _scaled(shares: ParallelBlock, way: dict[str, Any]) -> ParallelBlock:
    """Some products in as many times as many programs as the way says."""
    for field in fields(shares):
        beside: Beside = getattr(shares, field.name)
        times = way.get(field.name, 1)
        aims = {"two": round(beside.two * times), "eight": round(beside.eight * times)}
        shares = replace(shares, **{field.name: replace(beside, **aims)})
    return shares


def time_blocks(runner: Runner, batch: int) -> tuple[float, torch.Tensor]:
    """Microseconds of a block in a step of `batch` sequences, and the hidden states."""
    bench = Bench(name="falcon-40b", runner=runner, record=lambda _: None, steps=STEPS)
    works = bench.works(batch, CONTEXT - 1, [[1 + s] for s in range(batch)])
    hidden_TD = runner.forward(works).float()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        runner.forward(works)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / STEPS / LAYERS, hidden_TD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append a JSON line for each way")
    parser.add_argument("--commit", default="", help="to be noted")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    args = parser.parse_args()
    MODELS["falcon-40b"]["num_hidden_layers"] = LAYERS
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": args.commit,
        "command": " ".join(["python", *sys.argv]),
    }
    print(about, flush=True)
    with torch.inference_mode():
        model = random_model("falcon-40b", 4, CONTEXT + PAGE_LEN)
        num_pages = max(args.batches) * (CONTEXT // PAGE_LEN + 1)
        first: dict[int, torch.Tensor] = {}
        for name in args.ways:
            with cut(model, WAYS[name]):
                runner = Runner(model, num_pages=num_pages, page_len=PAGE_LEN, kv_dtype="bfloat16")
                torch.manual_seed(1)
                for pages in runner.pages:
                    fill(pages)
                us, errors = {}, {}
                for batch in args.batches:
                    us[batch], hidden_TD = time_blocks(runner, batch)
                    exact_TD = first.setdefault(batch, hidden_TD)
                    errors[batch] = float((hidden_TD - exact_TD).norm() / exact_TD.norm())
                del runner
            row = "  ".join(f"{n}: {t:6.1f} us, {errors[n]:.0e}" for n, t in us.items())
            print(f"{name:24} {row}", flush=True)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    line = {"way": name, "us_a_block": us, "error": errors} | about
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
