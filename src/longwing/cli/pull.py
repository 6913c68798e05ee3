"""`longwing pull`: a model from the Hugging Face Hub to this machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, print_json, print_rows, progress, warn
from longwing.hub import PullProgress
from longwing.hub import pull as pull_model


def pull(
    model: Annotated[
        str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="What to download.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Fill this folder instead of the Hugging Face cache."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Which weight files, as a pattern; repeatable. Without it: *.safetensors."
        ),
    ] = None,
    as_json: AsJson = False,
    progress_json: Annotated[
        bool,
        typer.Option(
            "--progress-json",
            help="Say how far it is on stdout, for programs: a JSON object a line, with done and "
            "total bytes and the file; then the result of --json on one line.",
        ),
    ] = False,
) -> None:
    """Download a model's safetensors, JSON and tokenizer files, and verify them.

    Never takes a file that could carry code. Run it again after an interruption and it goes on
    where it stopped. Honours HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE.
    """
    with _told(model, progress_json) as advance:
        pulled = pull_model(model, target=folder, include=include or (), progress=advance)
    for name in pulled.replaced:
        warn(f"{name} had other content here and was replaced")
    facts = {
        "folder": str(pulled.path),
        "repo": pulled.repo,
        "owner": pulled.owner,
        "revision": pulled.revision,
        "num_files": pulled.num_files,
        "num_bytes": pulled.num_bytes,
        "num_fetched_bytes": pulled.num_fetched_bytes,
    }
    if progress_json:
        typer.echo(json.dumps(facts))
        return
    if as_json:
        print_json(facts)
        return
    print_rows(
        pulled.repo,
        [
            ("owner", pulled.owner),
            ("revision", pulled.revision),
            ("files", f"{pulled.num_files}, {pulled.num_bytes / 1e9:.2f} GB"),
            ("folder", str(pulled.path)),
        ],
    )


@contextmanager
def _told(model: str, as_lines: bool) -> Iterator[PullProgress]:
    """Progress as a bar, or as lines for programs."""
    if as_lines:
        yield _Lines()
        return
    with progress(f"pulling {model}", in_bytes=True) as advance:
        yield lambda done, total, _file: advance(done, total)


class _Lines:
    """Tells progress as JSON lines, some a second; the first and the last are always told."""

    EVERY_S = 0.2

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, done_bytes: int, total_bytes: int, file: str) -> None:
        now = time.monotonic()
        if now - self._last < self.EVERY_S and done_bytes < total_bytes:
            return
        self._last = now
        typer.echo(json.dumps({"done": done_bytes, "total": total_bytes, "file": file}))
