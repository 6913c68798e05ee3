"""`longwing export`: whether a model folder loads in another engine, and a folder that does."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, print_json, print_rows, progress
from longwing.cli.options import find_model, length, one_of
from longwing.errors import RequestError
from longwing.export import (
    TARGETS,
    ExportOptions,
    ExportReport,
    Verdict,
    export_model,
    judge,
    read_facts,
    require_loads,
)
from longwing.export.verdict import DTYPES, FORMATS


def export(
    model: Annotated[
        str, typer.Argument(help="A model folder, or owner/name once pulled.", metavar="MODEL")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to make; none with --check.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(help=f"The engine: {', '.join(TARGETS)}.", callback=one_of(TARGETS)),
    ] = "vllm",
    repack: Annotated[
        bool,
        typer.Option(
            "--repack",
            help="Widen 2 and 3 bits to 4, asymmetric weights to symmetric ones, cut groups into "
            "sizes there are kernels for. Every value stays the same; the folder grows.",
        ),
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Write dense 16-bit weights instead of packed ones."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"With --dequantize: {', '.join(DTYPES)}. Without it: the model's own.",
            callback=one_of(DTYPES),
        ),
    ] = None,
    bake: Annotated[
        str | None,
        typer.Option(
            help="Write the RoPE base for this length, e.g. 24k, as a plain rope_theta: for "
            "engines that have no dynamic NTK."
        ),
    ] = None,
    checkpoint_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Zero points stored minus one (gptq) or as they are (gptq_v2). Without it: what "
            "the engine reads.",
            callback=one_of(FORMATS),
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what will happen; write nothing.")
    ] = False,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy unchanged files instead of sharing them by hard links."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model folder for vLLM, SGLang or transformers, if it will load there.

    Says first what will load and what will not, and names the nearest form that does. Exit code 1
    when it does not load.

    Examples:
      longwing export falcon-4bit --target vllm --check
      longwing export falcon-3bit falcon-vllm --target vllm --repack --bake 24k
    """
    if folder is None and not check:
        raise typer.BadParameter("give the folder to make, or --check")
    try:
        options = ExportOptions(
            repack=repack,
            dequantize=dequantize,
            dtype=dtype,
            bake=None if bake is None else length(bake),
            checkpoint_format=checkpoint_format,
        )
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    source = find_model(model)
    if check or folder is None:
        with progress("looking") as advance:
            verdict = judge(read_facts(source, advance), TARGETS[target], options)
        if as_json:
            print_json(_facts(verdict))
        else:
            _print(source, verdict)
        require_loads(verdict, source)
        return
    with progress("exporting", in_bytes=True) as advance:
        report = export_model(
            source,
            folder,
            target=target,
            options=options,
            overwrite=force,
            link=not copy,
            progress=advance,
        )
    _report(folder, report, as_json)


def _report(folder: Path, report: ExportReport, as_json: bool) -> None:
    if as_json:
        written = {
            "folder": str(folder),
            "num_tensors": report.num_tensors,
            "num_bytes": report.num_bytes,
            "linked_bytes": report.linked_bytes,
        }
        print_json({**_facts(report.verdict), **written})
        return
    _print(folder, report.verdict)
    shared = f", {report.linked_bytes / 1e9:.2f} GB shared with the source"
    size = f"{report.num_tensors} tensors, {report.num_bytes / 1e9:.2f} GB"
    print_rows("", [("wrote", size + (shared if report.linked_bytes else ""))])


def _print(folder: Path, verdict: Verdict) -> None:
    target = verdict.target
    rows = [(finding.level.words, finding.what) for finding in verdict.findings]
    rows.append(("verdict", f"{verdict.level.words} in {target.name} {target.version}"))
    if verdict.nearest is not None:
        rows.append(("nearest", f"loads with {' '.join(verdict.nearest.flags())}"))
    print_rows(str(folder), rows)


def _facts(verdict: Verdict) -> dict[str, object]:
    near = verdict.nearest
    return {
        "target": verdict.target.name,
        "target_version": verdict.target.version,
        "verdict": verdict.level.words,
        "loads": verdict.loads,
        "options": list(verdict.options.flags()),
        "findings": [
            {"level": finding.level.words, "what": finding.what} for finding in verdict.findings
        ],
        "nearest": None if near is None else list(near.flags()),
    }
