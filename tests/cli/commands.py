"""Running the command line: inside this process for its words, as one of its own for the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from longwing.cli.app import app
from longwing.errors import LongwingError


def run(*args: str | Path, stdin: str | bytes | None = None) -> Result:
    """One command. An exception that is no LongwingError is a bug, and fails the test."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    unexpected = result.exception
    assert unexpected is None or isinstance(unexpected, LongwingError | SystemExit), unexpected
    return result


def facts(*args: str | Path, stdin: str | bytes | None = None) -> dict[str, Any]:
    """What a command that must succeed prints with --json."""
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*args: str | Path, stdin: str | bytes | None = None) -> str:
    """The words of the LongwingError that a command must end with: exit code 1, by `main`."""
    result = run(*args, stdin=stdin)
    assert isinstance(result.exception, LongwingError), result.output
    return str(result.exception)


def usage_error(*args: str | Path) -> str:
    """The words, on one line, by which a command line must be refused: exit code 2."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())


@contextmanager
def process(*args: str | Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """`longwing` as a process with three pipes; gone at the end."""
    command = [sys.executable, "-m", "longwing", *map(str, args)]
    pipe = subprocess.PIPE
    environment = {**os.environ, **environ}
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        try:
            yield child
        finally:
            child.kill()
