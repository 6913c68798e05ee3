"""`write_settings`: config.json and its companions as the target reads them.

The one idea: what is understood is stated outright, under today's names, and in both RoPE dialects;
what nobody here reads is passed on untouched; what names code to run is left out.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longwing.checkpoint import new_file
from longwing.checkpoint.paths import inside
from longwing.export.facts import Facts
from longwing.export.targets import Target
from longwing.export.verdict import Form, Verdict
from longwing.models import ModelConfig
from longwing.rope import RopeConfig, frequencies

_CLASSES = {
    "falcon": "FalconForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_LEGACY_TYPES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}
_LEGACY_NAMES = ("n_head", "n_layer", "n_embed", "n_head_kv", "seq_length", "n_positions")
_REPLACED = (
    *("auto_map", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta"),
    *("original_max_position_embeddings", "dtype", "torch_dtype"),
)

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "quantize_report.json", "README.md"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
"""Files of the source that belong to the model beside its weights and settings."""


def write_settings(folder: Path, facts: Facts, verdict: Verdict) -> None:
    """config.json, quantize_config.json if packed, the card, and what is copied as it is.

    Raises:
        CheckpointError: the system refuses to write, or a file is a link out of the source.
    """
    form = verdict.form
    _write_json(folder / "config.json", export_config(facts, verdict.target, form))
    if form.quant is not None:
        _write_json(folder / "quantize_config.json", form.quant.to_hf())
    for name in COPIED:
        if os.path.lexists(facts.checkpoint.path / name):
            shutil.copyfile(inside(facts.checkpoint.path, name), folder / name)
    with open(folder / "README.md", "ab") as card:
        card.write(_card(verdict).encode())


def _card(verdict: Verdict) -> str:
    """What the model card must say beside what it said of the source."""
    target = verdict.target
    command = " ".join(("longwing export --target", target.name, *verdict.options.flags()))
    lines = [
        "\n## Exported\n",
        f"By `{command}`; {verdict.level.words} in {target.name} {target.version}, as far as its "
        "loader's code says. Anything above is of the folder it was made from.\n",
        *(f"- {finding.what}" for finding in verdict.findings),
    ]
    if verdict.form.quant is not None:
        quant = verdict.form.quant
        lines.append(f"- {quant.bits} bits in groups of {quant.group_size}")
    return "\n".join(lines) + "\n"


def export_config(facts: Facts, target: Target, form: Form) -> dict[str, Any]:
    """config.json for the target."""
    config, raw = facts.config, facts.checkpoint.config
    model_type = _LEGACY_TYPES.get(config.model_type, config.model_type)
    kept = {name: value for name, value in raw.items() if name not in _REPLACED}
    out: dict[str, Any] = {
        **kept,
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "tie_word_embeddings": facts.tied,
    }
    if config.family == "falcon":
        out = _falcon(out, raw, config)
    dtype = form.dtype or config.dtype or _stored_dtype(facts)
    # transformers reads `dtype` since version 5, and read `torch_dtype` before.
    out |= {"dtype": dtype, "torch_dtype": dtype}
    if form.rope is not None:
        out |= rope_fields(form.rope, target)
    if form.quant is not None:
        out["quantization_config"] = form.quant.to_hf()
    return out


def rope_fields(rope: RopeConfig, target: Target) -> dict[str, Any]:
    """The rotary entries, with the attention scale under the name that the target reads.

    transformers and newer vLLM read yarn's `attention_factor`; SGLang reads `attn_factor`, a
    multiple of yarn's own rule. For longrope both engines reckon the scale from the lengths, unless
    `short_mscale` and `long_mscale` say it.
    """
    fields = rope.to_hf()
    if target.name == "transformers":
        return fields
    scale = frequencies(rope, rope.max_len)[1]
    said: dict[str, float] = {}
    if rope.method == "yarn" and rope.attention_factor is not None and rope.factor is not None:
        said = {"attn_factor": scale / (0.1 * math.log(rope.factor) + 1)}
    if rope.method == "longrope":
        implied = math.sqrt(
            1 + math.log(rope.max_len / rope.trained_len) / math.log(rope.trained_len)
        )
        if not math.isclose(scale, implied, rel_tol=1e-9):
            said = {"short_mscale": scale, "long_mscale": scale}
    for dialect in ("rope_parameters", "rope_scaling"):
        if said and isinstance(fields[dialect], dict):
            fields[dialect] = {**fields[dialect], **said}
    return fields


def _falcon(out: dict[str, Any], raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Falcon's settings of 2023 under the names that stayed."""
    new_decoder = raw.get("new_decoder_architecture")
    if new_decoder is None:  # its model type said it
        new_decoder = config.model_type == "RefinedWeb"
    out = {name: value for name, value in out.items() if name not in _LEGACY_NAMES}
    multi_query = raw.get("multi_query")
    return out | {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "ffn_hidden_size": config.mlp_size,
        "max_position_embeddings": config.max_position,
        "new_decoder_architecture": new_decoder,
        "multi_query": True if multi_query is None else multi_query,
        "parallel_attn": config.parallel_block,
        "alibi": config.rope is None,
        "bias": config.qkv_bias,
        **({"num_ln_in_parallel_attn": config.num_norms} if new_decoder else {}),
    }


def _stored_dtype(facts: Facts) -> str:
    """The number type of the embedding, for a config.json that names none."""
    name = facts.inventory.dense[f"{facts.model.EMBEDDING}.weight"]
    return str(facts.checkpoint.tensors[name].dtype).removeprefix("torch.")


def _write_json(path: Path, content: object) -> None:
    with new_file(path) as stream:
        stream.write(json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")
