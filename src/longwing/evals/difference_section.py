"""The part of a report in which quantised models stand against their dense twins, case by case."""

from collections.abc import Sequence

from longwing.evals.charts import column_name
from longwing.evals.entry import Entry, dense_twin
from longwing.evals.fields import head_of
from longwing.evals.page import Section, Table, Text
from longwing.evals.table import Row


def difference_sections(models: Sequence[Entry]) -> list[Section]:
    """A table a task, a row for every quantised run whose dense twin is there, a column a cell."""
    twins = [(dense_twin(packed, models), packed) for packed in models]
    pairs = [(dense, packed) for dense, packed in twins if dense is not None]
    kinds = dict.fromkeys(
        (row.task, row.subset, row.source) for _, packed in pairs for row in packed.rows
    )
    tables = [table for kind in kinds if (table := _difference_table(pairs, *kind)) is not None]
    if not tables:
        return []
    text = (
        "The same questions, asked of the dense and of the quantised weights: the quantised run's "
        "result less the dense one's. Lost and gained: cases that only the one or only the other "
        "got right."
    )
    return [Section(title="Quantised and dense", text=text, tables=tables)]


def _difference_table(
    pairs: Sequence[tuple[Entry, Entry]], task: str, subset: str, source: str
) -> Table | None:
    """One task's changes, pair by pair; None if no pair has a result of it in common."""
    kind = (task, subset, source)
    found = [row for _, packed in pairs for row in packed.rows]
    columns = sorted({row.column for row in found if (row.task, row.subset, row.source) == kind})
    body = []
    for dense, packed in pairs:
        changes = [_change(dense, packed, task, source, column, subset) for column in columns]
        if any(changes):
            name = (packed.name, f"less {dense.name}")
            body.append([name, *(change or ("–", "") for change in changes)])
    if not body:
        return None
    head = ((f"{task} {subset}".strip(), source), *head_of(*map(column_name, columns)))
    return Table(head=head, body=body)


def _change(
    dense: Entry, packed: Entry, task: str, source: str, column: tuple[str, int], subset: str
) -> Text | None:
    """One cell: the loss in nats a token, or accuracy in points; None if either is missing."""
    before, after = (model.row(task, source, column, subset) for model in (dense, packed))
    if before is None or after is None:
        return None
    if before.loss is not None and after.loss is not None:
        return f"{after.loss - before.loss:+.4f} nats", ""
    if before.accuracy is None or after.accuracy is None:
        return None
    lost, gained = _changed(dense, packed, after)
    points = round(100 * (after.accuracy - before.accuracy))
    return f"{points:+d} points" if points else "the same", f"{lost} lost, {gained} gained"


def _changed(dense: Entry, packed: Entry, row: Row) -> tuple[int, int]:
    """Cases of a row that the dense model alone got right, and the quantised one alone."""
    before, after = (_correct_by_prompt(model, row) for model in (dense, packed))
    shared = before.keys() & after.keys()
    lost = sum(before[key] and not after[key] for key in shared)
    return lost, sum(after[key] and not before[key] for key in shared)


def _correct_by_prompt(model: Entry, row: Row) -> dict[object, bool]:
    return {
        record["sha256"]: bool(record["correct"])
        for record in model.run.records
        if record.get("correct") is not None
        and (record["task"], record["source"]) == (row.task, row.source)
        and (record["unit"], record["size"]) == row.column
        and (not row.subset or record.get("hard"))
    }
