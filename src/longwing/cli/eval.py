"""`longwing eval`: ask a model what it can find, choose and foretell at length."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from longwing import tiny
from longwing.cli.console import (
    AsJson,
    note,
    print_error,
    print_json,
    print_rows,
    progress,
    warn,
)
from longwing.cli.eval_engine import BatchedModel, open_model
from longwing.cli.eval_served import ServedModel
from longwing.cli.generate import TemplateOption
from longwing.cli.options import (
    DEFAULT_MODEL,
    LoadOptions,
    ModelArgument,
    filled_by,
    find_model,
    length,
)
from longwing.cli.spread import cluster_variables, spread_model
from longwing.cluster.options import SpreadOptions
from longwing.cluster.pool import EnginePool
from longwing.errors import EvalError
from longwing.evals.charts import column_name
from longwing.evals.journal import Run
from longwing.evals.run import TASKS, Plan
from longwing.evals.run import run as run_plan
from longwing.evals.table import Row, rows
from longwing.evals.task import Model

Lengths = Annotated[
    str | None,
    typer.Option(
        help="Tokens of prompt and answer together, e.g. 4k,8k,16k (k = 1024); of a window for "
        "perplexity. Without it: doubling from 1k to the context; 2k for perplexity."
    ),
]


@filled_by(SpreadOptions, "Cluster", variables=cluster_variables)
@filled_by(LoadOptions, "Loading")
def evaluate(
    *,
    model: ModelArgument = DEFAULT_MODEL,
    tasks: Annotated[str, typer.Option(help=f"Some of {','.join(TASKS)}.")] = "lines,passkey",
    lengths: Lengths = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Where the answer lies: 0 (start) to 1 (end), e.g. 0,0.5,1; cases are spread over "
            "them. Without it: five depths; for topics the first, as published."
        ),
    ] = None,
    cases: Annotated[
        int | None,
        typer.Option(min=1, help="Cases of each length; without it 20 if generated, else all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other cases.")] = 0,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder: LongChat's cases of topics and lines; .jsonl: QuALITY's questions; "
            "other files: perplexity's texts. Repeatable.",
            readable=False,  # what cannot be read is told with a remedy by `_data`
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Which of LongChat's columns, e.g. 5,10,200,400.")
    ] = None,
    characters: Annotated[
        str | None,
        typer.Option(help="Pass key: characters of filler, as published, e.g. 12000,20000."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Perplexity: tokens from one window to the next; they overlap."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Perplexity: read no more of each text than this, e.g. 64k.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where every case is recorded, JSON lines. The same command goes on where it was "
            "interrupted.",
            dir_okay=False,
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what --out holds.")] = False,
    name: Annotated[str | None, typer.Option(help="What reports call the model.")] = None,
    template: TemplateOption = "auto",
    url: Annotated[
        str | None, typer.Option(help="Ask the server there, e.g. http://127.0.0.1:8080.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For --url.", envvar="LONGWING_API_KEY")
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            help="Questions at a time, which a loaded model answers in batches; with --ray, each.",
        ),
    ] = 1,
    as_json: AsJson = False,
    load: LoadOptions,
    spread: SpreadOptions,
) -> None:
    """Measure retrieval, comprehension and loss by input length, on a model or a server.

    Interrupt it as you like: with --out nothing finished is asked again. `longwing report` draws
    what --out holds. With --ray many engines answer, and the record is the same.

    Examples:
      longwing eval models/falcon --tasks lines,passkey --lengths 4k,8k,16k --out runs/falcon.jsonl
      longwing eval models/falcon --tasks topics,lines --data LongChat/longeval/evaluation
      longwing eval models/falcon --tasks perplexity --data book.txt --lengths 2k,8k --json
    """
    try:
        plan = Plan(
            tasks=_words(tasks),
            lengths=tuple(map(length, _words(lengths))),
            depths=_depths(depths),
            cases=cases,
            seed=seed,
            columns=_counts("--columns", columns),
            characters=_counts("--characters", characters),
            stride=stride,
            tokens=None if tokens is None else length(tokens),
            **_data(data or []),
        )
    except EvalError as error:
        print_error(error)
        raise typer.Exit(2) from error
    if url is None:
        opened = _loaded(model, name, template, load, concurrency, spread)
    elif spread.ray:
        raise typer.BadParameter("--url asks a server, which --ray does not change; leave it out")
    else:
        opened = _served(url, model, name, template, load, api_key)
    with opened as asked, progress("evaluating") as advance:
        at_once = asked.concurrency if isinstance(asked, EnginePool) else concurrency
        with _told_what_is_kept(out, restart):
            done = run_plan(
                asked, plan, out, concurrency=at_once, restart=restart, progress=advance
            )
    if as_json:
        print_json(_facts(done))
    else:
        print_rows(asked.name, [_line(row) for row in rows(done.records)])
    _say_what_did_not_fit(rows(done.records), asked.context_len, url is None)
    if out is None:
        note("nothing was kept; give --out FILE.jsonl to keep the cases and to draw a report")


@contextmanager
def _loaded(
    model: str,
    name: str | None,
    template: str,
    load: LoadOptions,
    concurrency: int,
    spread: SpreadOptions,
) -> Iterator[Model]:
    """A folder loaded here, or in every worker of a cluster."""
    folder = find_model(model)
    shown = name or (tiny.NAME if folder == tiny.FOLDER else folder.name)
    make = partial(open_model, folder.absolute(), shown, template, load, concurrency)
    if spread.ray:
        with spread_model(
            spread, make, folder, template, device=load.device, per_worker=concurrency
        ) as pool:
            yield pool
        return
    asked = make()
    if isinstance(asked, BatchedModel):
        with asked:
            yield asked
    else:
        yield asked


@contextmanager
def _served(
    url: str,
    model: str,
    name: str | None,
    template: str,
    load: LoadOptions,
    api_key: str | None,
) -> Iterator[Model]:
    """A server; what is for a folder is refused."""
    idle = [key for key, value in asdict(load).items() if value not in (None, "auto")]
    if idle or model != DEFAULT_MODEL:
        given = "a MODEL" if model != DEFAULT_MODEL else f"--{idle[0]}"
        raise typer.BadParameter(
            f"--url asks a server, which {given} does not change; leave it out"
        )
    if template not in ("auto", "plain"):
        raise typer.BadParameter("with --url the server's own template is used; or plain for none")
    with ServedModel(url, name=name, api_key=api_key, template=template) as served:
        yield served


@contextmanager
def _told_what_is_kept(out: Path | None, restart: bool) -> Iterator[None]:
    """After a Ctrl-C: where the finished cases are, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None and out.is_file():
            again = "the same command without --restart" if restart else "the same command"
            note(f"interrupted; what is done is kept in {out}, and {again} goes on from there")
        raise


def _say_what_did_not_fit(told: Sequence[Row], context: int, is_loaded: bool) -> None:
    """Where the context was too short, what would help; an error if nothing fitted at all."""
    left_out = sum(row.num_too_long for row in told if not row.subset)
    if not left_out:
        return
    remedy = "a longer --context, with --rope beyond what the model was trained for,"
    said = (
        f"{left_out} cases are longer than the context of {context:,} tokens and were not asked; "
        f"give shorter ones, or {remedy if is_loaded else 'serve with a longer --context,'} to "
        "hold them"
    )
    if not any(row.num_cases for row in told):
        raise EvalError(said)
    warn(said)


def _data(paths: list[Path]) -> dict[str, Any]:
    """Which task each path is for, by its kind; refused before a model is loaded for nothing."""
    found: dict[str, Any] = {}
    for path in paths:
        if not os.path.exists(path):
            raise EvalError(f"--data: no file or folder at {path.absolute()}; check the path")
        if not os.access(path, os.R_OK):
            raise EvalError(f"--data {path} may not be read; check its permissions")
        kind = "longchat" if path.is_dir() else "quality" if path.suffix == ".jsonl" else "texts"
        if kind == "texts":
            found[kind] = (*found.get(kind, ()), path)
        elif kind in found:
            raise EvalError(
                f"--data {found[kind]} and {path} are for the same task, which takes one; leave "
                "one out"
            )
        else:
            found[kind] = path
    return found


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _counts(option: str, text: str | None) -> tuple[int, ...]:
    words = _words(text)
    for word in words:
        if not word.isdecimal():
            raise EvalError(f'"{word}" in {option} is not a whole number; write it like 5,10,200')
    return tuple(map(int, words))


def _depths(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(map(float, _words(text)))
    except ValueError:
        raise EvalError(f'"{text}" is no list of depths; write it like 0,0.5,1') from None


def _facts(done: Run) -> object:
    """Rows; of a lone perplexity task one object, that of its greatest length, with all rows."""
    found = [row.to_json() for row in rows(done.records)]
    measured = [row for row in found if row["task"] == "perplexity" and row["tokens"]]
    if measured and len({str(row["task"]) for row in found}) == 1:
        return {**measured[-1], "rows": found}
    return found


def _line(row: Row) -> tuple[str, ...]:
    """One cell for people."""
    label = f"{row.task} {row.subset}".strip(), column_name(row.column)
    too_long = f"too long for the context: {row.num_too_long}" if row.num_too_long else ""
    if row.perplexity is not None:
        return (*label, f"perplexity {row.perplexity:.5g}", f"{row.tokens:,} tokens", too_long)
    if row.accuracy is None or row.low is None or row.high is None:
        return (*label, "not asked", "", too_long)
    interval = f"{100 * row.low:.0f} to {100 * row.high:.0f} %, {row.num_cases} cases"
    return (*label, f"{100 * row.accuracy:.0f} %", interval, too_long)
