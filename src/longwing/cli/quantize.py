"""`longwing quantize`: a dense model folder to a GPTQ folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from longwing.cli.console import AsJson, note, print_json, print_rows, progress_by_part
from longwing.cli.options import filled_by, find_model, one_of, size
from longwing.cli.spread import assembled, cluster_variables
from longwing.cluster.calibration import SpreadSamples
from longwing.cluster.options import SpreadOptions
from longwing.models import DTYPES, find_device
from longwing.plan import format_size
from longwing.quant.calibration import Calibration, make_calibration
from longwing.quant.estimate import Estimate, estimate
from longwing.quant.quantize import FORMATS, Quantized, check_source
from longwing.quant.quantize import quantize as quantize_folder
from longwing.quant.samples import Samples
from longwing.quant.spec import QuantSpec
from longwing.tokenizer import Tokenizer


@filled_by(SpreadOptions, "Cluster", variables=cluster_variables)
@filled_by(QuantSpec, "Method")
def quantize(
    *,
    model: Annotated[str, typer.Argument(help="The dense model: a folder, or owner/name.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    spec: QuantSpec,
    spread: SpreadOptions,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help='Calibration text: .txt, .jsonl or .parquet (field "text"; a line of .jsonl may '
            'carry token ids instead, "input_ids"); repeatable. '
            "Without it: the text that ships with longwing.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 2048,
    long_samples: Annotated[
        int, typer.Option(min=0, help="Further samples from within long documents.")
    ] = 0,
    long_seqlen: Annotated[int, typer.Option(min=0, help="Tokens of a long sample.")] = 0,
    seed: Annotated[int, typer.Option(help="Chooses samples among more text than is needed.")] = 0,
    checkpoint_format: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"{', '.join(FORMATS)}; auto: gptq if symmetric.",
            callback=one_of(FORMATS),
        ),
    ] = "auto",
    true_sequential: Annotated[
        bool, typer.Option(help="Feed each stage of a block by the quantised ones before it.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Computing: {', '.join(DTYPES)}; auto: float32 on a CPU.",
            callback=one_of(("auto", *DTYPES)),
        ),
    ] = "auto",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Use no more of the GPU than this, e.g. 24GiB.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted run has done.")
    ] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take, and do nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a dense model into a GPTQ folder that loads here, in transformers, vLLM and SGLang.

    One block is in memory at a time. Interrupt it as you like: the same command goes on where it
    stopped, and ends in the same bytes. With --ray the calibration samples are spread over workers.

    Examples:
      longwing quantize models/falcon-7b falcon-7b-4bit --bits 4 --group-size 64
      longwing quantize models/llama out --bits 3 --data my_texts.jsonl --plan
    """
    folder = find_model(model)
    where = find_device(device)
    kind = _dtype(dtype, where)
    _, config = check_source(folder, spec)
    facts = estimate(
        config, spec, num_samples=samples, seqlen=max(seqlen, long_seqlen), device=where, dtype=kind
    )
    if only_plan and as_json:
        print_json(vars(facts))
        return
    rows = _estimate_rows(facts, where)
    if only_plan:
        print_rows(f"quantising {folder.name} to {spec.bits} bits", rows)
        return
    for label, value in rows:
        note(f"{label}: {value}")
    calibration = None
    if spec.method != "rtn":
        calibration = make_calibration(
            Tokenizer.from_folder(folder),
            data or (),
            num_samples=samples,
            seqlen=seqlen,
            num_long=long_samples,
            long_seqlen=long_seqlen,
            seed=seed,
        )
    shared = _spread(spread, folder, calibration, spec, where, kind, gpu_memory)
    with shared as held, progress_by_part() as tell:
        done = quantize_folder(
            folder,
            target,
            spec,
            calibration,
            checkpoint_format=checkpoint_format,
            true_sequential=true_sequential,
            device=where,
            dtype=kind,
            memory=None if gpu_memory is None else size(gpu_memory),
            samples=held,
            restart=restart,
            progress=tell,
        )
    if as_json:
        print_json(_facts(done))
    else:
        _print(done)


@contextmanager
def _spread(
    spread: SpreadOptions,
    folder: Path,
    calibration: Calibration | None,
    spec: QuantSpec,
    device: torch.device,
    dtype: torch.dtype,
    gpu_memory: str | None,
) -> Iterator[Samples | None]:
    """The samples in the workers of a cluster; None where they stay in this process."""
    if not spread.ray or calibration is None:
        yield None
        return
    with assembled(spread, device.type) as crew:
        yield SpreadSamples(
            crew.hire,
            crew.size.num,
            folder.absolute(),
            calibration,
            spec,
            device=device.type,
            dtype=next(name for name, known in DTYPES.items() if known == dtype),
            memory=None if gpu_memory is None else size(gpu_memory),
        )


def _estimate_rows(facts: Estimate, device: torch.device) -> list[tuple[str, str]]:
    """An estimate for people."""
    time = "a minute or so" if facts.seconds is None else _duration(facts.seconds)
    return [
        (f"{device.type} memory at the peak", format_size(facts.device_bytes)),
        ("samples between blocks", f"{format_size(facts.sample_bytes)} more, there or on the host"),
        ("disk while it runs", format_size(facts.disk_bytes)),
        ("time, if nothing else runs", time),
    ]


def _print(done: Quantized) -> None:
    """Every layer, then the sum of it."""
    rows = [
        (
            report.name,
            "" if report.error is None else f"error {report.error:.2e}",
            f"damping {report.damp_percent:g}, {report.seconds:.1f} s",
            "; ".join(report.notes),
        )
        for report in done.reports
    ]
    print_rows("layers", rows)
    if done.num_resumed:
        note(f"{done.num_resumed} blocks were on record from an earlier run")
    print_rows(
        "\nwritten", [("folder", str(done.folder)), ("format", done.quant.checkpoint_format)]
    )


def _facts(done: Quantized) -> dict[str, object]:
    return {
        "folder": str(done.folder),
        "quantization": done.quant.to_hf(),
        "num_resumed": done.num_resumed,
        "layers": [asdict(report) for report in done.reports],
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[asked]
