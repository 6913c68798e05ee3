"""What stands in a field of a report's tables, for each kind of figure."""

from longwing.evals.page import Text
from longwing.evals.perplexity import LAST_LEN
from longwing.evals.table import Row


def accuracy_text(row: Row | None) -> Text:
    """A row's accuracy, with its interval and number of cases."""
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


def loss_text(row: Row | None) -> Text:
    """A row's perplexity, and that of each window's last tokens."""
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


def head_of(*names: str) -> list[Text]:
    """A table's head without remarks."""
    return [(name, "") for name in names]


def percent(value: float | None) -> Text:
    """A published figure."""
    return ("–" if value is None else f"{value:g} %"), ""
