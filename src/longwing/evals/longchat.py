"""LongChat's own cases of topic and line retrieval, read from the files it publishes.

A folder as LongChat lays it: `topics/testcases/5_topics.jsonl`, `lines/testcases/200_lines.jsonl`
and so on; the number is the column. Each line is one case:

    topics: {"test_id", "prompt", "topics": [first, …], "prompt_length"}
    lines:  {"random_idx": [label, place], "expected_number", "num_lines", "prompt", …}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longwing.errors import EvalError
from longwing.evals.journal import parse_line, text_lines

PUBLISHED_COLUMNS: Mapping[str, tuple[int, ...]] = {
    "topics": (5, 10, 15, 20, 25),
    "lines": (200, 300, 400, 500, 600, 680),
}
"""The columns of the published tables: numbers of topics and of lines."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case.

    Attributes:
        prompt: the user's whole turn.
        expected: the topic, or the number in digits.
        depth: where in the record the answer stands, 0 to 1.
    """

    prompt: str
    expected: str
    depth: float


def read_cases(folder: Path, task: str, columns: Sequence[int] = ()) -> dict[int, tuple[Case, ...]]:
    """The cases of one task by column; every one of a column's file.

    Args:
        folder: LongChat's folder.
        task: "topics" or "lines".
        columns: which; those that have no file for this task are left out. None given: the
            published ones that are there, or else all.

    Raises:
        EvalError: no file at all, or one that does not hold such cases; names file and line.
    """
    there = _columns(folder, task)
    if not there:
        raise EvalError(
            f"{folder / task / 'testcases'} holds no file like 5_{task}.jsonl; give the folder in "
            "which LongChat's topics/ and lines/ lie"
        )
    published = tuple(column for column in PUBLISHED_COLUMNS[task] if column in there)
    wanted = columns or published or tuple(there)
    return {column: _read(there[column], task) for column in sorted(set(wanted)) if column in there}


def known_columns(folder: Path) -> dict[str, list[int]]:
    """The columns each task has files for."""
    return {task: list(_columns(folder, task)) for task in PUBLISHED_COLUMNS}


def _columns(folder: Path, task: str) -> dict[int, Path]:
    found = {}
    for file in folder.glob(f"{task}/testcases/*_{task}.jsonl"):
        name = re.fullmatch(rf"([1-9][0-9]{{0,6}})_{task}", file.stem)
        if name:
            found[int(name[1])] = file
    return dict(sorted(found.items()))


def _read(file: Path, task: str) -> tuple[Case, ...]:
    cases = []
    for number, line in enumerate(text_lines(file), start=1):
        if line.strip():
            record = parse_line(line, file, number)
            try:
                cases.append(_READERS[task](record))
            except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as fault:
                raise EvalError(
                    f"{file}, line {number}: not a case of LongChat's {task} "
                    f"({type(fault).__name__}: {fault}); take the file as LongChat publishes it"
                ) from None
    if not cases:
        raise EvalError(f"{file} is empty; take the file as LongChat publishes it")
    return tuple(cases)


def _topic(record: Mapping[str, object]) -> Case:
    prompt, names = record["prompt"], record["topics"]
    if not isinstance(prompt, str) or not isinstance(names, list) or not isinstance(names[0], str):
        raise TypeError("prompt must be text and topics a list of names")
    return Case(prompt=prompt, expected=names[0], depth=0.0)


def _line(record: Mapping[str, object]) -> Case:
    prompt, number = record["prompt"], record["expected_number"]
    place, num_lines = record["random_idx"], record["num_lines"]
    if not isinstance(prompt, str) or type(number) is not int or type(num_lines) is not int:
        raise TypeError("prompt must be text, expected_number and num_lines whole numbers")
    if not isinstance(place, list) or type(place[1]) is not int:
        raise TypeError("random_idx must be a label and a place")
    return Case(prompt=prompt, expected=str(number), depth=place[1] / max(1, num_lines - 1))


_READERS = {"topics": _topic, "lines": _line}
