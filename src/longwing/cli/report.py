"""`longwing report`: a page, Markdown and figures from the records of evaluations."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.checkpoint.publish import new_file
from longwing.cli.console import AsJson, print_json, print_rows
from longwing.errors import EvalError
from longwing.evals.journal import read_run
from longwing.evals.report import make_report


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Files that `longwing eval --out` wrote.", dir_okay=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The page; its folder is made at need. Beside it: the same name with .md, and "
            "-NAME.svg for each figure.",
            dir_okay=False,
        ),
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Evaluation at length",
    as_json: AsJson = False,
) -> None:
    """Draw accuracy by length, maps of where a model stops reading, and loss by position.

    Several runs stand side by side; a quantised one is also compared with the dense one. The page
    is one file that needs nothing else.

    Example:
      longwing report runs/dense.jsonl runs/4bit.jsonl --out report.html
    """
    if out.suffix != ".html":
        raise typer.BadParameter(f"--out is the page, and ends in .html, not in {out.name}")
    made = make_report([read_run(run) for run in runs], title=title, prefix=out.stem)
    files = {out: made.html, out.with_suffix(".md"): made.markdown}
    for name, svg in made.figures.items():
        files[out.with_name(f"{out.stem}-{name}.svg")] = svg
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise EvalError(
            f"the folder {out.parent} cannot be made: {fault.strerror}; choose another for --out"
        ) from fault
    for file, text in files.items():
        with new_file(file) as stream:
            stream.write(text.encode())
    if as_json:
        print_json({"files": [str(file) for file in files]})
    else:
        print_rows("written", [(str(file),) for file in files])
