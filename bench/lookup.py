"""Answers about a document, with and without prompt lookup: tokens a second, and what is guessed.

    python bench/lookup.py MODEL --out bench/results/lookup.jsonl
    python bench/lookup.py MODEL --max-draft 8 --costs falcon-40b.json    # and: on that machine

MODEL answers questions about a document that holds the answers: its prompt is a stretch of a page
of questions and answers and, at the end, one of its questions once more with the first words of its
answer, without a chat's frame. What follows is mostly the rest of that passage, word for word, as
even a small model goes on. Each is answered greedily with drafts and without, by turns, in one
engine; the answers must be equal. "All" is the sum over all questions, "quoting" over those whose
answers are mostly quotations (half of their tokens go on a passage of the prompt).

With --costs, the steps that were taken here are priced by what checking drafts costs elsewhere: a
`longwing bench --only decode,drafts --json` of another model. Random weights cannot quote, so that
this is what their speed on such answers is computed from, and it is no measurement.
"""

import argparse
import json
import lzma
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from longwing.cli.ask import LONG_EXAMPLE
from longwing.engine.bench import quoted_share
from longwing.engine.engine import Engine
from longwing.engine.events import Step
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams
from longwing.engine.warmup import warm_up

BEFORE, AFTER = 600, 1400
"""Characters of the document before and after the question, which a prompt holds."""

FIRST_WORDS = 8
"""Words of the answer that the prompt gives."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One greedy answer.

    Attributes:
        ids: its tokens.
        seconds: from its first token to its last.
        steps: for each step after the first token, (drafts checked, tokens gained).
    """

    ids: list[int]
    seconds: float
    steps: list[tuple[int, int]]


def prompts(text: str, num: int) -> list[tuple[str, str]]:
    """(question, prompt) evenly over the document."""
    at, found, lines = 0, [], text.splitlines(keepends=True)
    for line, following in pairwise(lines):
        words = line.strip()
        if words.endswith("?") and len(words) < 120 and len(following.split()) > 40:
            begun = " ".join(following.split()[:FIRST_WORDS])
            stretch = text[max(at - BEFORE, 0) : at + AFTER]
            found.append((words, f"{stretch}\n\n{words}\n{begun}"))
        at += len(line)
    return found[:: max(len(found) // num, 1)][:num]


def answer(
    engine: Engine,
    prompt_ids: list[int],
    max_new: int,
    max_draft: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """Answer greedily with drafts of at most so many tokens."""
    engine.options = replace(engine.options, max_draft=max_draft)
    engine.forget()
    request = Request(prompt_ids=tuple(prompt_ids), params=SamplingParams(max_new_tokens=max_new))
    engine.add("0", request)
    ids: list[int] = []
    ends: list[float] = []
    steps = []
    while engine.busy:
        drafted = engine.stats.num_drafted
        gained = [event.id for _, event in engine.step() if isinstance(event, Step)]
        if ids and gained:
            steps.append((engine.stats.num_drafted - drafted, len(gained)))
        if gained:
            ends.append(clock())
        ids += gained
    return Answer(ids=ids, seconds=ends[-1] - ends[0], steps=steps)


def costs_of(file: Path) -> dict[int, float]:
    """Drafts -> ms of a step, from `longwing bench --json`: the first batch and context."""
    lines = json.loads(file.read_text())["measured"]
    steps = [line for line in lines if line["what"] in ("decode", "check drafts")]
    first = steps[0]
    return {
        line["drafts"]: line["ms"]
        for line in steps
        if (line["batch"], line["context"]) == (first["batch"], first["context"])
    }


def cost(costs: dict[int, float], drafts: int) -> float:
    """Ms of a step with so many drafts, on a straight line between those measured."""
    if drafts in costs:
        return costs[drafts]
    for low, high in pairwise(sorted(costs)):
        if low < drafts < high:
            part = (drafts - low) / (high - low)
            return costs[low] + part * (costs[high] - costs[low])
    raise SystemExit(f"--costs has no step with {drafts} drafts; measure one with --drafts")


def projected(answers: list[Answer], costs: dict[int, float]) -> float:
    """How many times faster than a token a step those answers come at these costs."""
    plain = sum((len(one.ids) - 1) * costs[0] for one in answers)
    return plain / sum(cost(costs, drafts) for one in answers for drafts, _ in one.steps)


def main() -> None:
    """Ask, compare, sum up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new", type=int, default=96, help="tokens an answer has at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-draft", type=int, help="without it: the device's default")
    parser.add_argument("--costs", type=Path, action="append", default=[])
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, on a CPU that does other work too; with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    text = lzma.decompress(LONG_EXAMPLE.read_bytes()).decode()
    options = EngineOptions(
        device=args.device,
        dtype=args.dtype,
        context=2048,
        max_sequences=1,
        max_draft=args.max_draft,
        prefix_cache=False,
    )
    engine, info = load_engine(args.model, options)
    warm_up(engine)
    max_draft = engine.options.max_draft or 0
    lines = []
    ahead: list[Answer] = []
    quoting: list[bool] = []
    for question, prompt in prompts(text, args.questions):
        ids = engine.tokenizer.encode(prompt)
        gains, pair = [], []
        for _ in range(args.rounds):
            pair = [answer(engine, ids, args.new, drafts, clock) for drafts in (0, max_draft)]
            gains.append(pair[0].seconds / pair[1].seconds)
        plain, fast = pair
        quoted = quoted_share(ids, fast.ids)
        ahead.append(fast)
        quoting.append(quoted >= 0.5)
        drafted = sum(drafts for drafts, _ in fast.steps)
        line = {
            "question": question,
            "prompt_tokens": len(ids),
            "tokens": len(fast.ids),
            "quoted": round(quoted, 2),
            "drafted": drafted,
            "accepted": sum(gained - 1 for _, gained in fast.steps),
            "plain_tokens_per_s": round((len(plain.ids) - 1) / plain.seconds, 1),
            "gain": round(statistics.median(gains), 2),
            "tokens_per_step": round((len(fast.ids) - 1) / len(fast.steps), 2),
            "same": plain.ids == fast.ids,
            "steps": fast.steps,
        }
        lines.append(line)
        print(json.dumps({key: value for key, value in line.items() if key != "steps"}), flush=True)
    facts: dict[str, object] = {
        "model": args.model.name,
        "device": info.device_name or info.device,
        "max_draft": max_draft,
        "answers": len(lines),
        "of_them_quoting": sum(quoting),
    }
    for word, chosen in (("all", [True] * len(lines)), ("quoting", quoting)):
        some = [one for one, wanted in zip(ahead, chosen, strict=True) if wanted]
        gains = [line["gain"] for line, wanted in zip(lines, chosen, strict=True) if wanted]
        if not some:
            continue
        facts[f"gain_{word}"] = round(statistics.median(gains), 2)
        facts[f"tokens_per_step_{word}"] = round(
            sum(len(one.ids) - 1 for one in some) / sum(len(one.steps) for one in some), 2
        )
        for file in args.costs:
            gain = projected(some, costs_of(file))
            facts[f"computed_gain_{word}_{file.stem}"] = round(gain, 2)
    print(json.dumps(facts), flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in (*lines, facts)))


if __name__ == "__main__":
    main()
