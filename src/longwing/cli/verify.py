"""`longwing verify`: what is wrong with a model folder, tensor by tensor."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, print_json, print_rows, progress
from longwing.errors import CheckpointError
from longwing.verify import Verdict
from longwing.verify import verify as verify_folder


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The model folder.", exists=True, file_okay=False)
    ],
    headers_only: Annotated[
        bool,
        typer.Option("--headers-only", help="Skip the data: settings, names, shapes and types."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with a model folder; exit code 1 if anything is.

    Checks settings, file headers, names and shapes against what config.json implies, that every
    number is finite and every packed layer consistent, the tokenizer, and longwing.manifest.json
    if there is one.
    """
    with progress("reading", in_bytes=True) as advance:
        verdict = verify_folder(folder, values=not headers_only, progress=advance)
    if as_json:
        print_json(_facts(verdict))
    else:
        _print(verdict)
    if not verdict.ok:
        raise CheckpointError(_found(verdict), file=str(folder))


def _print(verdict: Verdict) -> None:
    depth = "headers and values" if verdict.checked_values else "headers"
    size = f"{verdict.num_tensors} tensors, {verdict.num_bytes / 1e9:.2f} GB"
    rows = [("checked", f"{depth} of {size}")]
    rows += [("note", text) for text in verdict.notes]
    rows += [("problem", str(error)) for error in verdict.problems]
    rows.append(("verdict", _found(verdict)))
    print_rows(str(verdict.folder), rows)


def _found(verdict: Verdict) -> str:
    count = len(verdict.problems)
    return "nothing wrong" if verdict.ok else f"{count} problem{'s' if count > 1 else ''}"


def _facts(verdict: Verdict) -> dict[str, object]:
    return {
        "folder": str(verdict.folder),
        "ok": verdict.ok,
        "num_tensors": verdict.num_tensors,
        "num_bytes": verdict.num_bytes,
        "checked_values": verdict.checked_values,
        "checked_manifest": verdict.checked_manifest,
        "problems": [
            {
                "file": error.file,
                "tensor": error.tensor,
                "reason": error.reason,
                "remedy": error.remedy,
            }
            for error in verdict.problems
        ],
        "notes": list(verdict.notes),
    }
