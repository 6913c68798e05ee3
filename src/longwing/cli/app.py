"""The `longwing` command: its verbs, and what an exit code means.

0: done. 1: it could not be done, and the last line on stderr says why; only when the reader of
stdout has left (`| head`) is there nothing to say. 2: the command line was wrong. 130: Ctrl-C.
"""

import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from longwing.cli.ask import ask
from longwing.cli.bench import bench
from longwing.cli.chat import chat
from longwing.cli.console import print_error
from longwing.cli.convert import convert
from longwing.cli.deploy import deploy
from longwing.cli.eval import evaluate
from longwing.cli.export import export
from longwing.cli.extend import extend
from longwing.cli.generate import generate
from longwing.cli.inspect import inspect
from longwing.cli.merge import merge
from longwing.cli.plan import plan
from longwing.cli.pull import pull
from longwing.cli.quantize import quantize
from longwing.cli.report import report
from longwing.cli.serve import serve
from longwing.cli.tune import tune
from longwing.cli.verify import verify
from longwing.errors import LongwingError

app = typer.Typer(
    name="longwing",
    help="Open language models over long documents on little hardware.",
    epilog="Start with: longwing generate --prompt 'Why is the sky blue?'",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longwing {version('longwing')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is being done, on stderr.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )


for verb in (
    generate,
    chat,
    serve,
    deploy,
    ask,
    inspect,
    plan,
    quantize,
    extend,
    tune,
    merge,
    verify,
    convert,
    export,
    pull,
    report,
    bench,
):
    app.command()(verb)
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may say anything; what the terminal cannot show must not end the answer.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except LongwingError as error:
        print_error(error)
        _end(1)
    except SystemExit as end:
        _end(end.code)


def _end(code: str | int | None) -> NoReturn:
    """Exit; one of torchrun's processes at once, with what it has said.

    Threads of a process group that was left can abort Python's own way out (seen with gloo, but
    rarely), and torchrun would take that for a failure and end the others.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not isinstance(code, str):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
