"""`longwing plan`: what a model needs in memory, and how much context fits."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.checkpoint import Checkpoint, QuantConfig, read_settings
from longwing.cli.console import AsJson, print_json, print_rows
from longwing.cli.options import find_model, length, one_of, size
from longwing.errors import ConfigError
from longwing.models import DTYPES, ModelConfig
from longwing.plan import (
    BANDWIDTH,
    KNOWN,
    KV_FORMATS,
    decode_bound,
    explain,
    known_config,
    require_fit,
)
from longwing.plan import plan as plan_model

_NOT_SERVED = ", ".join(name for name in KV_FORMATS if name not in DTYPES)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help=f"A model folder, a config.json, owner/name once pulled, or {', '.join(KNOWN)}."
        ),
    ],
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            "-c",
            help="Tokens of prompt and answer together: 24k is 24 * 1024 = 24,576; 24000 is exact. "
            "Without it: what the model claims.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="2, 3, 4 or 8: GPTQ. Without it: as the folder is, else dense."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale; -1: a whole column. Default 128."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Dense weights and activations: {', '.join(DTYPES)}.", callback=one_of(DTYPES)
        ),
    ] = "bfloat16",
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"The cache: {', '.join(DTYPES)}; or, for planning only, not served yet: "
            f"{_NOT_SERVED}. Without it: dtype.",
            callback=one_of(KV_FORMATS),
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory there is, e.g. 24GiB (2**30) or 24GB (10**9).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences held at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a model takes and whether it fits, before anything is downloaded or loaded.

    Exit code 1 when it does not fit into --gpu-memory.

    Examples:
      longwing plan falcon-40b --context 24k --bits 4 --group-size 128 --gpu-memory 24GiB
      longwing plan ./config.json --context 8k --kv-dtype int8
    """
    config, found = _settings(model)
    asked = _asked(bits, group_size, found)
    planned = plan_model(
        config,
        context=config.context if context is None else length(context),
        batch=batch,
        quant=found if asked is None else None,
        bits=None if asked is None else asked.bits,
        group_size=-1 if asked is None else asked.group_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        memory=None if gpu_memory is None else size(gpu_memory),
        name=model,
    )
    bounds = {card: round(decode_bound(planned, rate), 1) for card, rate in BANDWIDTH.items()}
    if as_json:
        print_json({**planned.to_json(), "decode_bound_tokens_per_s": bounds})
    else:
        print_rows(model, explain(planned))
        rates = ", ".join(f"{card} {rate:,.0f}" for card, rate in bounds.items())
        print_rows("\nno engine decodes faster than", [("tokens/s", rates)])
    require_fit(planned)


def _asked(
    bits: int | None, group_size: int | None, found: QuantConfig | None
) -> QuantConfig | None:
    """The quantisation that the options ask for; None to plan the folder as it is."""
    if bits is None and group_size is None:
        return None
    if bits is None:
        if found is None:
            raise typer.BadParameter("--group-size needs --bits: these weights are dense")
        bits = found.bits
    try:
        return QuantConfig(bits=bits, group_size=128 if group_size is None else group_size)
    except ConfigError as error:
        raise typer.BadParameter(error.reason) from error


def _settings(model: str) -> tuple[ModelConfig, QuantConfig | None]:
    """A model's shape and how it is quantised; headers are read if they are there."""
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".json":
            raise ConfigError("is not a config.json", file=model, remedy="give one, or a folder")
        return _from_settings(path.parent, path.name)
    if not path.exists() and model.lower() in KNOWN:
        return known_config(model), None
    folder = find_model(model)
    if not any(folder.glob("*.safetensors")):
        return _from_settings(folder, "config.json")
    # Some folders say only in their weights' headers that they are quantised.
    checkpoint = Checkpoint.open(folder)
    return ModelConfig.from_hf(checkpoint.config), checkpoint.quant


def _from_settings(folder: Path, name: str) -> tuple[ModelConfig, QuantConfig | None]:
    raw = read_settings(folder, name)
    return ModelConfig.from_hf(raw, file=name), QuantConfig.from_folder(folder, raw, {}, {})
