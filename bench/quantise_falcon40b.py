"""Time and memory of quantising Falcon-40B's exact blocks, random weights, on one GPU.

    python bench/quantise_falcon40b.py --work DIR --gpu-memory 24GiB

Writes a three-block Falcon-40B (bfloat16) to DIR and quantises it by the product's own path, 128
samples of 2,048 tokens. The first block is warm-up; the time for 60 is extrapolated, and said so.
"""

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path

import torch

from longwing.checkpoint import write_shards
from longwing.models import ModelConfig, empty_model
from longwing.plan import KNOWN, parse_size
from longwing.quant.calibration import Calibration
from longwing.quant.quantize import quantize
from longwing.quant.spec import QuantSpec

NUM_BLOCKS = 3


def write_model(folder: Path) -> ModelConfig:
    """Falcon-40B with three blocks and random weights."""
    raw = {**KNOWN["falcon-40b"], "num_hidden_layers": NUM_BLOCKS}
    config = ModelConfig.from_hf(raw)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    model = empty_model(config)
    torch.manual_seed(0)

    def tensors():  # type: ignore[no-untyped-def]
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight":
                continue
            value = torch.randn(parameter.shape, device="cuda")
            value = 1 + 0.1 * value if value.ndim == 1 else value * parameter.shape[-1] ** -0.5
            if name.endswith("bias"):
                value = value - 1
            yield name, value.bfloat16().cpu()

    write_shards(folder, tensors(), {"format": "pt"})
    return config


def main() -> None:
    """Write, quantise, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--spec", default="{}", help="JSON: QuantSpec fields")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    config = write_model(args.work / "dense")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    samples = tuple(
        torch.randint(0, config.vocab_size, (2048,), generator=generator) for _ in range(128)
    )
    calibration = Calibration(samples=samples, source="random ids", sha256="0" * 64)
    at: dict[int, float] = {}

    def note(what: str, done: int, total: int) -> None:
        if what == "quantising" and done % (total // NUM_BLOCKS) == 0:
            torch.cuda.synchronize()
            at.setdefault(done // (total // NUM_BLOCKS), time.monotonic())

    started = time.monotonic()
    done = quantize(
        args.work / "dense",
        args.work / "out",
        QuantSpec(**json.loads(args.spec)),
        calibration,
        device="cuda",
        memory=parse_size(args.gpu_memory),
        progress=note,
    )
    print(f"device: {torch.cuda.get_device_name()}, spec {args.spec}")
    for report in done.reports:
        print(f"{report.name}: error {report.error:.2e}, solved in {report.seconds:.2f} s")
    marks = [at[index] for index in sorted(at)]
    blocks = [round(end - begin, 2) for begin, end in itertools.pairwise(marks)]
    print(f"seconds a block: {blocks}; 60 blocks, extrapolated: {blocks[-1] * 60 / 60:.1f} minutes")
    print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated")
    print(f"whole run with three blocks: {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
