"""The part of a report in which quantised models stand against their dense twins, case by case."""

from collections.abc import Sequence

from longwing.evals.charts import column_name
from longwing.evals.entry import Entry, dense_twin
from longwing.evals.fields import accuracy_text, head_of, loss_text
from longwing.evals.page import Section, Table
from longwing.evals.table import Row


def difference_sections(models: Sequence[Entry]) -> list[Section]:
    """A table for every quantised run that has a dense one of the same model and settings."""
    tables = []
    for packed in models:
        dense = dense_twin(packed, models)
        if dense is not None:
            tables.append(_difference_table(dense, packed))
    if not tables:
        return []
    text = (
        "The same questions, asked of the dense and of the quantised weights. Lost and gained: "
        "cases that only the one or only the other got right."
    )
    return [Section(title="Quantised and dense", text=text, tables=tables)]


def _difference_table(dense: Entry, packed: Entry) -> Table:
    body = []
    for row in packed.rows:
        other = dense.row(row.task, row.source, row.column, row.subset)
        if other is None:
            continue
        name = (f"{row.task} {row.subset}".strip(), f"{row.source}, {column_name(row.column)}")
        if row.loss is not None and other.loss is not None:
            change = f"{row.loss - other.loss:+.4f} nats"
            body.append([name, loss_text(other), loss_text(row), (change, ""), ("", "")])
        elif row.accuracy is not None and other.accuracy is not None:
            change = f"{100 * (row.accuracy - other.accuracy):+.0f} points"
            lost, gained = _changed(dense, packed, row)
            turned = (f"{lost} lost, {gained} gained", "")
            texts = accuracy_text(other), accuracy_text(row)
            body.append([name, *texts, (change, ""), turned])
    return Table(head=head_of("task", dense.name, packed.name, "change", "cases"), body=body)


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
