"""`Runs`: evaluations of the running model, started and watched from the page.

A run is `longwing eval --url` against this very server, as a child process: the command that a
person would type, asking over HTTP what anybody may ask. One runs at a time. Its record grows a
line a case, and is read as it grows (`records.py`).
"""

import asyncio
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwing.errors import EvalError, LongwingError
from longwing.evals.journal import Run
from longwing.evals.report import make_report
from longwing.evals.run import DEFAULT_CASES
from longwing.evals.table import rows
from longwing.web.child import Child
from longwing.web.records import Asked, Records


class RunningError(LongwingError):
    """A run is under way, or this one is not."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The run under way."""

    id: str
    child: Child


class Runs:
    """The evaluations of one folder, of which one may be under way.

    Args:
        records: the folder.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self._errors: dict[str, str] = {}
        self._job: _Job | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> str | None:
        """The id of the run under way."""
        return self._job.id if self._job else None

    def begin(self, asked: Asked, url: str, api_key: str | None) -> str:
        """Start a run; its id is the answer.

        Args:
            asked: what to do.
            url: where this server listens.
            api_key: one that it takes, if it has any.

        Raises:
            RunningError: another is under way.
            EvalError: the folder cannot be written.
        """
        self._require_idle()
        run_id = self.records.begin(asked)
        self._start(run_id, asked, url, api_key)
        return run_id

    def resume(self, run_id: str, url: str, api_key: str | None) -> None:
        """Go on with a run that was stopped.

        Raises:
            KeyError: there is no such run.
            RunningError: another is under way.
            EvalError: it was not started from the page.
        """
        self.records.require([run_id])
        self._require_idle()
        asked = self.records.asked(run_id)
        if asked is None:
            raise EvalError("this run was not started here; go on with its own command")
        self._start(run_id, asked, url, api_key)

    async def cancel(self, run_id: str) -> None:
        """Stop a run; the cases that are finished stay.

        Raises:
            KeyError: there is no such run.
            RunningError: it is not under way.
        """
        self.records.require([run_id])
        if self._job is None or self._job.id != run_id or self._task is None:
            raise RunningError("this evaluation is not running")
        task = self._task
        await self._job.child.stop()
        await asyncio.wait([task])

    def delete(self, run_id: str) -> None:
        """Remove a run's record.

        Raises:
            KeyError: there is no such run.
            RunningError: it is under way.
        """
        self.records.require([run_id])
        if run_id == self.running:
            raise RunningError("this evaluation is running; stop it first")
        self.records.remove(run_id)
        self._errors.pop(run_id, None)

    async def close(self) -> None:
        """Stop what runs."""
        if self._job is not None:
            await self.cancel(self._job.id)

    def summaries(self) -> list[dict[str, object]]:
        """Every run, the newest first. Blocks."""
        return [self.summary(run_id) for run_id in self.records.ids()]

    def summary(self, run_id: str) -> dict[str, object]:
        """A run in a few facts. Never raises for what its file holds. Blocks."""
        run, error = self._read(run_id)
        return self._summary(run_id, run, error)

    def details(self, run_id: str, url: str) -> dict[str, object]:
        """A run with its table and its heat map. Blocks.

        Args:
            run_id: which.
            url: where this server listens, for the command that would go on with it.

        Raises:
            KeyError: there is no such run.
        """
        self.records.require([run_id])
        run, error = self._read(run_id)
        told = self._summary(run_id, run, error)
        asked = self.records.asked(run_id)
        found = run.records if run else ()
        words = asked.arguments(url, Path(f"{run_id}.jsonl")) if asked else []
        return {
            **told,
            "command": shlex.join(["longwing", *words]) if words else None,
            "can_resume": asked is not None and told["state"] in ("stopped", "failed"),
            "rows": [row.to_json() for row in rows(found)],
            **cells(found),
        }

    def report(self, run_ids: Sequence[str]) -> str:
        """The report of some runs, as one page. Blocks.

        Raises:
            KeyError: there is no such run.
            EvalError: its record cannot be read.
        """
        return make_report(self.records.read_all(list(dict.fromkeys(run_ids)))).html

    def _read(self, run_id: str) -> tuple[Run | None, str | None]:
        """A run's record, and why it failed."""
        try:
            return self.records.read(run_id), self._errors.get(run_id)
        except EvalError as fault:
            is_running = run_id == self.running  # it may be half of a first line
            return None, None if is_running else self._errors.get(run_id, str(fault))

    def _summary(self, run_id: str, run: Run | None, error: str | None) -> dict[str, object]:
        asked = self.records.asked(run_id)
        plan, model = _part(run, "plan"), _part(run, "model")
        tasks = list(asked.tasks) if asked else _listed(plan.get("tasks"), str)
        lengths = list(asked.lengths) if asked else _listed(plan.get("lengths"), int)
        depths = list(asked.depths) if asked else _listed(plan.get("depths"), float)
        done, num_asked, num_right = _counts(run)
        cases = (asked.cases if asked else None) or DEFAULT_CASES
        total = len(tasks) * len(lengths) * cases if asked else 0
        state = "stopped"
        if run_id == self.running:
            state = "running"
        elif error is not None:
            state = "failed"
        elif run is not None and done >= total:
            state = "done"
        return {
            "id": run_id,
            "name": str(model.get("name") or (asked.name if asked else "")),
            "tasks": tasks,
            "lengths": lengths or None,
            "depths": depths or None,
            "begun": run.header.get("begun") if run else None,
            "state": state,
            "cases_done": done,
            "cases_total": total or None,
            "accuracy": num_right / num_asked if num_asked else None,
            "error": error,
        }

    def _require_idle(self) -> None:
        if self._job is not None:
            raise RunningError(f"{self._job.id} is running; wait for it, or stop it")

    def _start(self, run_id: str, asked: Asked, url: str, api_key: str | None) -> None:
        self._errors.pop(run_id, None)
        arguments = asked.arguments(url, self.records.file(run_id))
        environ = {} if api_key is None else {"LONGWING_API_KEY": api_key}
        job = self._job = _Job(id=run_id, child=Child(arguments, environ=environ))
        self._task = asyncio.create_task(self._watch(job), name=f"eval {run_id}")

    async def _watch(self, job: _Job) -> None:
        """Until it ends; then keep why it failed, if it did."""
        if not await job.child.wait() and not job.child.was_stopped:
            folder = self.records.file(job.id).parent
            self._errors[job.id] = job.child.complaint.replace(f"{folder}/", "")
        self._job = None


def cells(records: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The heat map's fields, the lengths that nobody was asked, and the last case."""
    found: dict[tuple[str, str, int, float], list[Mapping[str, object]]] = {}
    too_long: dict[tuple[str, str, int], int] = {}
    latest: Mapping[str, object] | None = None
    for record in records:
        place = str(record["task"]), str(record["unit"]), int(str(record["size"]))
        depth = record.get("depth")
        if "needs" in record:
            too_long[place] = too_long.get(place, 0) + _num_cases(record)
        elif record.get("correct") is not None and isinstance(depth, int | float):
            found.setdefault((*place, float(depth)), []).append(record)
            latest = record
    shown = ("task", "size", "unit", "depth", "expected", "answer", "correct")
    return {
        "cells": [
            {
                **_named(task, unit, size),
                "depth": depth,
                "cases": len(group),
                "correct": sum(one["correct"] is True for one in group),
                "score": sum(_score(one) for one in group) / len(group),
            }
            for (task, unit, size, depth), group in sorted(found.items())
        ],
        "too_long": [{**_named(*place), "cases": num} for place, num in sorted(too_long.items())],
        "latest": None if latest is None else {name: latest.get(name) for name in shown},
    }


def _named(task: str, unit: str, size: int) -> dict[str, object]:
    return {"task": task, "unit": unit, "size": size}


def _score(record: Mapping[str, object]) -> float:
    score = record.get("score")
    return float(score) if isinstance(score, int | float) else float(record["correct"] is True)


def _num_cases(record: Mapping[str, object]) -> int:
    """How many cases a record stands for; that of a length which is too long stands for all."""
    num = record.get("cases", 1)
    return num if isinstance(num, int) else 1


def _counts(run: Run | None) -> tuple[int, int, int]:
    """How many cases are done, how many of these were asked, how many of these were right."""
    records = run.records if run else ()
    done = sum(_num_cases(record) if record["kind"] == "cell" else 1 for record in records)
    asked = [record["correct"] for record in records if record.get("correct") is not None]
    return done, len(asked), sum(right is True for right in asked)


def _part(run: Run | None, name: str) -> Mapping[str, Any]:
    part = run.header.get(name) if run else None
    return part if isinstance(part, dict) else {}


def _listed(values: object, kind: type) -> list[Any]:
    """What is of a kind in a list that a stranger may have written."""
    listed = values if isinstance(values, list) else ()
    return [value for value in listed if isinstance(value, (kind, int))]
