"""From the records of a run to rows: accuracy with its interval, loss with its perplexity.

Everything is computed from the journal alone, so a table can be made again years later.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from longwing.evals.perplexity import NUM_STRETCHES

K = TypeVar("K")

CHANCE: Mapping[str, float] = {"quality": 0.25}
"""Accuracy of a model that has read nothing, where answers are chosen; open answers: 0."""

ORDER = ("topics", "lines", "passkey", "facts", "quality", "perplexity")
"""In which tasks are told; others follow."""

_Z = 1.959964  # of 95 %

NUM_BANDS = 5
_MOST_DEPTHS = 11
"""Depths that differ in more values than this are put into bands."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell's result.

    Attributes:
        task: the task.
        subset: "hard" for QuALITY's hard questions, else "".
        source, size, unit: as in `Cell`.
        length: tokens: of prompt and answer as asked for, else the mean of the prompts', floored;
            None if nothing was asked.
        num_cases: cases that were asked.
        num_too_long: cases that the context was too short for.
        accuracy: part of them that was right; None for a loss, or if nothing was asked.
        low, high: Wilson's 95 % interval of it.
        chance: accuracy of a model that has read nothing.
        score: mean score, where a case can be right in part.
        tokens: tokens foretold.
        loss: nats per token.
        last_loss: the same over the last tokens of each window.
        stretches: loss in each of 32 stretches of positions; None where nothing was counted.
        seconds: time of all cases.
    """

    task: str
    subset: str = ""
    source: str
    size: int
    unit: str
    length: int | None
    num_cases: int
    num_too_long: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float = 0.0
    score: float | None = None
    tokens: int = 0
    loss: float | None = None
    last_loss: float | None = None
    stretches: tuple[float | None, ...] = ()
    seconds: float = 0.0

    @property
    def perplexity(self) -> float | None:
        """exp(loss)."""
        return None if self.loss is None else exp(self.loss)

    @property
    def last_perplexity(self) -> float | None:
        """exp(last_loss)."""
        return None if self.last_loss is None else exp(self.last_loss)

    @property
    def column(self) -> tuple[str, int]:
        """What stands at the head of its column: unit and size."""
        return self.unit, self.size

    def to_json(self) -> dict[str, object]:
        """What --json prints of it."""
        facts: dict[str, object] = {
            "task": self.task + (f"-{self.subset}" if self.subset else ""),
            "source": self.source,
            "length": self.length,
            "cases": self.num_cases,
            "too_long": self.num_too_long,
        }
        if self.unit not in ("", "tokens"):
            facts[self.unit] = self.size
        if self.task == "perplexity":
            return facts | {
                "perplexity": _rounded(self.perplexity),
                "tokens": self.tokens,
                "loss": _rounded(self.loss),
                "last_perplexity": _rounded(self.last_perplexity),
            }
        facts |= {
            "accuracy": _rounded(self.accuracy),
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "chance": self.chance,
        }
        return facts if self.score is None else facts | {"score": _rounded(self.score)}


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One field of a length × depth grid.

    Attributes:
        column: unit and size.
        depth: middle of the band, 0 to 1.
        num_cases: cases asked.
        score: their mean score; None if none was asked, because the context is too short.
    """

    column: tuple[str, int]
    depth: float
    num_cases: int
    score: float | None


def rows(records: Iterable[Mapping[str, object]]) -> list[Row]:
    """A row for each cell, by task and then by size; QuALITY has two."""
    made = []
    groups = _grouped(records, _cell)
    order = list(dict.fromkeys((*ORDER, *(key[0] for key in groups))))
    for key in sorted(groups, key=lambda key: (order.index(key[0]), *key[1:])):
        (task, source, unit, size), found = key, groups[key]
        place = {"task": task, "source": source, "size": size, "unit": unit}
        if task == "perplexity":
            made.append(_loss_row(place, found))
            continue
        made.append(_accuracy_row(place, found))
        hard = [record for record in found if record.get("hard")]
        if hard:
            made.append(_accuracy_row({**place, "subset": "hard"}, hard))
    return made


def grid(records: Iterable[Mapping[str, object]], task: str) -> list[Spot]:
    """One task's length × depth grid; empty where depth does not vary."""
    found = [record for record in records if record["task"] == task]
    cases = [record for record in found if record.get("depth") is not None]
    depths = sorted({float(record["depth"]) for record in cases})  # type: ignore[arg-type]
    if len(depths) < 2:
        return []
    banded = len(depths) > _MOST_DEPTHS

    def band(record: Mapping[str, object]) -> float:
        depth = float(record["depth"])  # type: ignore[arg-type]
        return (min(NUM_BANDS - 1, int(depth * NUM_BANDS)) + 0.5) / NUM_BANDS if banded else depth

    spots = []
    for (column, depth), group in _grouped(cases, lambda r: (_column(r), band(r))).items():
        scores = _numbers(group, "score")
        mean = sum(scores) / len(scores) if scores else None
        spots.append(Spot(column=column, depth=depth, num_cases=len(scores), score=mean))
    rowset = sorted({spot.depth for spot in spots})
    for record in found:
        if record["kind"] == "cell":
            spots += [
                Spot(column=_column(record), depth=depth, num_cases=0, score=None)
                for depth in rowset
            ]
    return spots


def wilson(right: int, cases: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927); stays within 0 and 1.

    Unlike the mean ± 2 sigma it is of use at 0 and at 100 %: 20 of 20 gives 0.839 to 1.
    """
    if cases < 1:
        return 0.0, 1.0
    p, z2 = right / cases, _Z * _Z
    middle = (p + z2 / (2 * cases)) / (1 + z2 / cases)
    half = _Z / (1 + z2 / cases) * math.sqrt(p * (1 - p) / cases + z2 / (4 * cases**2))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == cases else min(1.0, middle + half)
    return low, high


def exp(loss: float) -> float:
    """Exp that is infinite where it would overflow; a broken model's loss may be anything."""
    return math.exp(loss) if loss < 700 else math.inf


def _accuracy_row(place: Mapping[str, object], found: Sequence[Mapping[str, object]]) -> Row:
    asked = [record for record in found if record.get("correct") is not None]
    right = sum(record["correct"] is True for record in asked)
    scores = _numbers(asked, "score")
    partial = any(0 < score < 1 for score in scores)
    low, high = wilson(right, len(asked))
    return Row(
        **_common(place, found, asked),
        accuracy=right / len(asked) if asked else None,
        low=low if asked else None,
        high=high if asked else None,
        chance=CHANCE.get(str(place["task"]), 0.0),
        score=sum(scores) / len(scores) if partial else None,
    )


def _loss_row(place: Mapping[str, object], found: Sequence[Mapping[str, object]]) -> Row:
    asked = [record for record in found if "nll" in record]
    tokens = int(sum(_numbers(asked, "tokens")))
    last = sum(_numbers(asked, "last_tokens"))
    return Row(
        **_common(place, found, asked),
        tokens=tokens,
        loss=math.fsum(_numbers(asked, "nll")) / tokens if tokens else None,
        last_loss=math.fsum(_numbers(asked, "last_nll")) / last if last else None,
        stretches=_stretches(asked),
    )


def _common(
    place: Mapping[str, object],
    found: Sequence[Mapping[str, object]],
    asked: Sequence[Mapping[str, object]],
) -> dict[str, Any]:
    """What rows of both kinds have."""
    lengths = _numbers(asked, "prompt_tokens")
    mean = int(sum(lengths) / len(lengths)) if lengths else None
    return {
        **place,
        "length": place["size"] if place["unit"] == "tokens" else mean,
        "num_cases": len(asked),
        "num_too_long": int(
            sum(_numbers(found, "cases")) + sum("needs" in r and "index" in r for r in found)
        ),
        "seconds": sum(_numbers(asked, "seconds")),
    }


def _stretches(asked: Sequence[Mapping[str, object]]) -> tuple[float | None, ...]:
    sums = [[0.0, 0.0] for _ in range(NUM_STRETCHES)]
    for record in asked:
        stretches = record.get("stretches")
        if isinstance(stretches, list) and len(stretches) == NUM_STRETCHES:
            for total, (loss, count) in zip(sums, stretches, strict=True):
                total[0] += loss
                total[1] += count
    return tuple(loss / count if count else None for loss, count in sums)


def _grouped(
    records: Iterable[Mapping[str, object]], key: Callable[[Mapping[str, object]], K]
) -> dict[K, list[Mapping[str, object]]]:
    groups: dict[K, list[Mapping[str, object]]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _cell(record: Mapping[str, object]) -> tuple[str, str, str, int]:
    return str(record["task"]), str(record["source"]), *_column(record)


def _column(record: Mapping[str, object]) -> tuple[str, int]:
    return str(record["unit"]), int(str(record["size"]))


def _numbers(records: Iterable[Mapping[str, object]], name: str) -> list[float]:
    values = (record.get(name) for record in records)
    return [value for value in values if isinstance(value, int | float)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
