"""One GGUF file into one Hugging Face folder: config.json, safetensors, tokenizer, all or nothing.

Holds the order of work, the writing, and the refusal of other formats. What the file says is
`gguf_file.py`; what it means, `llama.py` and `tokenizer.py`; how a folder appears whole or not at
all, `longwing.checkpoint`. Everything that can be refused is refused before the first byte is
written, except numbers that are not finite, which only reading finds.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from longwing.checkpoint import new_file, new_folder, write_manifest, write_tensor_file
from longwing.convert.gguf_file import GgufFile
from longwing.convert.gguf_header import refusal, show
from longwing.convert.llama import Plan, Weight, plan_model, restore_rows
from longwing.convert.tokenizer import RebuiltTokenizer, rebuild_tokenizer
from longwing.errors import ConvertError

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

Progress = Callable[[int, int], None]
"""Called with the bytes of weights done and in all."""

SHARD_BYTES = 5 * 10**9
"""The most one weight file holds, and so the most memory a conversion takes, about."""

_EXACT = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was converted.

    Attributes:
        architecture: GGUF's name for the model's architecture, e.g. "llama".
        num_tensors: tensors written.
        num_bytes: bytes of weights written.
        notes: what the user should know about this folder, a sentence each.
    """

    architecture: str
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...]


def convert_gguf(
    source: Path,
    target: Path,
    *,
    dtype: str = "float16",
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Convert a GGUF model of the Llama family into a Hugging Face folder.

    Quantised tensors are written as the plain numbers they stand for, rounded to `dtype`; the rows
    that llama.cpp reorders are put back. Takes memory for one shard, and disk for the folder.

    Args:
        source: the .gguf file.
        target: the folder to make; its parent must exist.
        dtype: number type of the weights, one of DTYPES. GGUF's scales are float16, so float16
            rounds less than bfloat16 does; a value beyond 65,504 is refused.
        progress: called after every tensor.
        overwrite: replace `target` if it is a model folder.

    Raises:
        ConvertError: the file is not acceptable (file, field or tensor, and reason are named), or
            the disk has too little room. Nothing is left behind.
        CheckpointError: `target` exists or cannot be written; it is as it was.
    """
    if dtype not in DTYPES:
        raise ConvertError(f"dtype is {dtype!r}; {', '.join(DTYPES)} are supported")
    _check_format(source)
    with GgufFile(source) as file:
        plan = plan_model(file)
        tokenizer = rebuild_tokenizer(file)
        if tokenizer.num_tokens > plan.vocab_size:
            reason = f"has {tokenizer.num_tokens} tokens for {plan.vocab_size} rows"
            raise file.refusal(reason, part="token_embd.weight")
        notes = (*_notes(file, plan), *tokenizer.notes)
        number_type = DTYPES[dtype]
        total = sum(_num_bytes(weight, number_type) for weight in plan.weights)
        with new_folder(target, overwrite=overwrite) as folder:
            _check_room(folder, total, source)
            _write_settings(folder, plan, tokenizer, dtype)
            _write_weights(folder, file, plan.weights, number_type, progress or _silent)
            write_manifest(folder, {"made_by": "convert", "source": source.name, "dtype": dtype})
    return ConvertReport(
        architecture=plan.architecture,
        num_tensors=len(plan.weights),
        num_bytes=total,
        notes=notes,
    )


def _check_format(source: Path) -> None:
    """Refuse what is known not to be GGUF, by what it is and with what to do instead."""
    if source.is_dir():
        remedy = "name the .gguf file; a folder of safetensors needs no conversion"
        raise refusal(source, "is a folder", remedy=remedy)
    for suffixes, reason, remedy in _OTHER_FORMATS:
        if source.name.lower().endswith(suffixes):
            raise refusal(source, reason, remedy=remedy)


_OTHER_FORMATS = (
    (
        (".safetensors", ".safetensors.index.json"),
        "is safetensors already",
        "load its folder as it is",
    ),
    (
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        "may run code when it is read (pickle), so longwing never opens such files",
        "fetch the model's safetensors, or convert it on a machine you can spare",
    ),
    (
        (".model",),
        "is a SentencePiece vocabulary, which is not converted on its own",
        "fetch the tokenizer.json of this model, or its GGUF file, which holds the vocabulary too",
    ),
    (
        (".onnx", ".h5", ".msgpack", ".npz", ".mlmodel", ".tflite", ".ggml"),
        "is a format that is not converted",
        "fetch the model's safetensors, or a .gguf file of it",
    ),
)


def _check_room(folder: Path, num_bytes: int, source: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        reason = f"becomes {num_bytes / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left"
        raise refusal(source, reason, remedy="free some, or choose a target on another disk")


def _num_bytes(weight: Weight, dtype: torch.dtype) -> int:
    return torch.Size(weight.entry.shape).numel() * dtype.itemsize


def _silent(done: int, total: int) -> None:
    """The progress nobody asked for."""


def _write_settings(folder: Path, plan: Plan, tokenizer: RebuiltTokenizer, dtype: str) -> None:
    """Every file but the weights."""
    ids: dict[str, object] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _one_or_all(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    ids = {name: value for name, value in ids.items() if value is not None}
    # transformers reads `dtype` since version 5, and read `torch_dtype` before.
    _write_json(folder / "config.json", plan.config | ids | {"dtype": dtype, "torch_dtype": dtype})
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer.json", tokenizer.tokenizer_json)
    context = {"model_max_length": plan.config["max_position_embeddings"]}
    _write_json(folder / "tokenizer_config.json", tokenizer.config_json | context)


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _write_json(path: Path, content: object) -> None:
    with new_file(path) as stream:
        stream.write(json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")


def _write_weights(
    folder: Path,
    file: GgufFile,
    weights: Sequence[Weight],
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """One weight file, or several and an index, named as Hugging Face's readers expect."""
    shards = list(_shards(weights, dtype))
    total = sum(_num_bytes(weight, dtype) for weight in weights)
    done, where = 0, {}
    progress(0, total)
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        tensors: dict[str, Tensor] = {}
        for weight in shard:
            plain = file.read(weight.entry, dtype)
            tensors[weight.name] = restore_rows(plain, weight.heads) if weight.heads else plain
            where[weight.name] = f"model{suffix}.safetensors"
            done += plain.nbytes
            progress(done, total)
        # Some readers refuse a file that does not name the library its tensors are laid out for.
        write_tensor_file(folder / f"model{suffix}.safetensors", tensors, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: Sequence[Weight], dtype: torch.dtype) -> Iterator[Sequence[Weight]]:
    """Cut the weights, in order, into runs of at most SHARD_BYTES (or of one larger tensor)."""
    cuts, size = [0], 0
    for index, weight in enumerate(weights):
        num_bytes = _num_bytes(weight, dtype)
        if size + num_bytes > SHARD_BYTES and index > cuts[-1]:
            cuts.append(index)
            size = 0
        size += num_bytes
    for start, end in pairwise([*cuts, len(weights)]):
        yield weights[start:end]


def _notes(file: GgufFile, plan: Plan) -> Iterator[str]:
    kinds = Counter(weight.entry.kind for weight in plan.weights)
    packed = {kind.name: count for kind, count in kinds.most_common() if kind not in _EXACT}
    if packed:
        listed = ", ".join(f"{count} {name}" for name, count in packed.items())
        yield (
            f"{sum(packed.values())} of {len(plan.weights)} tensors were quantised ({listed}): the "
            "folder holds their rounded values, not the original weights"
        )
    if "general.license" in file.fields:
        yield f"licence, as the file states it: {show(file.fields['general.license'])}"
