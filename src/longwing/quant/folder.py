"""The result of a run as a folder that loads here and in transformers, vLLM and SGLang.

Everything is gathered in a folder beside the target and renamed at the end. Weights pass through
one shard at a time.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from longwing.checkpoint import (
    Checkpoint,
    QuantConfig,
    new_folder,
    packed_names,
    packed_tensors,
    write_manifest,
    write_shards,
)
from longwing.models import Decoder
from longwing.quant.journal import Journal, LayerReport

# Files of the source that belong to the model beside its weights and settings.
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)


def write_folder(
    target: Path,
    source: Checkpoint,
    model: Decoder,
    journal: Journal,
    quant: QuantConfig,
    report: Mapping[str, Any],
    card: str,
) -> None:
    """Write the quantised model; the target appears when it is whole.

    Args:
        target: the folder to make.
        source: the dense model; all that was not quantised is taken from it as it is.
        model: the model without storage, for its names.
        journal: every block finished.
        quant: the settings to write.
        report: for quantize_report.json.
        card: for README.md.

    Raises:
        CheckpointError: the target exists, or the system refuses to write.
    """
    config = {name: value for name, value in source.config.items() if name != "auto_map"}
    block = quant.to_hf()
    with new_folder(target) as folder:
        tensors = _tensors(source, model, journal, quant.checkpoint_format)
        metadata = {"format": "pt", "quantizer": str(quant.meta.get("quantizer", ""))}
        write_shards(folder, tensors, metadata)
        _write_json(folder / "config.json", {**config, "quantization_config": block})
        _write_json(folder / "quantize_config.json", block)
        _write_json(folder / "quantize_report.json", report)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name in _COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        write_manifest(folder, {"quantization": block})


def layer_reports(journal: Journal, num_blocks: int) -> list[LayerReport]:
    """Every layer's report, in order."""
    return [report for block in range(num_blocks) for report in journal.read(block).reports]


def report_facts(reports: Sequence[LayerReport], facts: Mapping[str, object]) -> dict[str, Any]:
    """quantize_report.json: what was asked for, and what came of every layer.

    Without times: a run that was interrupted ends in the same bytes as one that was not.
    """
    layers = [asdict(report) for report in reports]
    for layer in layers:
        del layer["seconds"]
    return {"settings": dict(facts), "layers": layers}


def _tensors(
    source: Checkpoint, model: Decoder, journal: Journal, checkpoint_format: str
) -> Iterator[tuple[str, Tensor]]:
    """Everything the folder holds, one tensor after another, blocks in order."""
    in_blocks = f"{model.BLOCKS}."
    for name in source.tensors:
        if not name.startswith(in_blocks):
            yield name, source.read(name)
    for index in range(len(model.blocks)):
        packed = journal.read(index).packed
        replaced = {f"{layer}.weight" for layer in packed}
        for name in source.tensors:
            if name.startswith(f"{in_blocks}{index}.") and name not in replaced:
                yield name, source.read(name)
        for layer, weight in packed.items():
            names = packed_names(layer)
            for suffix, tensor in packed_tensors(weight, checkpoint_format).items():
                yield names[suffix], tensor


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
