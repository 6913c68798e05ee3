"""What adapters cost a decoding step on one GPU: none, one and several beside a 4-bit Falcon.

    python bench/adapters.py --out bench/results/adapters.jsonl

Shapes and steps are `step.py`'s: the model as `stream_weights` leaves it, `Runner` with its graphs,
logits, greedy sampling. Adapters are random, of every linear of every block, and the sequences of a
batch go through them by turns. Beside the milliseconds stands how far a batch in which everybody
has the same adapter differs from the same tokens in a batch of all of them: 0, or a few roundings.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from step import MODELS, PAGE_LEN, fill, random_model

from longwing.checkpoint.adapter import Adapter, AdapterConfig
from longwing.engine.adapters import AdapterTable
from longwing.engine.cache import CacheKey
from longwing.engine.request import SamplingParams
from longwing.engine.runner import Runner
from longwing.engine.sampler import sample
from longwing.engine.sampling_state import SamplingState
from longwing.engine.sequence import Sequence, Work
from longwing.layers.lora import adaptable, attach, choice_of
from longwing.models import Decoder
from longwing.models.prepare import weight_bytes


def random_adapter(model: Decoder, rank: int, seed: int) -> Adapter:
    generator = torch.Generator("cuda").manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        numbers = torch.randn(rows, columns, device="cuda", generator=generator)
        scaled: torch.Tensor = numbers * (0.3 / columns**0.5)
        return scaled

    layers = {
        name: (matrix(rank, linear.in_features), matrix(linear.out_features, rank))
        for name, linear in adaptable(model)
        if name.startswith(model.BLOCKS)
    }
    config = AdapterConfig(rank=rank, alpha=rank, targets=())
    return Adapter(path=Path(f"random-{seed}"), config=config, layers=layers)


def works(batch: int, context: int, model: Decoder, names: list[str]) -> list[Work]:
    """A decoding step: sequences side by side in the cache, each with the next adapter."""
    each, made = -(-context // PAGE_LEN), []
    for s in range(batch):
        key = CacheKey(salt="", rung=model.context, adapter=names[s % len(names)])
        sequence = Sequence(id=str(s), prompt_ids=[1], max_len=context, key=key)
        sequence.pages = list(range(s * each, (s + 1) * each))
        made.append(Work(sequence, context - 1, [1 + s], 0, True))
    return made


def step_ms(runner: Runner, batch: list[Work], steps: int) -> float:
    states = [SamplingState(SamplingParams(max_new_tokens=1)) for _ in batch]
    times = []
    for _ in range(steps + 3):
        began = time.perf_counter()
        sample(runner.logits(runner.forward(batch), range(len(batch))), states)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[3:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="falcon-7b", choices=MODELS)
    parser.add_argument("--numbers", default="0,1,4,16", help="Adapters to serve, in turn.")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    batches = [int(word) for word in args.batches.split(",")]
    for num in (int(word) for word in args.numbers.split(",")):
        names = [f"a{place}" for place in range(num)]

        def with_adapters(model: Decoder, num: int = num) -> None:
            attach(model, [random_adapter(model, args.rank, seed) for seed in range(num)])

        model = random_model(args.model, 4, args.context, with_adapters)
        choice = choice_of(model)
        runner = Runner(
            model,
            num_pages=max(batches) * -(-args.context // PAGE_LEN),
            page_len=PAGE_LEN,
            kv_dtype="bfloat16",
            most_sequences=max(batches),
            adapters=None if choice is None else AdapterTable(names, choice),
        )
        for pages in runner.pages:
            fill(pages)
        for batch in batches:
            mixed = works(batch, args.context, model, ["", *names])
            found = {
                "model": args.model,
                "adapters": num,
                "rank": args.rank,
                "batch": batch,
                "ms": step_ms(runner, mixed, args.steps),
                "weight_bytes": weight_bytes(model),
                "device": torch.cuda.get_device_name(),
            }
            if num:
                found["apart"] = apart(runner, mixed)
            print(json.dumps(found), flush=True)
            if args.out is not None:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(found) + "\n")
        del model, runner


def apart(runner: Runner, mixed: list[Work]) -> float:
    """The largest relative difference of a token's hidden state, alone with its adapter and not."""
    mixed_TD = runner.forward(mixed).float().clone()
    worst = 0.0
    for place, work in enumerate(mixed):
        alone = []
        for other in mixed:  # the same texts, all with this one's adapter
            sequence = Sequence(
                id=other.sequence.id,
                prompt_ids=[1],
                max_len=other.sequence.max_len,
                key=replace(other.sequence.key, adapter=work.sequence.key.adapter),
            )
            sequence.pages = list(other.sequence.pages)
            alone.append(replace(other, sequence=sequence))
        found_D = runner.forward(alone)[place].float()
        difference = (found_D - mixed_TD[place]).norm() / mixed_TD[place].norm()
        worst = max(worst, float(difference))
    return worst


if __name__ == "__main__":
    main()
