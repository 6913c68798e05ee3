"""The part of a report about a task that is answered right or wrong: tables, a chart, maps."""

from collections.abc import Iterable, Sequence

from longwing.evals import published
from longwing.evals.charts import (
    Line,
    column_name,
    heat_map,
    length_ticks,
    line_chart,
    percent_ticks,
)
from longwing.evals.entry import Entry, strokes
from longwing.evals.fields import accuracy_text, head_of, percent
from longwing.evals.page import Figure, Section, Table
from longwing.evals.table import CHANCE, grid

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
    "passkey": (
        "Pass key",
        "A number within repeated filler, to be repeated at the end. Cases of one length and depth "
        "differ in the number alone, so that they often fall alike and intervals are too narrow.",
    ),
    "facts": (
        "Several facts",
        "Four numbers within prose, all asked for; right is who names all four.",
    ),
    "quality": (
        "QuALITY",
        "Multiple choice over a whole story, by the likeliest letter. How others asked is unknown.",
    ),
}


def accuracy_section(task: str, models: Sequence[Entry]) -> Section:
    """One retrieval task: a chart of all lengths, a table a source, a map a model."""
    found = [row for model in models for row in model.rows if row.task == task]
    tables, joined = [], False
    for source in dict.fromkeys(row.source for row in found):
        columns = sorted({row.column for row in found if row.source == source})
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
    task: str, source: str, columns: Sequence[tuple[str, int]], models: Sequence[Entry]
) -> Table:
    lengths = published.LENGTHS.get(task, {})
    body = []
    for model in models:
        found = [model.row(task, source, column, "") for column in columns]
        if any(found):
            body.append([(model.name, ""), *map(accuracy_text, found)])
    theirs = []
    if any(column in lengths for column in columns):
        for name, results in published.ACCURACY.items():
            by_column = dict(zip(lengths, results.get(task, ()), strict=False))
            body.append([(name, "published"), *(percent(by_column.get(c)) for c in columns)])
            theirs.append(name)
    head = [
        (column_name(column), f"published: {lengths[column]:,}" if column in lengths else "")
        for column in columns
    ]
    return Table(head=(("model", ""), *head), body=body, theirs=frozenset(theirs))


def _published_table(task: str) -> Table:
    lengths = published.LENGTHS[task]
    body = [
        [(name, ""), *map(percent, results[task])] for name, results in published.ACCURACY.items()
    ]
    head = ("published", *(f"{length:,}" for length in lengths.values()))
    return Table(head=head_of(*head), body=body, theirs=frozenset(published.ACCURACY))


def _accuracy_figure(task: str, models: Sequence[Entry]) -> Figure | None:
    lines = []
    styles = strokes(models)
    for model in models:
        points = sorted(
            (float(row.length), row.accuracy, row.low or 0.0, row.high or 0.0)
            for row in model.rows
            if row.task == task and row.accuracy is not None and row.length
        )
        if points:
            colour, dashed = styles[model.name]
            lines.append(Line(name=model.name, points=points, colour=colour, dashed=dashed))
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
            lines.append(Line(name=name, points=points, published=True))
    theirs = " (grey: published)" if any(line.published for line in lines) else ""
    title = f"{task}: accuracy by length{theirs}"
    drawn = line_chart(
        title,
        lines,
        x_ticks=length_ticks([point[0] for line in lines for point in line.points]),
        y_ticks=percent_ticks(),
        log_x=True,
        x_name="tokens",
    )
    return Figure(name=f"{task}-accuracy", caption=title, svg=drawn, tall=True)


def _maps(task: str, model: Entry, number: int) -> Iterable[Figure]:
    spots = grid(model.run.records, task)
    if spots:
        columns = sorted({spot.column for spot in spots})
        title = f"{task}, {model.name}: score by length and depth"
        yield Figure(
            name=f"{task}-depth-{number}", caption=title, svg=heat_map(title, spots, columns)
        )


def quality_section(models: Sequence[Entry]) -> Section:
    """QuALITY: all questions and the hard ones; stories have no length to draw it by."""
    body = []
    for model in models:
        for source in dict.fromkeys(row.source for row in model.rows if row.task == "quality"):
            found = [model.row("quality", source, ("", 0), subset) for subset in ("", "hard")]
            body.append([(model.name, ""), *map(accuracy_text, found)])
    for name, results in published.ACCURACY.items():
        body.append([(name, "published"), *map(percent, results["quality"])])
    theirs = frozenset(published.ACCURACY)
    head = head_of("model", "all questions", "hard questions")
    table = Table(head=head, body=body, theirs=theirs)
    title, text = _TITLES["quality"]
    return Section(title=title, text=text + _chance("quality"), tables=[table])


def _chance(task: str) -> str:
    return f" Chance: {100 * CHANCE.get(task, 0.0):.0f} %."
