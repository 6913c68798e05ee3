"""`longwing plan`: what a model needs in memory, what fits, and how many GPUs a load takes."""

from pathlib import Path
from typing import Annotated, TypedDict

import typer

from longwing.checkpoint import Checkpoint, QuantConfig, read_settings
from longwing.cli.console import AsJson, print_json, print_rows
from longwing.cli.options import find_model, length, one_of, size
from longwing.engine.options import KV_DTYPES
from longwing.errors import ConfigError, RequestError
from longwing.models import DTYPES, ModelConfig
from longwing.plan import (
    BANDWIDTH,
    CARDS,
    KNOWN,
    KV_FORMATS,
    Load,
    decode_bound,
    explain,
    explain_fleet,
    format_size,
    known_config,
    plan_fleet,
    require_carried,
    require_fit,
)
from longwing.plan import plan as plan_model

_FLEET = "A fleet, with --rate"
_SERVED = ", ".join(name for name in KV_FORMATS if name in KV_DTYPES)
_NOT_SERVED = ", ".join(name for name in KV_FORMATS if name not in KV_DTYPES)


class _Form(TypedDict):
    """What weights and cache are held as: the arguments that both kinds of plan take."""

    quant: QuantConfig | None
    bits: int | None
    group_size: int
    dtype: str
    kv_dtype: str | None
    name: str


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
            help=f"The cache: {_SERVED}; or, for planning only, not served: "
            f"{_NOT_SERVED}. Without it: dtype.",
            callback=one_of(KV_FORMATS),
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory there is, e.g. 24GiB (2**30) or 24GB (10**9).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences held at once.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"The card, for its memory and, with --rate, its speed: {', '.join(CARDS)}.",
            callback=one_of(CARDS),
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that share the weights and the cache.")
    ] = 1,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second: plan a fleet for them.", rich_help_panel=_FLEET),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Engines there are. Without it: as many as the load takes.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    prompt_len: Annotated[
        str | None,
        typer.Option(help="Tokens of each prompt. Default 24000.", rich_help_panel=_FLEET),
    ] = None,
    answer_len: Annotated[
        str | None,
        typer.Option(help="Tokens of each answer. Default 200.", rich_help_panel=_FLEET),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of a prompt's tokens, those found in the prefix cache: 0 (default) to below 1.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Different shared beginnings in use at once. Without it: every running sequence "
            "keeps its own.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model takes and whether it fits, before anything is downloaded or loaded.

    With --rate: how many GPUs a load takes, how long its first tokens wait, and what is the
    bottleneck, from measured speeds. Exit code 1 when something does not fit.

    Examples:
      longwing plan falcon-40b --context 24k --bits 4 --group-size 128 --gpu-memory 24GiB
      longwing plan ./config.json --context 8k --kv-dtype int8
      longwing plan falcon-40b --bits 4 --gpu H200 --rate 1000 --prompt-len 24000 --share 0.9
    """
    config, found = _settings(model)
    asked = _asked(bits, group_size, found)
    form = _Form(
        quant=found if asked is None else None,
        bits=None if asked is None else asked.bits,
        group_size=-1 if asked is None else asked.group_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        name=model,
    )
    if rate is not None:
        if gpu is None:
            raise typer.BadParameter("--rate needs --gpu: whose speed is to be reckoned with?")
        if gpu_memory is not None or context is not None or batch != 1:
            raise typer.BadParameter(
                "--rate says itself how much is held at once: leave out --gpu-memory, --context "
                "and --batch"
            )
        try:
            load = Load(
                rate=rate,
                prompt_len=length(prompt_len or "24000"),
                answer_len=length(answer_len or "200"),
                share=share or 0.0,
                documents=documents,
            )
        except RequestError as error:
            raise typer.BadParameter(str(error)) from error
        fleet = plan_fleet(
            config, load, CARDS[gpu], tensor_parallel=tensor_parallel, replicas=replicas, **form
        )
        if as_json:
            print_json(fleet.to_json())
        else:
            print_rows(model, explain_fleet(fleet))
        require_carried(fleet)
        return
    fleet_only = {
        "--replicas": replicas,
        "--prompt-len": prompt_len,
        "--answer-len": answer_len,
        "--share": share,
        "--documents": documents,
    }
    for flag, value in fleet_only.items():
        if value is not None:
            raise typer.BadParameter(f"{flag} needs --rate: how many requests a second?")
    memory = size(gpu_memory) if gpu_memory is not None else CARDS[gpu].memory if gpu else None
    planned = plan_model(
        config,
        context=config.context if context is None else length(context),
        batch=batch,
        memory=None if memory is None else memory * tensor_parallel,
        **form,
    )
    bounds = {card: round(decode_bound(planned, rate), 1) for card, rate in BANDWIDTH.items()}
    if as_json:
        print_json({**planned.to_json(), "decode_bound_tokens_per_s": bounds})
    else:
        rows = explain(planned)
        if tensor_parallel > 1:
            each = format_size(planned.weights.total // tensor_parallel)
            rows.append(("split", f"over {tensor_parallel} GPUs", f"{each} of weights on each"))
        print_rows(model, rows)
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
