"""Ask one model one of the report's tasks: `longwing eval`, many cases at once, beside others.

    python recipes/tiny/evaluate.py runs/base --name base --task lines --longchat DIR --out FILE
    python recipes/tiny/evaluate.py runs/base --name falconlite --rope falconlite,alpha=0.25 …

The cases, the engine that answers them, the scoring and the record are the product's. What differs
from `longwing eval … --concurrency 32`: a cache of a given size, so that twelve of these share a
GPU, longer chunks of prompts, no prefixes kept (no two cases share any), no step begun before the
last one's tokens are read, and each prompt is made into tokens once. A process that is stopped
leaves every finished case on record.
"""

import argparse
from functools import cache
from pathlib import Path

from longwing.checkpoint import Checkpoint
from longwing.cli.eval_engine import BatchedModel
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.evals.run import Plan, run

CONTEXT = 24_576
PASSKEY_CHARACTERS, PASSKEY_LENGTHS = (12_000, 20_000, 31_000, 38_000), (24_000,)
CASES = 25
"""Of each column; LongChat's files hold as many."""


class Reader(BatchedModel):
    """A batched model that makes tokens of a prompt once."""

    def _prompt_ids(self, prompt: str, chat: bool) -> list[int]:
        return self._remembered(prompt, chat)

    @cache  # noqa: B019 - it lives as long as the process
    def _remembered(self, prompt: str, chat: bool) -> list[int]:
        return super()._prompt_ids(prompt, chat)


def plan_of(task: str, longchat: Path, cases: int, *, short: bool) -> Plan:
    """What is asked; `short` leaves the longer columns out."""
    if task == "passkey":
        lengths = () if short else PASSKEY_LENGTHS
        characters = (2000,) if short else PASSKEY_CHARACTERS
        return Plan(tasks=(task,), lengths=lengths, characters=characters, cases=cases)
    columns = {"topics": (5,), "lines": (200,)}[task] if short else ()
    return Plan(tasks=(task,), longchat=longchat, columns=columns, cases=cases)


def main() -> None:
    """Ask, and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--task", choices=("topics", "lines", "passkey"), required=True)
    parser.add_argument("--longchat", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rope", help="instead of the model's own settings")
    parser.add_argument("--cases", type=int, default=CASES, help="of each column")
    parser.add_argument("--short", action="store_true", help="the first column alone")
    parser.add_argument("--cache-tokens", type=int, default=640_000)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step at most")
    parser.add_argument("--concurrency", type=int, default=32)
    given = parser.parse_args()
    options = EngineOptions(
        dtype="auto",
        context=CONTEXT,
        rope=given.rope,
        cache_tokens=given.cache_tokens,
        max_sequences=given.concurrency,
        max_batch_tokens=given.chunk,
        max_draft=0,
        overlap="off",
        prefix_cache=False,
    )
    quant = Checkpoint.open(given.model).quant
    words = None if quant is None else f"{quant.bits}-bit, group {quant.group_size}"
    engine, _ = load_engine(given.model, options)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with Reader(engine, given.name, "auto", words) as reader:
        plan = plan_of(given.task, given.longchat, given.cases, short=given.short)
        run(reader, plan, given.out, concurrency=given.concurrency)


if __name__ == "__main__":
    main()
