"""A report of one or several runs, from their records alone: one HTML page, Markdown, and SVG.

What is on the page is settled here and in the sections' own files; how it is written, in `page.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longwing.evals.accuracy_section import accuracy_section, quality_section
from longwing.evals.difference_section import difference_sections
from longwing.evals.entry import Entry, entries
from longwing.evals.fields import head_of
from longwing.evals.journal import Run
from longwing.evals.loss_section import loss_section
from longwing.evals.page import Section, Table, to_html, to_markdown


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


def make_report(
    runs: Sequence[Run], *, title: str = "Evaluation at length", prefix: str = "report"
) -> Report:
    """Draw up the report of some runs.

    Args:
        runs: at least one.
        title: the page's heading.
        prefix: what the Markdown's links to figures begin with.
    """
    models = entries(runs)
    sections = [_overview(models)]
    tasks = dict.fromkeys(row.task for model in models for row in model.rows)
    for task in tasks:
        if task == "perplexity":
            sections.append(loss_section(models))
        elif task == "quality":
            sections.append(quality_section(models))
        else:
            sections.append(accuracy_section(task, models))
    sections += difference_sections(models)
    sections.append(Section(title="How to read this", text=_HOW))
    return Report(
        html=to_html(title, sections),
        markdown=to_markdown(title, sections, prefix),
        figures={figure.name: figure.svg for part in sections for figure in part.figures},
    )


def _overview(models: Sequence[Entry]) -> Section:
    head = [
        *head_of("model", "weights", "RoPE", "context", "computed in", "cases"),
        ("time", "added up"),
        ("begun", ""),
    ]
    body = []
    for model in models:
        facts = model.facts
        method, _, settings = str(facts.get("rope", "?")).partition(",")
        where = f"{facts.get('dtype', '?')}, {facts.get('device', '?')}"
        seconds = sum(row.seconds for row in model.rows if not row.subset)
        num_cases = sum(row.num_cases for row in model.rows if not row.subset)
        body.append(
            [
                (model.name, ""),
                (str(facts.get("quantization") or "dense"), str(facts.get("architecture", ""))),
                (method, settings.replace(",", ", ")),
                (f"{facts.get('context', '?')}", ""),
                (where if "dtype" in facts else "a server", ""),
                (f"{num_cases:,}", ""),
                (_duration(seconds), ""),
                (str(model.run.header.get("begun", "?"))[:10], _version(model)),
            ]
        )
    return Section(title="Runs", text="", tables=[Table(head=head, body=body)])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _version(model: Entry) -> str:
    return f"longwing {model.run.header.get('longwing', '?')}"


_HOW = (
    "Answers are greedy. Generated lengths are tokens of prompt, template and answer together, by "
    "the model's own tokenizer; published lengths are tokens of the prompt by Falcon's. Beside "
    "each accuracy stand its 95 % interval (Wilson) and the number of cases. Topics are right if "
    "the label stands in the answer, lines when the last integer is the one, the pass key when the "
    "first within ten tokens is. A model's time is that of its cases, added up: where several "
    "were asked at once, it is more than the clock's. What a model's context is too short for is "
    "told, and never cut to fit."
)
