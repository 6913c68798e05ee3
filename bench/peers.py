"""transformers in bfloat16 on one GPU: the figures that `longwing bench` is set beside.

    python bench/peers.py falcon-7b falcon-40b --context 1024 --prompt 8192 --out peers.jsonl

Exact shapes, random weights made on the GPU (84 GB for Falcon-40B), greedy. A decode step is the
difference between two generations of different lengths over the same prompt; a prefill is a
generation of one token.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import FalconConfig, FalconForCausalLM

from longwing.models import ModelConfig
from longwing.plan import KNOWN, bytes_per_step, plan

FEW, MANY = 4, 20
"""Tokens of the two generations."""


def random_model(name: str) -> FalconForCausalLM:
    """The model on the GPU, every weight random."""
    config = FalconConfig(**{k: v for k, v in KNOWN[name].items() if k != "torch_dtype"})
    with torch.device("meta"):
        model = FalconForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
            if parameter.ndim == 1:
                parameter.add_(1)
    rotary = model.transformer.rotary_emb
    model.transformer.rotary_emb = type(rotary)(config).to("cuda")  # its buffers are no parameters
    model.tie_weights()
    return model


def generate(model: FalconForCausalLM, prompt: torch.Tensor, num_new: int) -> float:
    """Seconds that a generation of exactly so many tokens takes."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, contexts: list[int], prompts: list[int]) -> list[dict[str, object]]:
    """One model's figures."""
    model = random_model(name)
    config = ModelConfig.from_hf(KNOWN[name])
    system = f"transformers {transformers.__version__} bfloat16"
    facts: dict[str, object] = {"model": name, "system": system}
    lines = []
    for context in contexts:
        prompt = torch.randint(100, 60_000, (1, context), device="cuda")
        generate(model, prompt, FEW)
        steps = [
            (generate(model, prompt, MANY) - generate(model, prompt, FEW)) / (MANY - FEW)
            for _ in range(3)
        ]
        read = bytes_per_step(plan(config, context=context))
        ms = round(1e3 * statistics.median(steps), 2)
        lines.append({**facts, "what": "decode", "context": context, "ms": ms, "bytes": read})
    for num_tokens in prompts:
        prompt = torch.randint(100, 60_000, (1, num_tokens), device="cuda")
        seconds = min(generate(model, prompt, 1) for _ in range(2))
        lines.append({**facts, "what": "prefill", "context": num_tokens, "s": round(seconds, 3)})
    peak = torch.cuda.max_memory_reserved()
    lines.append({**facts, "what": "memory", "peak_bytes": peak})
    return lines


def main() -> None:
    """Measure the models asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=[name for name in KNOWN if "rw" not in name])
    parser.add_argument("--context", type=int, nargs="*", default=[1024])
    parser.add_argument("--prompt", type=int, nargs="*", default=[8192])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    with args.out.open("w") as file:
        for name in args.models:
            torch.cuda.reset_peak_memory_stats()
            for line in measure(name, args.context, args.prompt):
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
