"""`Journal`: the record of a run, a JSON object a line, so that nothing finished is ever lost.

The first line says what is run: the model, the plan, the versions. Every further one is a case, or
a cell that the model's context is too short for. A line is on disk before the next case begins; a
run that was killed is continued by opening its journal again, and a last line that was cut short is
dropped then. One run at a time may have it open.

A journal can also be kept in memory, for a run that nobody wants to keep.

The reading of JSON lines and texts is here as well: data files of the tasks take the same road.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from longwing.errors import EvalError

Record = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a journal holds.

    Attributes:
        header: the first line: model, plan, versions.
        records: cases and cells, in the order they were finished.
    """

    header: Mapping[str, object]
    records: Sequence[Mapping[str, object]]


class Journal:
    """A run's record while it grows; make it with `opened`. For one thread.

    Attributes:
        header: the first line.
        records: every further one.
    """

    def __init__(self, run: Run, stream: IO[bytes] | None) -> None:
        self.header = run.header
        self.records: list[Mapping[str, object]] = list(run.records)
        self._stream = stream

    @classmethod
    @contextmanager
    def opened(
        cls, file: Path | None, header: Mapping[str, object], *, restart: bool = False
    ) -> Iterator["Journal"]:
        """The journal of a run, begun or continued.

        Args:
            file: where; None keeps it in memory.
            header: what is run; a journal begun otherwise is not continued.
            restart: forget what is there.

        Raises:
            EvalError: it is of another run or being written by one, or cannot be read or written.
        """
        if file is None:
            yield cls(Run(header=header, records=()), None)
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("ab+")
        except OSError as fault:
            raise EvalError(
                f"{file} cannot be written: {fault.strerror}; choose another file"
            ) from fault
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EvalError(f"{file} is being written by another run; wait for it") from None
            if restart:
                stream.truncate(0)
            run = _continued(file, stream, header)
            if run is None:
                journal = cls(Run(header=header, records=()), stream)
                journal._write(header)
            else:
                journal = cls(run, stream)
            yield journal

    def add(self, record: Record) -> None:
        """Put a finished case on record; it is on disk when this returns."""
        self._write(record)
        self.records.append(record)

    def _write(self, record: Mapping[str, object]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())


def read_run(file: Path) -> Run:
    """A run's record, finished or not; a last line that was cut short is passed over.

    Raises:
        EvalError: it is missing, or holds something else; names file and line.
    """
    return _parsed(file, list(text_lines(file, whole=True)))


def text_lines(file: Path, *, whole: bool = False) -> Iterator[str]:
    """The lines of a UTF-8 file; with `whole`, without a last one that has no line end.

    Raises:
        EvalError: it is missing, unreadable, or not UTF-8 in a line, which is named.
    """
    number = 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                number += 1
                if whole and not line.endswith(b"\n"):
                    return
                yield line.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise EvalError(
            f"{file}, line {number}: not UTF-8 from its byte {fault.start + 1} on; convert the file"
        ) from fault
    except OSError as fault:
        raise EvalError(f"{file} cannot be read: {fault.strerror}; check the path") from fault


def read_text(file: Path) -> str:
    """A whole text, with line ends as they are written here."""
    return "".join(text_lines(file)).replace("\r\n", "\n").removeprefix("\ufeff")


def parse_line(line: str, file: Path, number: int) -> Record:
    """The JSON object on a line.

    Raises:
        EvalError: there is none; names file and line.
    """
    try:
        record = json.loads(line.strip())
    except (ValueError, RecursionError) as fault:
        why = str(fault)
        if isinstance(fault, json.JSONDecodeError):
            why = f"{fault.msg}, column {fault.colno}"
        raise EvalError(
            f"{file}, line {number}: not valid JSON: {why}; mend or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise EvalError(f"{file}, line {number}: holds no JSON object; mend or remove the line")
    return record


def _continued(file: Path, stream: IO[bytes], header: Mapping[str, object]) -> Run | None:
    """What is on record so far, of the same run; None if nothing is."""
    lines = list(text_lines(file, whole=True))
    if not lines:
        stream.truncate(0)
        return None
    run = _parsed(file, lines)
    wanted = json.loads(json.dumps(header))
    changed = [
        name
        for name in sorted({*run.header, *wanted})
        if name != "begun" and run.header.get(name) != wanted.get(name)
    ]
    if changed:
        differing = "; ".join(
            f"{name} {_difference(run.header.get(name), wanted.get(name))}" for name in changed
        )
        raise EvalError(
            f"{file} is of another run: {differing}. Choose another file, or give --restart to "
            "begin this one anew"
        )
    stream.truncate(sum(len(line.encode()) for line in lines))
    return run


def _parsed(file: Path, lines: Sequence[str]) -> Run:
    records = [parse_line(line, file, number) for number, line in enumerate(lines, start=1)]
    for number, record in enumerate(records, start=1):
        if not (_is_header(record) if number == 1 else _is_result(record)):
            raise EvalError(
                f"{file}, line {number}: not the record of a `longwing eval` run; give a file "
                "that --out wrote"
            )
    if not records:
        raise EvalError(f"{file} is empty; give a file that `longwing eval --out` wrote")
    return Run(header=records[0], records=records[1:])


def _is_header(record: Mapping[str, object]) -> bool:
    return record.get("kind") == "run" and isinstance(record.get("model"), dict)


def _is_result(record: Mapping[str, object]) -> bool:
    """Whether a record has what every reader of it relies on."""
    texts = all(isinstance(record.get(name), str) for name in ("task", "source", "unit"))
    whole = type(record.get("size")) is int
    depth = record.get("depth")
    placed = depth is None or isinstance(depth, int | float)
    if record.get("kind") == "cell":
        return texts and whole
    return record.get("kind") == "case" and texts and whole and placed and "sha256" in record


def _difference(before: object, now: object) -> str:
    """What changed between two values; inside of objects only what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
        return ", ".join(f"{n} {_difference(before.get(n), now.get(n))}" for n in names)
    return f"{json.dumps(before)}, now {json.dumps(now)}"
