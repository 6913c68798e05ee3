"""A report of one or several runs, from their records alone: one HTML page, Markdown, and SVG.

What is on the page is settled here, as a list of sections; how it is written, in `page.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from longwing.evals import published
from longwing.evals.charts import (
    Line,
    column_name,
    even_ticks,
    heat_map,
    length_ticks,
    line_chart,
    percent_ticks,
)
from longwing.evals.journal import Run
from longwing.evals.page import Figure, Section, Table, Text, to_html, to_markdown
from longwing.evals.perplexity import LAST_LEN, NUM_STRETCHES
from longwing.evals.table import CHANCE, Row, grid, rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `make_report` makes.

    Attributes:
        html: the page.
        markdown: the same tables, with the figures beside as files named `PREFIX-NAME.svg`.
        figures: SVG by name.
    """

    html: str
    markdown: str
    figures: Mapping[str, str]


@dataclass(frozen=True)
class _Model:
    """One run, by a name that no other run of the report has."""

    name: str
    run: Run
    rows: Sequence[Row]

    def row(self, task: str, source: str, column: tuple[str, int], subset: str) -> Row | None:
        wanted = (task, source, column, subset)
        for row in self.rows:
            if (row.task, row.source, row.column, row.subset) == wanted:
                return row
        return None

    @property
    def facts(self) -> Mapping[str, object]:
        model = self.run.header.get("model")
        return model if isinstance(model, dict) else {}


def make_report(
    runs: Sequence[Run], *, title: str = "Evaluation at length", prefix: str = "report"
) -> Report:
    """Draw up the report of some runs.

    Args:
        runs: at least one.
        title: the page's heading.
        prefix: what the Markdown's links to figures begin with.
    """
    models = _named(runs)
    sections = [_overview(models)]
    tasks = dict.fromkeys(row.task for model in models for row in model.rows)
    for task in tasks:
        if task == "perplexity":
            sections.append(_loss_section(models))
        elif task == "quality":
            sections.append(_quality_section(models))
        else:
            sections.append(_accuracy_section(task, models))
    sections += _quantised_sections(models)
    sections.append(Section(title="How to read this", text=_HOW))
    return Report(
        html=to_html(title, sections),
        markdown=to_markdown(title, sections, prefix),
        figures={figure.name: figure.svg for part in sections for figure in part.figures},
    )


def _named(runs: Sequence[Run]) -> list[_Model]:
    """The models by name. Runs of one model that measured different cells are one."""
    joined: list[Run] = []
    for run in runs:
        twin = next((place for place, other in enumerate(joined) if _completes(run, other)), None)
        if twin is None:
            joined.append(run)
        else:
            told = joined[twin].records
            records = (*told, *(record for record in run.records if record not in told))
            joined[twin] = Run(header=joined[twin].header, records=records)
    models: list[_Model] = []
    for run in joined:
        header = run.header.get("model")
        name = str(header.get("name", "?")) if isinstance(header, dict) else "?"
        same = sum(model.name == name or model.name.startswith(f"{name} (") for model in models)
        shown = f"{name} ({same + 1})" if same else name
        models.append(_Model(shown, run, rows(run.records)))
    return models


def _completes(run: Run, other: Run) -> bool:
    """Whether both are of one model, and no cell was asked in both."""
    if run.header.get("model") != other.header.get("model"):
        return False
    cells, others = (
        {
            tuple(record[name] for name in ("task", "source", "unit", "size"))
            for record in part
            if record["kind"] == "case"
        }
        for part in (run.records, other.records)
    )
    return cells.isdisjoint(others)


def _overview(models: Sequence[_Model]) -> Section:
    head = ("model", "weights", "RoPE", "context", "computed in", "cases", "time", "begun")
    body = []
    for model in models:
        facts = model.facts
        where = f"{facts.get('dtype', '?')}, {facts.get('device', '?')}"
        seconds = sum(row.seconds for row in model.rows if not row.subset)
        num_cases = sum(row.num_cases for row in model.rows if not row.subset)
        body.append(
            [
                (model.name, str(facts.get("architecture", ""))),
                (str(facts.get("quantization") or "dense"), ""),
                (str(facts.get("rope", "?")), ""),
                (f"{facts.get('context', '?')}", ""),
                (where if "dtype" in facts else "a server", ""),
                (f"{num_cases:,}", ""),
                (_duration(seconds), ""),
                (str(model.run.header.get("begun", "?"))[:10], _version(model)),
            ]
        )
    return Section(title="Runs", text="", tables=[Table(head=_head(*head), body=body)])


def _accuracy_section(task: str, models: Sequence[_Model]) -> Section:
    """One retrieval task: a chart of all lengths, a table a source, a map a model."""
    found = [row for model in models for row in model.rows if row.task == task]
    tables, joined = [], False
    for source in dict.fromkeys(row.source for row in found):
        columns = sorted({row.column for row in found if row.source == source}, key=_by_size)
        theirs = [c for c in columns if c in published.LENGTHS.get(task, {})]
        joined = joined or bool(theirs)
        tables.append(_accuracy_table(task, source, columns, models))
    if task in published.LENGTHS and not joined:
        tables.append(_published_table(task))
    figures = [_accuracy_figure(task, models)] + [
        figure for number, model in enumerate(models, 1) for figure in _maps(task, model, number)
    ]
    return Section(
        title=f"{_TITLES.get(task, (task, ''))[0]}",
        text=_TITLES.get(task, ("", ""))[1] + _chance(task),
        tables=tables,
        figures=[figure for figure in figures if figure is not None],
    )


def _accuracy_table(
    task: str, source: str, columns: Sequence[tuple[str, int]], models: Sequence[_Model]
) -> Table:
    lengths = published.LENGTHS.get(task, {})
    body = []
    for model in models:
        found = [model.row(task, source, column, "") for column in columns]
        if any(found):
            body.append([(model.name, ""), *map(_accuracy_text, found)])
    theirs = []
    if any(column in lengths for column in columns):
        for name, results in published.ACCURACY.items():
            by_column = dict(zip(lengths, results.get(task, ()), strict=False))
            body.append([(name, "published"), *(_percent(by_column.get(c)) for c in columns)])
            theirs.append(name)
    head = [
        (column_name(column), f"published: {lengths[column]:,}" if column in lengths else "")
        for column in columns
    ]
    return Table(head=(("model", ""), *head), body=body, theirs=frozenset(theirs))


def _published_table(task: str) -> Table:
    lengths = published.LENGTHS[task]
    body = [
        [(name, ""), *map(_percent, results[task])] for name, results in published.ACCURACY.items()
    ]
    head = ("published", *(f"{length:,}" for length in lengths.values()))
    return Table(head=_head(*head), body=body, theirs=frozenset(published.ACCURACY))


def _accuracy_figure(task: str, models: Sequence[_Model]) -> Figure | None:
    lines = []
    for model in models:
        points = sorted(
            (float(row.length), row.accuracy, row.low or 0.0, row.high or 0.0)
            for row in model.rows
            if row.task == task and row.accuracy is not None and row.length
        )
        if points:
            lines.append(Line(name=model.name, points=points))
    if not lines:
        return None
    lengths = published.LENGTHS.get(task, {}).values()
    for name, results in published.ACCURACY.items():
        points = [
            (float(length), value / 100, value / 100, value / 100)
            for length, value in zip(lengths, results.get(task, ()), strict=False)
            if value is not None
        ]
        if points:
            lines.append(Line(name=f"{name} (published)", points=points, published=True))
    title = f"{task}: accuracy by length"
    drawn = line_chart(
        title,
        lines,
        x_ticks=length_ticks([point[0] for line in lines for point in line.points]),
        y_ticks=percent_ticks(),
        log_x=True,
        x_name="tokens",
    )
    return Figure(name=f"{task}-accuracy", caption=title, svg=drawn)


def _maps(task: str, model: _Model, number: int) -> Iterable[Figure]:
    spots = grid(model.run.records, task)
    if spots:
        columns = sorted({spot.column for spot in spots}, key=_by_size)
        title = f"{task}, {model.name}: score by length and depth"
        yield Figure(
            name=f"{task}-depth-{number}", caption=title, svg=heat_map(title, spots, columns)
        )


def _quality_section(models: Sequence[_Model]) -> Section:
    body = []
    for model in models:
        for source in dict.fromkeys(row.source for row in model.rows if row.task == "quality"):
            found = [model.row("quality", source, ("", 0), subset) for subset in ("", "hard")]
            body.append([(model.name, ""), *map(_accuracy_text, found)])
    for name, results in published.ACCURACY.items():
        body.append([(name, "published"), *map(_percent, results["quality"])])
    theirs = frozenset(published.ACCURACY)
    head = _head("model", "all questions", "hard questions")
    table = Table(head=head, body=body, theirs=theirs)
    title, text = _TITLES["quality"]
    return Section(title=title, text=text + _chance("quality"), tables=[table])


def _loss_section(models: Sequence[_Model]) -> Section:
    """Perplexity: a table a text, and the loss by position for each length."""
    found = [row for model in models for row in model.rows if row.task == "perplexity"]
    tables, figures = [], []
    for number, source in enumerate(dict.fromkeys(row.source for row in found), 1):
        columns = sorted({row.column for row in found if row.source == source}, key=_by_size)
        body = []
        for model in models:
            cells = [model.row("perplexity", source, column, "") for column in columns]
            if any(cells):
                body.append([(model.name, source), *map(_loss_text, cells)])
        head = _head("model", *map(column_name, columns))
        tables.append(Table(head=head, body=body))
        for column in columns:
            figure = _loss_figure(source, column, models, number)
            if figure is not None:
                figures.append(figure)
    title, text = _TITLES["perplexity"]
    return Section(title=title, text=text, tables=tables, figures=figures)


def _loss_figure(
    source: str, column: tuple[str, int], models: Sequence[_Model], number: int
) -> Figure | None:
    length, lines = column[1], []
    for model in models:
        row = model.row("perplexity", source, column, "")
        points = [
            ((place + 0.5) * length / NUM_STRETCHES, loss, loss, loss)
            for place, loss in enumerate(row.stretches if row else ())
            if loss is not None
        ]
        if points:
            lines.append(Line(name=model.name, points=points))
    if not lines:
        return None
    losses = [point[1] for line in lines for point in line.points]
    title = f"{source}: loss by position, windows of {column_name(column)}"
    drawn = line_chart(
        title,
        lines,
        x_ticks=[(length * part / 4, f"{length * part // 4:,}") for part in range(5)],
        y_ticks=even_ticks(min(losses), max(losses)),
        x_name="position in the window; nats a token upwards",
    )
    return Figure(name=f"perplexity-{number}-{length}", caption=title, svg=drawn)


def _quantised_sections(models: Sequence[_Model]) -> list[Section]:
    """A table for every quantised run that has a dense one of the same model and settings."""
    tables = []
    for packed in models:
        if not packed.facts.get("quantization"):
            continue
        for dense in models:
            same = all(
                dense.facts.get(name) == packed.facts.get(name)
                for name in ("architecture", "vocab_size", "rope", "template")
            )
            if same and "architecture" in dense.facts and not dense.facts.get("quantization"):
                tables.append(_difference_table(dense, packed))
                break
    if not tables:
        return []
    text = (
        "The same questions, asked of the dense and of the quantised weights. Lost and gained: "
        "cases that only the one or only the other got right."
    )
    return [Section(title="Quantised and dense", text=text, tables=tables)]


def _difference_table(dense: _Model, packed: _Model) -> Table:
    body = []
    for row in packed.rows:
        other = dense.row(row.task, row.source, row.column, row.subset)
        if other is None:
            continue
        name = (f"{row.task} {row.subset}".strip(), f"{row.source}, {column_name(row.column)}")
        if row.loss is not None and other.loss is not None:
            change = f"{row.loss - other.loss:+.4f} nats"
            body.append([name, _loss_text(other), _loss_text(row), (change, ""), ("", "")])
        elif row.accuracy is not None and other.accuracy is not None:
            change = f"{100 * (row.accuracy - other.accuracy):+.0f} points"
            lost, gained = _changed(dense, packed, row)
            turned = (f"{lost} lost, {gained} gained", "")
            texts = _accuracy_text(other), _accuracy_text(row)
            body.append([name, *texts, (change, ""), turned])
    return Table(head=_head("task", dense.name, packed.name, "change", "cases"), body=body)


def _changed(dense: _Model, packed: _Model, row: Row) -> tuple[int, int]:
    """Cases of a row that the dense model alone got right, and the quantised one alone."""
    before, after = (_correct_by_prompt(model, row) for model in (dense, packed))
    shared = before.keys() & after.keys()
    lost = sum(before[key] and not after[key] for key in shared)
    return lost, sum(after[key] and not before[key] for key in shared)


def _correct_by_prompt(model: _Model, row: Row) -> dict[object, bool]:
    return {
        record["sha256"]: bool(record["correct"])
        for record in model.run.records
        if record.get("correct") is not None
        and (record["task"], record["source"]) == (row.task, row.source)
        and (record["unit"], record["size"]) == row.column
        and (not row.subset or record.get("hard"))
    }


def _accuracy_text(row: Row | None) -> Text:
    if row is None:
        return "", ""
    too_long = f"{row.num_too_long} too long" if row.num_too_long else ""
    if row.accuracy is None or row.low is None or row.high is None:
        return "too long" if row.num_too_long else "–", ""
    interval = f"{100 * row.low:.0f}–{100 * row.high:.0f}"
    remarks = [f"{interval}, n = {row.num_cases}", too_long]
    if row.score is not None:
        remarks.append(f"found {100 * row.score:.0f} %")
    return f"{100 * row.accuracy:.0f} %", "; ".join(filter(None, remarks))


def _loss_text(row: Row | None) -> Text:
    if row is None:
        return "", ""
    if row.perplexity is None:
        return "too long" if row.num_too_long else "–", ""
    last = (
        "" if row.last_perplexity is None else f"last {_last_len(row)}: {row.last_perplexity:.4g}"
    )
    return f"{row.perplexity:.5g}", last


def _last_len(row: Row) -> int:
    return min(LAST_LEN, max(1, row.size // 4))


def _head(*names: str) -> list[Text]:
    return [(name, "") for name in names]


def _percent(value: float | None) -> Text:
    return ("–" if value is None else f"{value:g} %"), ""


def _chance(task: str) -> str:
    return f" Chance: {100 * CHANCE.get(task, 0.0):.0f} %."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _version(model: _Model) -> str:
    return f"longwing {model.run.header.get('longwing', '?')}"


def _by_size(column: tuple[str, int]) -> tuple[str, int]:
    return column


_TITLES = {
    "topics": (
        "Topic retrieval",
        "A record of conversations; the model is asked which topic was the first (or, at greater "
        "depths, which was the n-th).",
    ),
    "lines": (
        "Line retrieval",
        "A record of named lines with a number each; the model is asked for one line's number.",
    ),
    "passkey": ("Pass key", "A number within repeated filler, to be repeated at the end."),
    "facts": (
        "Several facts",
        "Four numbers within prose, all asked for; right is who names all four.",
    ),
    "quality": (
        "QuALITY",
        "Multiple choice over a whole story, by the likeliest letter. How others asked is unknown.",
    ),
    "perplexity": (
        "Perplexity",
        "Of windows read on their own; below it, that of each window's last tokens alone, which "
        "have the rest of the window before them.",
    ),
}

_HOW = (
    "Answers are greedy. Generated lengths are tokens of prompt, template and answer together, by "
    "the model's own tokenizer; published lengths are tokens of the prompt by Falcon's. Beside "
    "each accuracy stand its 95 % interval (Wilson) and the number of cases. Topics are right if "
    "the label stands in the answer, lines when the last integer is the one, the pass key when the "
    "first within ten tokens is. What a model's context is too short for is told, and never cut to "
    "fit."
)
