"""`longwing inspect`: what a model folder is."""

from pathlib import Path
from typing import Annotated

import typer

from longwing.checkpoint import Checkpoint
from longwing.cli.console import AsJson, print_json, print_rows
from longwing.cli.options import DEFAULT_MODEL, ModelArgument, find_model, length
from longwing.errors import TokenizerError
from longwing.models import ModelConfig, empty_model
from longwing.plan.weights import num_parameters
from longwing.rope import explain, ladder
from longwing.tokenizer import Tokenizer


def inspect(
    model: ModelArgument = DEFAULT_MODEL,
    context: Annotated[
        str | None, typer.Option(help="Show the RoPE ladder for this context, e.g. 24k.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model is: its shape, quantisation, RoPE settings and ladder, and tokenizer."""
    folder = find_model(model)
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    served = config.context if context is None else length(context)
    facts = _facts(folder, checkpoint, config, served)
    if tensors:
        facts["tensors"] = {
            name: {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape)}
            for name, info in checkpoint.tensors.items()
        }
    if as_json:
        print_json(facts)
        return
    rows = [
        (name.replace("_", " "), _say(value)) for name, value in facts.items() if name != "tensors"
    ]
    print_rows(str(folder), rows)
    if config.rope is not None:
        print_rows(f"\nRoPE at {served} tokens", explain(config.rope, served))
    if tensors:
        print_rows(
            "\ntensors",
            [
                (name, str(info.dtype).removeprefix("torch."), str(list(info.shape)))
                for name, info in checkpoint.tensors.items()
            ],
        )


def _facts(
    folder: Path, checkpoint: Checkpoint, config: ModelConfig, context: int
) -> dict[str, object]:
    quant = checkpoint.quant
    facts: dict[str, object] = {
        "model_type": config.model_type,
        "parameters": num_parameters(empty_model(config)),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp_size": config.mlp_size,
        "vocabulary": config.vocab_size,
        "block": "parallel" if config.parallel_block else "sequential",
        "positions": f"RoPE {config.rope.method}" if config.rope else "ALiBi",
        "trained_context": config.rope.trained_len if config.rope else config.max_position,
        "context": config.context,
        "rope_ladder": list(ladder(config.rope, context)) if config.rope else [],
        "sliding_window": max((size for size in config.windows if size), default=None),
        "tied_embeddings": config.tie_embeddings,
        "dtype": config.dtype or None,
        "quantization": None,
        "kv_bytes_per_token_16_bit": config.kv_bytes_per_token(2),
        "weight_bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "unknown_config_fields": list(config.unknown),
    }
    if quant is not None:
        facts["quantization"] = {
            "method": quant.checkpoint_format,
            "bits": quant.bits,
            "group_size": quant.group_size,
            "symmetric": quant.sym,
            "act_order": quant.desc_act,
        }
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except TokenizerError as error:
        facts["tokenizer"] = {"problem": str(error)}
    else:
        facts["tokenizer"] = {
            "tokens": tokenizer.vocab_size,
            "ends_answers": [tokenizer.token(end) for end in sorted(tokenizer.eos_ids)],
            "chat_template": tokenizer.has_chat_template,
        }
    return facts


def _say(value: object) -> str:
    """A value of `_facts` for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_say(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_say, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
