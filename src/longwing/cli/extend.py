"""`longwing extend`: a model folder under RoPE settings that reach a longer context."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, print_json, print_rows
from longwing.cli.options import find_model, length
from longwing.plan import format_size
from longwing.rope import METHODS, explain
from longwing.tune import Extended
from longwing.tune import extend as extend_folder


def extend(
    model: Annotated[str, typer.Argument(help="The model: a folder, or owner/name.")],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="The folder to make; without it, only explain."),
    ] = None,
    context: Annotated[
        str, typer.Option("--context", "-c", help="Context to reach, e.g. 24k or 24000.")
    ] = ...,  # type: ignore[assignment]  # typer's sign for an option that must be given
    method: Annotated[
        str,
        typer.Option(
            help=f"METHOD[,name=value…] of {', '.join(METHODS)}; or theta=1e6. Without it: the "
            "model's own method. A factor that is left out follows from the lengths."
        ),
    ] = "",
    bake: Annotated[
        bool,
        typer.Option(
            "--bake", help="Write the method's base at this context as a plain rope_theta."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write RoPE settings for a longer context into a copy of a model; weights are hard links.

    Nothing is trained. What each number means, and what to expect, is printed.

    Examples:
      longwing extend models/llama llama-32k --context 32k --method yarn
      longwing extend models/falcon-7b --context 8k --method dynamic
      longwing extend models/falcon-7b falcon-8k --context 8k --method dynamic --bake
    """
    folder = find_model(model)
    done = extend_folder(folder, target, length(context), method, bake=bake, overwrite=overwrite)
    if as_json:
        print_json(_facts(done))
    else:
        _print(done)


def _print(done: Extended) -> None:
    title = f"{done.after.method} for {done.context:,} tokens"
    rows = explain(done.after, max(done.context, done.after.max_len))
    before = done.before
    rows.insert(
        0, ("before", f"{before.method}, theta {before.theta:,.10g}, {before.max_len:,} tokens")
    )
    cache = done.config.kv_bytes_per_token(2) * done.context
    rows.append(("cache", f"{format_size(cache)} for one sequence of {done.context:,} in 16 bits"))
    rows.append(("expect", done.expect))
    rows.append(("measure", "longwing eval passkey, or topics, or lines: it tells for this model"))
    if done.folder is None:
        rows.append(("written", "nothing; give OUT to write a folder"))
    else:
        how = "hard links to" if done.linked else "a copy of"
        rows.append(("written", f"{done.folder}; weights are {how} the model's"))
    print_rows(title, rows)


def _facts(done: Extended) -> dict[str, object]:
    return {
        "folder": None if done.folder is None else str(done.folder),
        "context": done.context,
        "before": done.before.to_hf(),
        "after": done.after.to_hf(),
        "linked": done.linked,
        "expect": done.expect,
        "kv_bytes_per_token": done.config.kv_bytes_per_token(2),
    }
