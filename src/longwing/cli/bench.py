"""`longwing bench`: what a model and this machine do together, beside what the machine could do.

Loads the folder as `serve` does, in this process, and measures through the same engine. Ctrl-C ends
it; what was measured until then is printed all the same.
"""

import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from longwing.cli.ask import LONG_EXAMPLE
from longwing.cli.console import AsJson, note, print_json, print_rows, progress
from longwing.cli.options import DEFAULT_MODEL, ModelArgument, filled_by, find_model, length, size
from longwing.engine.bench import Bench
from longwing.engine.findings import BenchSpec, Findings, Loading, Measured, Quoting
from longwing.engine.footprint import Footprint, footprint
from longwing.engine.options import EngineOptions
from longwing.evals.journal import read_text
from longwing.plan import format_size
from longwing.tokenizer import Tokenizer

PARTS = ("decode", "drafts", "prefill", "quoting")
"""What can be measured, in this order."""

_QUOTED_CHARACTERS = 2400
"""Of the document that an answer is to quote: some 500 tokens."""

_BEGUN_CHARACTERS = 300
"""Of the document, whole words, that stand once more at the prompt's end: models go on quoting."""

_LITTLE_QUOTED = 0.5
"""Below this part of quotations an answer's gain says little about answers that quote."""


@filled_by(EngineOptions, "Engine")
def bench(
    *,
    model: ModelArgument = DEFAULT_MODEL,
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Sequences decoding at once, e.g. 1,4,16.")
    ] = "1",
    context: Annotated[
        str,
        typer.Option("--context", "-c", help="Tokens behind each of them, e.g. 1k,24k (k = 1024)."),
    ] = "1k",
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Prompts to read, in tokens, e.g. 2k,24000.")
    ] = "1k",
    drafts: Annotated[
        str,
        typer.Option(help="Guessed tokens checked in a step, at the first batch and context."),
    ] = "1,3,7,15",
    only: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}.")] = ",".join(PARTS),
    quote: Annotated[
        Path | None,
        typer.Option(
            help="A text that an answer repeats, for the gain by prompt lookup; its first "
            f"{_QUOTED_CHARACTERS:,} characters are used. Without it: a page on a database.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(min=1, help="Steps of a measurement; a quoting answer has four times these."),
    ] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements; their median counts.")] = 5,
    read: Annotated[
        bool,
        typer.Option(
            "--read",
            help="Really read the contexts. Without it their pages are filled with random keys and "
            "values, which takes a step as long and spares minutes.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="Activations and dense weights; auto: as `serve` does."),
    ] = "auto",
    rope: Annotated[str | None, typer.Option(help="RoPE settings in place of the model's.")] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory",
            "--gpu-memory",
            parser=size,
            metavar="SIZE",
            help="Most the engine may use, e.g. 24GiB. On a GPU the limit is hard.",
        ),
    ] = None,
    as_json: AsJson = False,
    engine: EngineOptions,
) -> None:
    """Measure decoding, reading, loading and what drafts gain; print it beside the floors.

    A floor is the time that the bytes to be read take at the memory's measured rate, or of a prompt
    the multiplications at the rate of large matrix products. Ctrl-C prints what is done so far.

    Examples:
      longwing bench models/falcon-40b-4bit --batch 1,16 --context 1k,24k --prompt 24000
      longwing bench models/falcon-40b-4bit --gpu-memory 24GiB --kv-dtype int8 --context 24k
      longwing bench --only decode --batch 1,8 --context 512 --json
    """
    parts = _words(only, PARTS)
    spec = BenchSpec(
        decodes="decode" in parts,
        batches=_counts("--batch", batch),
        contexts=tuple(map(length, _words(context))),
        prompts=tuple(map(length, _words(prompt))) if "prefill" in parts else (),
        drafts=_counts("--drafts", drafts) if "drafts" in parts else (),
        tokens=tokens,
        repeats=repeats,
        reads=read,
    )
    folder = find_model(model)
    quoted = _quoted(folder, quote) if "quoting" in parts else []
    options = replace(
        engine,
        device=device,
        dtype=dtype,
        rope=rope,
        memory=memory,
        context=len(quoted) + 4 * tokens or None,
    )
    with progress(f"loading {folder.name}", in_bytes=True) as advance:
        loaded = Bench.load(folder, options, spec, progress=advance)
    findings = Findings()
    with _telling(loaded, findings, as_json):
        _measure(loaded, findings, quoted, 4 * tokens)


def _measure(loaded: Bench, findings: Findings, quoted: list[int], max_new: int) -> None:
    """Fill in the findings, one by one."""
    calls = loaded.measurements()
    total = len(calls) + bool(quoted)
    with progress("measuring") as advance:
        for done, call in enumerate(calls, start=1):
            findings.lines.append(call())
            advance(done, total)
        if quoted:
            findings.quoting = loaded.quoting(quoted, max_new)
            advance(total, total)
    findings.complete = True


@contextmanager
def _telling(loaded: Bench, findings: Findings, as_json: bool) -> Iterator[None]:
    """Print the findings at the end, also after Ctrl-C or an error."""
    try:
        yield
    finally:
        findings.memory = footprint(loaded.engine.model.device)
        if as_json:
            print_json(_facts(loaded, findings))
        else:
            _show(loaded, findings)
        loaded.engine.close()


def _facts(loaded: Bench, findings: Findings) -> dict[str, object]:
    """Everything, for --json."""
    info, loading = loaded.info, loaded.loading
    return {
        "longwing": version("longwing"),
        "torch": torch.__version__,
        "complete": findings.complete,
        "engine": asdict(info),
        "ceilings": asdict(loaded.ceilings),
        "loading": None if loading is None else asdict(loading),
        "memory": None if findings.memory is None else asdict(findings.memory),
        "planned_bytes": loaded.planned_bytes,
        "measured": [{**asdict(line), "of_ceiling": line.of_ceiling} for line in findings.lines],
        "quoting": None
        if findings.quoting is None
        else {**asdict(findings.quoting), "gain": findings.quoting.gain},
    }


def _show(loaded: Bench, findings: Findings) -> None:
    """The tables, for people."""
    info, ceilings, loading = loaded.info, loaded.ceilings, loaded.loading
    rows = [
        ("device", f"{info.ranks} x {info.device} {info.device_name}".strip().removeprefix("1 x ")),
        (
            "ceilings",
            f"{ceilings.bytes_per_s / 1e9:,.1f} GB/s, {ceilings.flops_per_s / 1e12:,.2f} TFLOP/s, "
            "measured",
        ),
        ("weights", f"{format_size(info.weight_bytes)}, {info.quantization}, {info.dtype}"),
        (
            "KV cache",
            f"{format_size(info.kv_bytes)}, {info.num_pages * info.page_len:,} tokens in "
            f"{info.kv_dtype}",
        ),
    ]
    if loading is not None:
        rows.append(("loading", _loading(loading)))
    if findings.memory is not None:
        rows.append(("peak memory", _memory(findings.memory)))
    if info.device != "cpu" and loaded.planned_bytes is not None:
        rows.append(("planned", format_size(loaded.planned_bytes)))
    print_rows(info.name, rows)
    if findings.lines:
        print_rows("", [_HEADER, *map(_line, findings.lines)])
    if findings.quoting is not None:
        print_rows("", [("quoting", _quoting(findings.quoting))])
    if not findings.complete:
        note("interrupted; this is what was measured until then")


_HEADER = ("", "batch", "tokens", "drafts", "ms", "from - to", "tokens/s", "floor ms", "of ceiling")


def _line(line: Measured) -> tuple[str, ...]:
    if line.ms is None or line.tokens_per_s is None:
        return (line.what, str(line.batch), f"{line.context:,}", str(line.drafts), line.note)
    return (
        line.what,
        str(line.batch),
        f"{line.context:,}",
        str(line.drafts),
        f"{line.ms:,.2f}",
        f"{line.ms_low:,.2f} - {line.ms_high:,.2f}",
        f"{line.tokens_per_s:,.1f}",
        "" if line.floor_ms is None else f"{line.floor_ms:,.2f}",
        "" if line.of_ceiling is None else f"{line.of_ceiling:.0%}",
    )


def _loading(loading: Loading) -> str:
    rate = loading.stored_bytes / loading.seconds / 1e9
    return (
        f"{loading.seconds:.1f} s for {format_size(loading.stored_bytes)} ({rate:.2f} GB/s), "
        f"then {loading.warm_up_s:.1f} s to warm up"
    )


def _memory(memory: Footprint) -> str:
    host = f"{format_size(memory.host_peak)} on the host"
    if memory.device_peak is None or memory.allocated_peak is None:
        return host
    return (
        f"{format_size(memory.device_peak)} on the device "
        f"({format_size(memory.allocated_peak)} in tensors), {host}"
    )


def _quoting(quoting: Quoting) -> str:
    words = (
        f"{quoting.tokens_per_s:,.1f} tokens/s with drafts, {quoting.plain_tokens_per_s:,.1f} "
        f"without: {quoting.gain:.2f} times; {quoting.num_accepted} of {quoting.num_drafted} "
        f"drafts right, {quoting.quoted:.0%} of {quoting.num_tokens} tokens quoted"
    )
    if quoting.quoted < _LITTLE_QUOTED:
        words += "; the answer hardly quotes, so this says little about one that does"
    return words


def _quoted(folder: Path, quote: Path | None) -> list[int]:
    """The tokens of a document and, once more, its beginning. No chat: any model goes on."""
    example = lzma.decompress(LONG_EXAMPLE.read_bytes()).decode()
    text = (example if quote is None else read_text(quote))[:_QUOTED_CHARACTERS].rstrip()
    begun = text[:_BEGUN_CHARACTERS].rpartition(" ")[0]
    return Tokenizer.from_folder(folder).encode(f"{text}\n\n{begun}")


def _words(text: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise typer.BadParameter(f'"{text}" is an empty list')
    for word in words:
        if known and word not in known:
            raise typer.BadParameter(f'"{word}" is not one of {", ".join(known)}')
    return words


def _counts(option: str, text: str) -> tuple[int, ...]:
    words = _words(text)
    for word in words:
        if not word.isdecimal() or not int(word):
            raise typer.BadParameter(f'"{word}" in {option} is not a whole number above 0')
    return tuple(map(int, words))
