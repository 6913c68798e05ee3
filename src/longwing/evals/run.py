"""A run: every case of every cell of a plan, asked once, on record as soon as it is answered.

`Plan` says what is asked, `TASKS` how each task is made from it. A cell that is longer than the
model's context is put on record as such and not asked; nothing is ever cut to fit.

To add a task, write one that satisfies `Task` and add a line to TASKS.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

from longwing.errors import EvalError
from longwing.evals.journal import Journal, Record, Run
from longwing.evals.longchat import PUBLISHED_COLUMNS, known_columns, read_cases
from longwing.evals.perplexity import Perplexity
from longwing.evals.quality import Quality
from longwing.evals.retrieval import KINDS, Retrieval
from longwing.evals.task import Cell, Model, Result, Sample, Task

DEFAULT_CASES = 20
DEFAULT_WINDOW = 2048
SHORTEST = 1024
"""Without lengths, retrieval doubles from here to the model's context."""

Progress = Callable[[int, int], None]
"""Called with (done, in all) after each case, both in tokens to read, so that the share that is
done is that of the time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a model; with the model's tokenizer it settles every sample.

    Attributes:
        tasks: names from TASKS.
        lengths: tokens of a case, prompt and answer together; none: doubling from 1,024 to the
            model's context, and 2,048 for perplexity.
        characters: further cells of `passkey`, by their filler in characters, as published.
        depths: where the needle lies, 0 to 1; none: the task's own.
        cases: cases of a cell; None: 20 where they are generated, else all there are.
        seed: another one gives other cases.
        longchat: LongChat's folder, for `topics` and `lines`; None: they are generated.
        columns: which of LongChat's columns; none: the published ones.
        texts: what `perplexity` reads.
        quality: QuALITY's file.
        stride: tokens between the starts of `perplexity`'s windows; None: they do not overlap.
        tokens: how much of each text `perplexity` reads; None: all.

    Raises:
        EvalError: a value that no run can have.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    characters: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    cases: int | None = None
    seed: int = 0
    longchat: Path | None = None
    columns: tuple[int, ...] = ()
    texts: tuple[Path, ...] = ()
    quality: Path | None = None
    stride: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                known = ", ".join(TASKS)
                raise EvalError(f'task "{name}" is not one of {known}; name some of these')
        if not self.tasks:
            raise EvalError(f"no task is given; name some of {', '.join(TASKS)}")
        for length in (*self.lengths, *self.characters, *self.columns):
            if length < 1:
                raise EvalError(f"a length of {length} is too small; 1 is the least")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise EvalError(f"a depth is between 0 (start) and 1 (end), not {depth}")
        for name in ("cases", "tokens", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvalError(f"{name} is {value}; at least 1 is needed")
        if self.columns and self.longchat is None:
            raise EvalError("columns are LongChat's; give its folder too, with --data DIR")
        if self.characters and "passkey" not in self.tasks:
            raise EvalError("lengths in characters are for passkey; add it to the tasks")

    def to_json(self) -> dict[str, object]:
        """As the record keeps it. Of files only the names: they may lie elsewhere next time."""

        def plain(value: object) -> object:
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return value.name if isinstance(value, Path) else value

        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


def run(
    model: Model,
    plan: Plan,
    out: Path | None = None,
    *,
    concurrency: int = 1,
    restart: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Ask a model all that a plan says and that the record does not hold yet.

    Args:
        model: who is asked; with concurrency, from several threads.
        plan: what is asked.
        out: the record, JSON lines; continued if it is there. None: it is kept in memory alone.
        concurrency: questions at a time.
        restart: forget what `out` holds.
        progress: called after each case.

    Raises:
        EvalError: data or record cannot be used; nothing was asked then.
        LongwingError: what the model raises. Cases that were finished are on record.
    """
    tasks = [(name, TASKS[name](plan, model)) for name in dict.fromkeys(plan.tasks)]
    with Journal.opened(out, _header(model, plan), restart=restart) as journal:
        done = {_key(record): record for record in journal.records}
        every = [(task, cell) for _, task in tasks for cell in task.cells]
        cells = [(task, cell) for task, cell in every if _fits(cell, model, journal, done)]
        for task, cell in cells:
            next(task.samples(cell, model), None)  # refuses a size of which no case can be made
        meter = _Meter([cell for _, cell in cells], done, progress)
        jobs = _jobs(cells, model, journal, done, meter)
        with closing(_measured(jobs, model, concurrency)) as measured:
            for record, cell in measured:
                journal.add(record)
                meter.advance(cell)
        return Run(header=journal.header, records=tuple(journal.records))


def _fits(
    cell: Cell,
    model: Model,
    journal: Journal,
    done: Mapping[tuple[object, ...], Mapping[str, object]],
) -> bool:
    """Whether a cell is within the model's context; if not, that goes on record."""
    if cell.unit != "tokens" or cell.size <= model.context_len:
        return True
    place = _place(cell)
    if _key(place) not in done:
        journal.add({"kind": "cell", **place, "cases": cell.num_cases, "needs": cell.size})
    return False


@dataclass(frozen=True)
class _Job:
    task: Task
    cell: Cell
    sample: Sample


def _jobs(
    cells: Sequence[tuple[Task, Cell]],
    model: Model,
    journal: Journal,
    done: Mapping[tuple[object, ...], Mapping[str, object]],
    meter: "_Meter",
) -> Iterator[_Job]:
    """What is still to be asked. A case that does not fit the context goes on record at once."""
    for task, cell in cells:
        place = _place(cell)
        for sample in task.samples(cell, model):
            record = {"kind": "case", **place, **_asked(sample)}
            before = done.get(_key(record))
            if before is not None:
                _require_same(before, record)
                continue
            needs = task.length(sample, model)
            if needs > model.context_len:
                journal.add({**record, "needs": needs})
                meter.advance(cell)
                continue
            yield _Job(task, cell, sample)
        meter.skip(cell)  # fewer cases than were guessed, or under way


def _measured(
    jobs: Iterator[_Job], model: Model, concurrency: int
) -> Generator[tuple[Record, Cell], None, None]:
    """Ask; records as they are finished. If interrupted, what is being answered is waited for."""
    if concurrency == 1:
        for job in jobs:
            yield _record(job, job.task.measure(job.sample, model)), job.cell
        return
    waiting: dict[Future[Result], _Job] = {}
    with ThreadPoolExecutor(concurrency) as pool:
        fault: BaseException | None = None
        try:
            for job in jobs:
                waiting[pool.submit(job.task.measure, job.sample, model)] = job
                while len(waiting) >= concurrency:
                    yield from _finished(waiting)
        except (Exception, KeyboardInterrupt) as raised:
            fault = raised  # others are still answering; what they say is not to be lost
        while waiting:  # a second Ctrl-C ends this
            try:
                yield from _finished(waiting)
            except Exception as raised:
                fault = fault or raised
        if fault is not None:
            raise fault


def _finished(waiting: dict[Future[Result], _Job]) -> Iterator[tuple[Record, Cell]]:
    """Wait for one answer at least; takes from `waiting` whatever has ended, well or badly."""
    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in ended:
        job = waiting.pop(future)
        yield _record(job, future.result()), job.cell


class _Meter:
    """How much is done of what this call has to do, in tokens to read."""

    def __init__(
        self,
        cells: Sequence[Cell],
        done: Mapping[tuple[object, ...], object],
        progress: Progress | None,
    ) -> None:
        counts: dict[tuple[object, ...], int] = {}
        for key in done:
            counts[key[:-1]] = counts.get(key[:-1], 0) + 1
        self._left = {
            cell: max(0, cell.num_cases - counts.get(_key({**_place(cell)})[:-1], 0))
            for cell in cells
        }
        self._total = sum(cell.tokens * left for cell, left in self._left.items())
        self._done = 0
        self._progress = progress

    def advance(self, cell: Cell) -> None:
        """One case is finished."""
        if self._left.get(cell):
            self._left[cell] -= 1
            self._done += cell.tokens
        if self._progress is not None:
            self._progress(self._done, max(self._total, 1))

    def skip(self, cell: Cell) -> None:
        """Count no further case of a cell."""
        self._total -= cell.tokens * self._left.pop(cell, 0)


def _header(model: Model, plan: Plan) -> dict[str, object]:
    return {
        "kind": "run",
        "longwing": version("longwing"),
        "model": {
            "name": model.name,
            "context": model.context_len,
            **model.settings,
        },
        "plan": plan.to_json(),
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _place(cell: Cell) -> Record:
    return {"task": cell.task, "source": cell.source, "size": cell.size, "unit": cell.unit}


def _asked(sample: Sample) -> Record:
    record: Record = {
        "index": sample.index,
        "depth": None if sample.depth is None else round(sample.depth, 4),
        "sha256": sample.sha256,
        "expected": list(sample.expected),
    }
    return {**record, **sample.facts}


def _record(job: _Job, result: Result) -> Record:
    return {
        "kind": "case",
        **_place(job.cell),
        **_asked(job.sample),
        "answer": result.answer,
        "score": result.score,
        "correct": result.correct,
        "prompt_tokens": result.prompt_len,
        "new_tokens": result.num_tokens,
        "seconds": round(result.seconds, 4),
        **result.facts,
    }


def _key(record: Mapping[str, object]) -> tuple[object, ...]:
    """What tells one record of a run from another; the last part is the case's number."""
    return tuple(record.get(name) for name in ("task", "source", "size", "unit", "index"))


def _require_same(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    if before.get("sha256") != now["sha256"]:
        raise EvalError(
            f"case {now['index']} of {now['task']} at {now['size']} {now['unit']} was another one "
            "when this run was begun: data or tokenizer have changed; choose another file, or give "
            "--restart to begin anew"
        )


def _lengths(plan: Plan, model: Model) -> tuple[int, ...]:
    """The plan's lengths; where it has none and nothing else gives cells, what the model holds."""
    if plan.lengths:
        return tuple(sorted(set(plan.lengths)))
    doubling, length = [], SHORTEST
    while length <= model.context_len:
        doubling.append(length)
        length *= 2
    return tuple(doubling) or (model.context_len,)


def _retrieval(name: str) -> Callable[[Plan, Model], Task]:
    def make(plan: Plan, model: Model) -> Task:
        longchat = None
        if plan.longchat is not None and name in PUBLISHED_COLUMNS:
            _check_columns(plan.longchat, plan.columns)
            longchat = read_cases(plan.longchat, name, plan.columns)
        only_characters = name == "passkey" and plan.characters and not plan.lengths
        return Retrieval(
            name,
            lengths=() if only_characters else _lengths(plan, model),
            characters=plan.characters,
            num_cases=plan.cases or (10**9 if longchat else DEFAULT_CASES),
            depths=plan.depths,
            seed=plan.seed,
            longchat=longchat,
        )

    return make


def _check_columns(folder: Path, columns: Sequence[int]) -> None:
    known = known_columns(folder)
    for column in columns:
        if not any(column in there for there in known.values()):
            there = "; ".join(f"{task} has {', '.join(map(str, c))}" for task, c in known.items())
            raise EvalError(f"{folder} has no file for column {column}: {there}")


def _quality(plan: Plan, model: Model) -> Task:
    if plan.quality is None:
        raise EvalError("quality needs QuALITY's questions; give its file with --data FILE.jsonl")
    return Quality(plan.quality, num_cases=plan.cases, seed=plan.seed)


def _perplexity(plan: Plan, model: Model) -> Task:
    if not plan.texts:
        raise EvalError("perplexity needs a text; give one with --data FILE.txt")
    return Perplexity(
        plan.texts,
        lengths=plan.lengths or (min(DEFAULT_WINDOW, model.context_len),),
        num_cases=plan.cases,
        stride=plan.stride,
        max_tokens=plan.tokens,
    )


TASKS: dict[str, Callable[[Plan, Model], Task]] = {
    **{name: _retrieval(name) for name in KINDS},
    "quality": _quality,
    "perplexity": _perplexity,
}
"""Every task by name: from a plan and a model to the task; data is read and refused there."""
