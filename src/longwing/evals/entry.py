"""`Entry`: one model of a report, under a name of its own, with all that was measured of it.

Runs of one model that measured different cells stand as one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longwing.evals.journal import Run
from longwing.evals.table import Row, rows


@dataclass(frozen=True)
class Entry:
    """One model of a report.

    Attributes:
        name: that no other of the report has.
        run: its records, of one run or of several joined.
        rows: the table they make.
    """

    name: str
    run: Run
    rows: Sequence[Row]

    def row(self, task: str, source: str, column: tuple[str, int], subset: str) -> Row | None:
        """One cell's row; None if it was not measured."""
        wanted = (task, source, column, subset)
        for row in self.rows:
            if (row.task, row.source, row.column, row.subset) == wanted:
                return row
        return None

    @property
    def facts(self) -> Mapping[str, object]:
        """What its header says of it."""
        model = self.run.header.get("model")
        return model if isinstance(model, dict) else {}


def entries(runs: Sequence[Run]) -> list[Entry]:
    """The models of some runs. Runs of one model that measured different cells are one."""
    joined: list[Run] = []
    for run in runs:
        twin = next((place for place, other in enumerate(joined) if _completes(run, other)), None)
        if twin is None:
            joined.append(run)
        else:
            told = joined[twin].records
            records = (*told, *(record for record in run.records if record not in told))
            joined[twin] = Run(header=joined[twin].header, records=records)
    models: list[Entry] = []
    for run in joined:
        header = run.header.get("model")
        name = str(header.get("name", "?")) if isinstance(header, dict) else "?"
        same = sum(model.name == name or model.name.startswith(f"{name} (") for model in models)
        shown = f"{name} ({same + 1})" if same else name
        models.append(Entry(shown, run, rows(run.records)))
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


def dense_twin(packed: Entry, models: Sequence[Entry]) -> Entry | None:
    """The dense entry of the same model and settings as a quantised one, if there is one."""
    if not packed.facts.get("quantization"):
        return None
    for dense in models:
        same = all(dense.facts.get(name) == packed.facts.get(name) for name in _SETTINGS)
        if same and "architecture" in dense.facts and not dense.facts.get("quantization"):
            return dense
    return None


def strokes(models: Sequence[Entry]) -> dict[str, tuple[int, bool]]:
    """By name: the number of an entry's colour, its dense twin's if it has one; and if dashed."""
    twins = {model.name: dense_twin(model, models) for model in models}
    alone = [name for name, twin in twins.items() if twin is None]
    return {
        name: (alone.index(twin.name if twin else name), twin is not None)
        for name, twin in twins.items()
    }


_SETTINGS = ("architecture", "vocab_size", "rope", "template")
