"""What every verb prints with: facts on stdout, progress and errors on stderr.

Progress is a bar on a terminal and a plain line now and then elsewhere, so that a log file stays
readable. Facts are a table for people, or one JSON object with --json.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

Advance = Callable[[int, int], None]
"""Called with (done, total)."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

PLAIN_EVERY_S = 5.0
"""Without a terminal: seconds between two lines of progress."""

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def print_error(error: Exception) -> None:
    """One line that says what went wrong; the message itself holds value, limit and remedy."""
    stderr.print(f"[bold red]error:[/] {escape(' '.join(str(error).splitlines()))}")


def warn(message: str) -> None:
    """One line the user should see though the work goes on."""
    stderr.print(f"[yellow]warning:[/] {escape(message)}")


def note(message: str) -> None:
    """One quiet line on stderr."""
    stderr.print(f"[dim]{escape(message)}[/]")


def print_json(facts: object) -> None:
    """One JSON value on stdout; escaped where the stream could not hold its characters."""
    is_unicode = sys.stdout.encoding.lower().startswith("utf")
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=not is_unicode))


def print_rows(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Facts for people: a name, a value and perhaps a remark on each row."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for _ in range(max(map(len, rows), default=2) - 1):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # A file has no width of its own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")  # without the blanks that fill up its column


@contextmanager
def progress(label: str, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show how far a long piece of work is, with the time left; gone when it is done."""
    if not stderr.is_terminal:
        yield _plain_progress(label, in_bytes)
        return
    amounts = (
        (DownloadColumn(binary_units=True), TransferSpeedColumn())
        if in_bytes
        else (MofNCompleteColumn(),)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


@contextmanager
def progress_by_part() -> Iterator[Callable[[str, int, int], None]]:
    """As `progress`, for work that names the part it is at: one bar after another."""
    with ExitStack() as stack:
        current: dict[str, Advance] = {}

        def advance(part: str, done: int, total: int) -> None:
            if part not in current:
                stack.close()
                current.clear()
                current[part] = stack.enter_context(progress(part))
            current[part](done, total)

        yield advance


def _plain_progress(label: str, in_bytes: bool) -> Advance:
    started = last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S or not 0 < done < total:
            return
        last = now
        left = (now - started) * (total - done) / done
        unit = (
            f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB" if in_bytes else f"{done} of {total}"
        )
        note(f"{label}: {unit}, {left:.0f} s left")

    return advance
