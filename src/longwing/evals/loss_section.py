"""The part of a report about perplexity: a table a text, and the loss by position a length."""

from collections.abc import Sequence

from longwing.evals.charts import Line, column_name, even_ticks, line_chart
from longwing.evals.entry import Entry, strokes
from longwing.evals.fields import head_of, loss_text
from longwing.evals.page import Figure, Section, Table
from longwing.evals.perplexity import NUM_STRETCHES

_TEXT = (
    "Of windows read on their own; below it, that of each window's last tokens alone, which have "
    "the rest of the window before them."
)


def loss_section(models: Sequence[Entry]) -> Section:
    """Perplexity: a table a text, and the loss by position for each length."""
    found = [row for model in models for row in model.rows if row.task == "perplexity"]
    tables, figures = [], []
    for number, source in enumerate(dict.fromkeys(row.source for row in found), 1):
        columns = sorted({row.column for row in found if row.source == source})
        body = []
        for model in models:
            cells = [model.row("perplexity", source, column, "") for column in columns]
            if any(cells):
                body.append([(model.name, source), *map(loss_text, cells)])
        head = head_of("model", *map(column_name, columns))
        tables.append(Table(head=head, body=body))
        for column in columns:
            figure = _loss_figure(source, column, models, number)
            if figure is not None:
                figures.append(figure)
    return Section(title="Perplexity", text=_TEXT, tables=tables, figures=figures)


def _loss_figure(
    source: str, column: tuple[str, int], models: Sequence[Entry], number: int
) -> Figure | None:
    length, lines, styles = column[1], [], strokes(models)
    for model in models:
        row = model.row("perplexity", source, column, "")
        points = [
            ((place + 0.5) * length / NUM_STRETCHES, loss, loss, loss)
            for place, loss in enumerate(row.stretches if row else ())
            if loss is not None
        ]
        if points:
            colour, dashed = styles[model.name]
            lines.append(Line(name=model.name, points=points, colour=colour, dashed=dashed))
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
