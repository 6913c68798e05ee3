"""`Records`: the folder of the page's evaluations, and `Asked`: what one of them is to do.

A run has two files of one name: `ID.jsonl`, which `longwing eval --out` writes a line a case, and
`ID.json`, what was asked for, so that a run that was stopped can go on. Records that the command
line put into the folder are listed like the others.

Ids are made here, and only names that are in the folder are looked up. Everything blocks: ask from
a thread where files may be many.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longwing.errors import EvalError
from longwing.evals.journal import Run, read_run
from longwing.evals.retrieval import KINDS
from longwing.evals.run import Plan
from longwing.plan import parse_context
from longwing.web.bodies import RunBody

TASKS = tuple(KINDS)
"""What can be run from the page: tasks that need no data."""
MAX_LISTED = 200

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run was asked to do, as the command line takes it.

    Attributes:
        tasks, lengths, depths, cases, seed: as in evals' Plan.
        template, concurrency, name: as `longwing eval` has them.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cases: int | None
    seed: int
    template: str
    concurrency: int
    name: str

    @classmethod
    def from_body(cls, body: RunBody) -> "Asked":
        """From the page's wishes.

        Raises:
            EvalError, RequestError: no run can be like that.
        """
        other = [task for task in body.tasks if task not in TASKS]
        if other:
            raise EvalError(f"{', '.join(other)}: not among {', '.join(TASKS)}")
        lengths = [parse_context(n) if isinstance(n, str) else n for n in body.lengths]
        asked = cls(
            tasks=tuple(dict.fromkeys(body.tasks)),
            lengths=tuple(sorted(set(lengths))),
            depths=tuple(sorted(set(body.depths))),
            cases=body.cases,
            seed=body.seed,
            template=body.template,
            concurrency=body.concurrency,
            name=body.name.strip(),
        )
        plan = ("tasks", "lengths", "depths", "cases", "seed")
        Plan(**{name: getattr(asked, name) for name in plan})  # refuses what no run can have
        return asked

    def arguments(self, url: str, out: Path) -> list[str]:
        """The command line."""
        words = {
            "url": url,
            "tasks": ",".join(self.tasks),
            "lengths": ",".join(map(str, self.lengths)),
            "depths": ",".join(f"{depth:g}" for depth in self.depths),
            "cases": "" if self.cases is None else str(self.cases),
            "seed": str(self.seed),
            "template": self.template,
            "concurrency": str(self.concurrency),
            "name": self.name,
            "out": str(out),
        }
        return ["eval", *(f"--{name}={word}" for name, word in words.items() if word)]


class Records:
    """The runs of one folder, which is made at need."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, tuple[tuple[int, int], Run]] = {}

    def file(self, run_id: str) -> Path:
        """Where a run's record is, or will be."""
        return self._folder / f"{run_id}.jsonl"

    def ids(self) -> list[str]:
        """Every run of the folder, the newest first."""
        newest: dict[str, float] = {}
        try:
            for entry in os.scandir(self._folder):
                stem, suffix = os.path.splitext(entry.name)
                if suffix in (".jsonl", ".json") and _ID.fullmatch(stem) and entry.is_file():
                    newest[stem] = max(newest.get(stem, 0.0), entry.stat().st_mtime)
        except OSError:
            return []
        return sorted(newest, key=lambda stem: -newest[stem])[:MAX_LISTED]

    def require(self, run_ids: Iterable[str]) -> None:
        """Look up some runs.

        Raises:
            KeyError: one is not there.
        """
        known = set(self.ids())
        for run_id in run_ids:
            if run_id not in known:
                raise KeyError(run_id)

    def begin(self, asked: Asked) -> str:
        """A new run's id; what it is to do is on record.

        Raises:
            EvalError: the folder cannot be written.
        """
        stem = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{'-'.join(asked.tasks)}"
        taken, run_id, number = set(self.ids()), stem, 2
        while run_id in taken:
            run_id, number = f"{stem}-{number}", number + 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{run_id}.json").write_text(json.dumps(asdict(asked)))
        except OSError as fault:
            raise EvalError(f"{self._folder} cannot be written: {fault.strerror}") from fault
        return run_id

    def remove(self, run_id: str) -> None:
        """Forget a run."""
        for suffix in (".jsonl", ".json"):
            (self._folder / f"{run_id}{suffix}").unlink(missing_ok=True)

    def asked(self, run_id: str) -> Asked | None:
        """What a run was asked to do; None if it was not started from the page."""
        try:
            raw: dict[str, Any] = json.loads((self._folder / f"{run_id}.json").read_text())
            tuples = {name: tuple(raw[name]) for name in ("tasks", "lengths", "depths")}
            return Asked(**{**raw, **tuples})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def read(self, run_id: str) -> Run | None:
        """A run's record so far, read again when it has grown; None if nothing is on it.

        Raises:
            EvalError: it holds something else.
        """
        file = self.file(run_id)
        try:
            stat = file.stat()
        except OSError:
            return None
        trace = (stat.st_size, stat.st_mtime_ns)
        if stat.st_size and (run_id not in self._read or self._read[run_id][0] != trace):
            try:
                self._read[run_id] = trace, read_run(file)
            except EvalError as fault:
                # Where the folder lies is not for the page.
                raise EvalError(str(fault).replace(str(file), file.name)) from None
        return self._read[run_id][1] if stat.st_size else None

    def read_all(self, run_ids: Sequence[str]) -> list[Run]:
        """The records of some runs.

        Raises:
            KeyError: there is no such run.
            EvalError: one cannot be read, or holds nothing yet.
        """
        self.require(run_ids)
        found = {run_id: self.read(run_id) for run_id in run_ids}
        for run_id, run in found.items():
            if run is None:
                raise EvalError(f"{run_id} has no finished case yet")
        return [run for run in found.values() if run is not None]
