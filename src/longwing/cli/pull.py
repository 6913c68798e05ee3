"""`longwing pull`: a model from the Hugging Face Hub to this machine."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, print_json, print_rows, progress, warn
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
) -> None:
    """Download a model's safetensors, JSON and tokenizer files, and verify them.

    Never takes a file that could carry code. Run it again after an interruption and it goes on
    where it stopped. Honours HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE.
    """
    with progress(f"pulling {model}", in_bytes=True) as advance:
        pulled = pull_model(
            model,
            target=folder,
            include=include or (),
            progress=lambda done, total, _file: advance(done, total),
        )
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
