"""`longwing merge`: an adapter folded into a dense model."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, print_json, print_rows
from longwing.cli.options import find_model
from longwing.tune import merge as merge_folders


def merge(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, or owner/name.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fold a LoRA adapter into a model's weights, for programs that know no adapters."""
    folder = find_model(model)
    made = merge_folders(folder, adapter, target, overwrite=overwrite)
    if as_json:
        print_json({"folder": str(made)})
    else:
        print_rows(
            "merged",
            [("folder", str(made)), ("model", folder.name), ("adapter", str(adapter))],
        )
