"""Sections of tables and figures, written as one HTML page or as Markdown.

The page needs nothing from outside, not even a script. Page and Markdown are two renderings of one
list of sections, so they cannot say different things. Every word is escaped: a run's record may
come from a stranger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Text = tuple[str, str]
"""A field of a table: what it says, and a smaller remark."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first field of a row is its name. `theirs`: names of rows others published."""

    head: Sequence[Text]
    body: Sequence[Sequence[Text]]
    theirs: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing; `name` is fit for a file. `tall`: beside it, two that are not stand."""

    name: str
    caption: str
    svg: str
    tall: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report."""

    title: str
    text: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The page, whole."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n"
    ]
    for section in sections:
        parts.append(f"<section>\n<h2>{escape(section.title)}</h2>\n")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>\n")
        parts += [_html_table(table) for table in section.tables]
        if section.figures:
            parts.append('<div class="figures">\n')
            for figure in section.figures:
                caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
                kind = ' class="tall"' if figure.tall else ""
                parts.append(f"<figure{kind}>{caption}{figure.svg}</figure>\n")
            parts.append("</div>\n")
        parts.append("</section>\n")
    parts.append("</main>\n</body>\n</html>\n")
    return "".join(parts)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_html_text(text)}</th>" for text in table.head)
    lines = []
    for (name, remark), *fields in table.body:
        kind = ' class="theirs"' if name in table.theirs else ""
        shown = "".join(f"<td>{_html_text(field)}</td>" for field in fields)
        lines.append(f"<tr{kind}><th>{_html_text((name, remark))}</th>{shown}</tr>\n")
    rows_html = "".join(lines)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows_html}</tbody></table></div>\n"
    )


def _html_text(text: Text) -> str:
    main, remark = (escape(part) for part in text)
    return main + (f"<small>{remark}</small>" if remark else "")


def to_markdown(title: str, sections: Sequence[Section], prefix: str) -> str:
    """The same in Markdown; figures are links to files named `PREFIX-NAME.svg`."""
    parts = [f"# {_plain(title)}\n"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}\n")
        if section.text:
            parts.append(section.text + "\n")
        for table in section.tables:
            lines = [_markdown_row(table.head)]
            lines.append("|" + " --- |" * len(table.head))
            lines += [_markdown_row(fields) for fields in table.body]
            parts.append("\n".join(lines) + "\n")
        for figure in section.figures:
            parts.append(f"![{_plain(figure.caption)}]({prefix}-{figure.name}.svg)\n")
    return "\n".join(parts)


def _markdown_row(fields: Sequence[Text]) -> str:
    texts = (_plain(main) + (f" ({_plain(remark)})" if remark else "") for main, remark in fields)
    return "| " + " | ".join(texts) + " |"


def _plain(text: str) -> str:
    """Text in which Markdown finds no table, link or HTML of its own."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5f666d; --line: #dfe3e8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.25rem 1.25rem; margin: 0 0 1.25rem; }
p { margin: 0 0 .9rem; color: var(--soft); max-width: 46rem; }
.table { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem;
  min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem 1.1rem .45rem 0;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; }
th:first-child { position: sticky; left: 0; background: #fff; min-width: 11rem; max-width: 16rem;
  white-space: normal; overflow-wrap: anywhere; }
td small { min-width: 6.5rem; max-width: 16rem; white-space: normal; }
.theirs th, .theirs td { color: var(--soft); font-weight: 400; }
small { display: block; font-weight: 400; color: var(--soft); font-size: .78rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr));
  gap: 1rem; align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .6rem .6rem .3rem; }
figure.tall { grid-row: span 2; }
figcaption { font-size: .85rem; font-weight: 600; margin: 0 0 .2rem; }
svg { display: block; width: 100%; height: auto; }
@media (max-width: 480px) { main { padding: 1rem .5rem 2rem; } section { padding: .9rem .8rem; }
  figure { padding: .4rem .2rem .2rem; } figcaption { padding: 0 .3rem; }
  th, td { padding-right: .8rem; } th:first-child { min-width: 7.5rem; max-width: 8.5rem; } }
"""
