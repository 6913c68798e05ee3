r"""Perplexity of a model quantised by several methods, on text that calibration never saw.

    python bench/quantise_perplexity.py --model DIR --text HELD_OUT.txt --bits 4 3 2 \\
        --group-sizes 128 64 -1 --methods rtn plain default --out results.json

"plain" is GPTQ as published: scales from the range, columns in order. "default" is what `longwing
quantize` does unasked. All share the bundled calibration text, 128 samples of 2,048 tokens.
Perplexity: exp of the mean loss over consecutive windows of 2,048 tokens, each read on its own.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from longwing.engine.generator import Generator, load
from longwing.errors import LongwingError
from longwing.quant.calibration import make_calibration
from longwing.quant.quantize import quantize
from longwing.quant.spec import QuantSpec
from longwing.tokenizer import Tokenizer

WINDOW = 2048

METHODS = {
    "rtn": {"method": "rtn", "grid": "minmax"},
    "plain": {
        "method": "gptq",
        "grid": "minmax",
        "act_order": False,
        "static_groups": False,
        "refits": 0,
        "sweeps": 0,
    },
    "default": {},
}


def perplexity(generator: Generator, token_ids: list[int]) -> float:
    """exp(mean loss) over windows of WINDOW tokens; the first token of each is not predicted."""
    loss, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, WINDOW):
        window = token_ids[start : start + WINDOW]
        logits_TV = generator.logits(window)[:-1]
        targets_T = torch.tensor(window[1:], device=logits_TV.device)
        loss += float(torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum"))
        count += len(window) - 1
    return math.exp(loss / count)


def machine(device: str) -> str:
    """What this ran on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"


def main() -> None:
    """Run the grid and write one JSON object a line as results come."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 64, -1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--extra", default="{}", help="JSON: name -> QuantSpec fields")
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after this")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    methods = {**METHODS, **json.loads(args.extra)}
    began = time.monotonic()
    tokenizer = Tokenizer.from_folder(args.model)
    text = args.text.read_text(encoding="utf-8")
    ids: list[int] = []
    for start in range(0, len(text), 100_000):
        ids += tokenizer.encode(text[start : start + 100_000])
    ids = ids[: args.tokens]
    calibration = make_calibration(tokenizer, num_samples=args.samples)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    out = args.out.open("a")

    def record(row: dict[str, object]) -> None:
        out.write(json.dumps({**row, "machine": machine(args.device), "commit": commit}) + "\n")
        out.flush()
        print(row, flush=True)

    record({"method": "dense", "tokens": len(ids), "perplexity": measured(args.model, args, ids)})
    for bits in args.bits:
        for group_size in args.group_sizes:
            for name in args.methods:
                if time.monotonic() - began > args.seconds:
                    sys.exit("out of time; the rest was not begun")
                spec = QuantSpec(bits=bits, group_size=group_size, **methods[name])
                with tempfile.TemporaryDirectory() as base:
                    started = time.monotonic()
                    try:
                        quantize(
                            args.model, Path(base) / "out", spec, calibration, device=args.device
                        )
                    except LongwingError as error:
                        record({"bits": bits, "group_size": group_size, "error": str(error)})
                        continue
                    seconds = time.monotonic() - started
                    value = measured(Path(base) / "out", args, ids)
                record(
                    {
                        "bits": bits,
                        "group_size": group_size,
                        "method": name,
                        "perplexity": value,
                        "quantise_s": round(seconds, 1),
                    }
                )


def measured(folder: Path, args: argparse.Namespace, ids: list[int]) -> float:
    """Perplexity of a folder, computed in float32 from dense or dequantised weights."""
    generator = load(folder, device=args.device, dtype="float32")
    for _, linear in generator.model.linears():
        if linear.packed is not None:
            linear.set_dense(linear.packed, torch.float32)
    return round(perplexity(generator, ids), 4)


if __name__ == "__main__":
    main()
