"""`longwing plan`: what a model needs in memory, and how much context fits."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.checkpoint import QuantConfig, read_settings
from longwing.cli.console import AsJson, print_json, print_rows
from longwing.cli.options import find_model, length, size
from longwing.errors import ConfigError
from longwing.models import ModelConfig
from longwing.plan import BANDWIDTH, KNOWN, KV_FORMATS, decode_bound, explain, known_config
from longwing.plan import plan as plan_model


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
        str, typer.Option(help="Dense weights and activations: bfloat16, float16 or float32.")
    ] = "bfloat16",
    kv_dtype: Annotated[
        str | None, typer.Option(help=f"The cache: {', '.join(KV_FORMATS)}. Without it: dtype.")
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
    config, quant = _settings(model)
    if bits is None and quant is not None:
        bits, group_size = quant.bits, quant.group_size if group_size is None else group_size
    planned = plan_model(
        config,
        context=config.context if context is None else length(context),
        batch=batch,
        bits=bits,
        group_size=128 if group_size is None else group_size,
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
    if planned.fits is False:
        raise typer.Exit(1)


def _settings(model: str) -> tuple[ModelConfig, QuantConfig | None]:
    """A model's shape and, if its folder says so, how it is quantised; weights are not needed."""
    if model.lower() in KNOWN:
        return known_config(model), None
    path = Path(model).expanduser()
    if path.is_file():
        folder, name = path.parent, path.name
    else:
        folder, name = find_model(model), "config.json"
    if not name.endswith(".json"):
        raise ConfigError("is not a config.json", file=str(path), remedy="give one, or a folder")
    raw = read_settings(folder, name)
    return ModelConfig.from_hf(raw, file=name), QuantConfig.from_folder(folder, raw, {}, {})
