"""`longwing convert`: a GGUF file to a model folder."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, note, print_json, print_rows, progress
from longwing.cli.options import one_of
from longwing.convert import convert_gguf
from longwing.convert.conversion import DTYPES


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.gguf", help="The GGUF file.", exists=True, dir_okay=False),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    dtype: Annotated[
        str,
        typer.Option(
            help=f"What values are written as: {', '.join(DTYPES)}.",
            callback=one_of(DTYPES),
        ),
    ] = "float16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a Llama-family GGUF file into a folder of safetensors with its tokenizer.

    Quantised tensors are written out at full width; DIR appears only when it is complete.
    """
    with progress("converting", in_bytes=True) as advance:
        report = convert_gguf(file, folder, dtype=dtype, progress=advance, overwrite=overwrite)
    facts = {
        "folder": str(folder),
        "architecture": report.architecture,
        "num_tensors": report.num_tensors,
        "num_bytes": report.num_bytes,
        "notes": list(report.notes),
    }
    if as_json:
        print_json(facts)
        return
    for text in report.notes:
        note(text)
    print_rows(
        "converted",
        [
            ("folder", str(folder)),
            ("architecture", report.architecture),
            ("tensors", f"{report.num_tensors}, {report.num_bytes / 1e9:.2f} GB"),
        ],
    )
