"""`Checkpoint`: a model folder, opened without trusting it; and the writer of its tensor files.

Holds the finding of files (index, shards, legacy names), the checks that make a folder one model,
and the reading of tensors by name. What config.json means is `models/config.py`; what packed
tensors mean is `packed.py`; a single file is `tensor_file.py`.

The one idea: `open` reads headers and settings only, needs no GPU and a fraction of a second, and
leaves nothing to be discovered later except the data itself. A folder that opens is complete: every
file is whole, every tensor has exactly one place, and index and shards say the same.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from longwing.checkpoint.paths import inside, read_bytes, read_settings
from longwing.checkpoint.publish import is_partial, new_file
from longwing.checkpoint.quant_config import SCALAR_TENSORS, QuantConfig
from longwing.checkpoint.strict_json import parse_object, show
from longwing.checkpoint.tensor_file import TensorFile, write_tensor_file
from longwing.checkpoint.tensor_header import TensorInfo
from longwing.errors import CheckpointError, ConfigError

MAX_INDEX_BYTES = 64 * 2**20
MAX_SHARD_BYTES = 5_000_000_000
"""Where the writer begins a new file, as transformers does: hosts and file systems like it so."""

INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_MODEL_NAME = re.compile(r"(gptq_)?model\b.*\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder whose files were found whole and consistent. Holds no open file.

    Attributes:
        path: the folder.
        config: config.json, parsed and not yet understood.
        generation_config: generation_config.json, or {}.
        tensors: name -> TensorInfo over all shards, weights only (TGI's two scalars are settings).
        quant: how it is quantised; None when it is not.
        metadata: the safetensors metadata of all shards; the first shard that has a key decides.
        shards: tensor name -> the file that holds it.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    quant: QuantConfig | None
    metadata: Mapping[str, str]
    shards: Mapping[str, TensorFile]

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read and check everything but the tensors' data.

        Raises:
            CheckpointError: not a folder, unfinished, no .safetensors weights, a file missing,
                damaged or leading out of the folder, index and shards that disagree.
            ConfigError: a settings file that is not acceptable JSON, or unacceptable quantisation.
        """
        folder = _model_folder(Path(path))
        config = read_settings(folder, "config.json")
        generation = "generation_config.json"
        has_generation = os.path.lexists(folder / generation)
        generation_config = read_settings(folder, generation) if has_generation else {}
        names, weight_map = _find_model_files(folder)
        files = [TensorFile.open(inside(folder, name)) for name in names]
        shards = _owners(files)
        if weight_map is not None:
            _check_index(weight_map, shards)
        metadata: dict[str, str] = {}
        for file in files:
            metadata = {**file.metadata, **metadata}
        scalars = {name: _scalar(shards[name], name) for name in SCALAR_TENSORS if name in shards}
        quant = QuantConfig.from_folder(folder, config, metadata, scalars)
        weights = {name: file for name, file in shards.items() if name not in scalars}
        _check_quantised(quant, weights, names[0])
        return cls(
            path=folder,
            config=config,
            generation_config=generation_config,
            tensors=MappingProxyType({name: weights[name].tensors[name] for name in weights}),
            quant=quant,
            metadata=MappingProxyType(metadata),
            shards=MappingProxyType(weights),
        )

    def shard_of(self, name: str) -> str:
        """The name of the file that holds tensor `name`.

        Raises:
            CheckpointError: no file holds it.
        """
        if name not in self.shards:
            raise CheckpointError("no file of the folder holds this tensor", tensor=name)
        return self.shards[name].path.name

    def read(self, name: str, cut: Sequence[slice] | None = None) -> Tensor:
        """The tensor `name`, or a part of it, on the CPU, in memory of its own.

        Args:
            name: of the tensor.
            cut: the part, a slice of step 1 for each dimension: no other byte is read. None is all.

        Raises:
            CheckpointError: no file holds it, the file changed since `open`, or reading failed.
        """
        self.shard_of(name)
        return self.shards[name].read(name, cut)


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors as model.safetensors, or as numbered shards and their index when they are many.

    Meant for an empty folder (`new_folder`): files of an earlier, longer set are not removed.
    Tensors keep their order from shard to shard, and one larger than the limit gets a shard of its
    own. They are taken one by one, so a generator needs the memory of one shard only.

    Raises:
        CheckpointError: a tensor that the format cannot hold, or the system refuses to write.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    filled = total = 0

    def flush() -> None:
        write_tensor_file(folder / f"shard-{len(shards)}.safetensors", pending, metadata)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and filled + tensor.nbytes > max_shard_bytes:
            flush()
            filled = 0
        pending[name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    # How many there are is known only now, and their names say it.
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            final = "model.safetensors"
        os.rename(folder / f"shard-{number}.safetensors", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with new_file(folder / INDEX) as stream:
            stream.write(json.dumps(index, indent=2).encode() + b"\n")


def _model_folder(path: Path) -> Path:
    """The folder, absolute, if it is one and looks finished and like a model."""
    folder = path.absolute()
    if not folder.exists():
        raise CheckpointError(
            "there is no such folder", file=str(path), remedy="check the path, or pull the model"
        )
    if not folder.is_dir():
        raise CheckpointError(
            "is a file; a model is a folder with config.json and .safetensors files",
            file=str(path),
            remedy=f"longwing convert {path.name} DIR makes one" if path.suffix == ".gguf" else "",
        )
    try:
        partial = [name for name in (folder.name, *sorted(os.listdir(folder))) if is_partial(name)]
    except OSError as fault:
        raise CheckpointError(f"cannot be read: {fault.strerror}", file=str(path)) from None
    if partial:
        raise CheckpointError(
            "is the leftover of an unfinished write or download",
            file=partial[0],
            remedy="let it finish; if nothing is writing any more, delete it and start again",
        )
    if not os.path.lexists(folder / "config.json"):
        raise CheckpointError(
            f"the folder {show(folder.name)} has none",
            file="config.json",
            remedy="point to the folder that holds the model's config.json, or download it again",
        )
    return folder


def _find_model_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files that make the model, and the index's map when there is an index."""
    names = sorted(os.listdir(folder))
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if INDEX in indices or len(indices) == 1:
        weight_map = _read_index(folder, INDEX if INDEX in indices else indices[0])
        return sorted(set(weight_map.values())), weight_map
    if indices:
        raise _ambiguous(indices)
    tensors = [name for name in names if name.endswith(".safetensors")]
    tensors = [name for name in tensors if name != "adapter_model.safetensors"]
    # A file named as a model goes before its companions (a value head, an optimiser's state).
    tensors = [name for name in tensors if _MODEL_NAME.fullmatch(name)] or tensors
    if not tensors:
        raise _no_weights(names)
    if any(_NUMBERED.fullmatch(name) for name in tensors):
        _check_numbered(tensors)
    elif len(tensors) > 1:
        raise _ambiguous(tensors)
    for name in tensors:
        _check_shard_name(name, name)
    return tensors, None


def _ambiguous(names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"could each be the model: {', '.join(names[:10])}",
        file=f"{len(names)} files",
        remedy="keep one of them in the folder",
    )


def _no_weights(names: Sequence[str]) -> CheckpointError:
    """Why a folder without .safetensors files cannot be loaded, by what it has instead."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return CheckpointError(
            "a GGUF file is not loaded as it is",
            file=ggufs[0],
            remedy=f"longwing convert {ggufs[0]} DIR",
        )
    if pickles:
        return CheckpointError(
            "weights are in a pickle-like format, and opening one can run any code its maker chose",
            file=pickles[0],
            remedy=(
                "look for a .safetensors version; or, on a machine you can lose: from transformers "
                "import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(OUT, safe_serialization=True)"
            ),
        )
    return CheckpointError(
        "the folder holds none", file="*.safetensors", remedy="download the model again"
    )


def _check_numbered(names: Sequence[str]) -> None:
    """Unindexed shards `STEM-00001-of-0000N`: one stem, one N, all N there, nothing beside them."""
    match = next(match for name in names if (match := _NUMBERED.fullmatch(name)))
    stem, total = match[1], int(match[3])
    wanted = [f"{stem}-{k:05d}-of-{match[3]}.safetensors" for k in range(1, total + 1)]
    missing = sorted(set(wanted) - set(names))
    extra = sorted(set(names) - set(wanted))
    if missing:
        raise CheckpointError(
            f"is missing: the folder has {total - len(missing)} of {total} shards",
            file=missing[0],
            remedy="download the model again",
        )
    if extra:
        raise _ambiguous(names)


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> shard name, both checked as words."""
    index = parse_object(read_bytes(folder, name, MAX_INDEX_BYTES), name)
    unknown = sorted(index.keys() - {"metadata", "weight_map"})
    if unknown:
        raise CheckpointError(
            f"has a key {show(unknown[0])} that an index does not have", file=name
        )
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError('"metadata" is not an object', file=name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'"weight_map" is {show(weight_map)}; an object, tensor name to file, is needed',
            file=name,
        )
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"the index says it lies in {show(shard)}, which is not a file name",
                file=name,
                tensor=_printable(tensor),
            )
    for shard in sorted(set(weight_map.values())):
        _check_shard_name(shard, name)
        if not os.path.lexists(folder / shard):
            raise CheckpointError(
                f"the index names {shard}, which is missing",
                file=name,
                remedy="download the model again",
            )
    return weight_map


def _check_shard_name(shard: str, file: str) -> None:
    if not _SHARD_NAME.fullmatch(shard):
        raise CheckpointError(
            f"shard name {show(shard)} is not letters, digits, '_', '.', '-' and '.safetensors'",
            file=file,
            remedy="a shard lies in the model folder itself; rename it there and in the index",
        )


def _owners(files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    """Tensor name -> its file; a tensor in two files is refused."""
    owners: dict[str, TensorFile] = {}
    for file in files:
        for name in file.tensors:
            if name in owners:
                raise CheckpointError(
                    f"is in {owners[name].path.name} too",
                    file=file.path.name,
                    tensor=name,
                    remedy="download the model again",
                )
            owners[name] = file
    return owners


def _check_index(weight_map: Mapping[str, str], shards: Mapping[str, TensorFile]) -> None:
    """Index and shards list the same tensors in the same places."""
    for name, shard in weight_map.items():
        if name not in shards or shards[name].path.name != shard:
            elsewhere = f"; it lies in {shards[name].path.name}" if name in shards else ""
            raise CheckpointError(
                f"the index says it is here, but it is not{elsewhere}",
                file=shard,
                tensor=_printable(name),
                remedy="download shards and index again, of one revision",
            )
    unlisted = [name for name in shards if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"the index does not list it ({len(unlisted)} such tensors)",
            file=shards[unlisted[0]].path.name,
            tensor=unlisted[0],
            remedy="download shards and index again, of one revision",
        )


def _printable(name: str) -> str:
    return name if name.isprintable() and 0 < len(name) <= 512 else show(name)


def _scalar(file: TensorFile, name: str) -> int:
    """The value of one of TGI's settings tensors."""
    info = file.tensors[name]
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if info.shape not in ((), (1,)) or info.dtype not in integers:
        raise CheckpointError(
            f"is {info.dtype} of shape {info.shape}; one whole number is needed",
            file=file.path.name,
            tensor=name,
        )
    return int(file.read(name).item())


def _check_quantised(
    quant: QuantConfig | None, weights: Mapping[str, TensorFile], file: str
) -> None:
    """Settings and tensors agree on whether the model is quantised at all."""
    packed = next((name for name in weights if name.endswith(".qweight")), None)
    if packed and quant is None:
        raise ConfigError(
            "is packed, but nothing in the folder says with how many bits and which group size",
            file=weights[packed].path.name,
            tensor=packed,
            remedy='add a quantize_config.json such as {"bits": 4, "group_size": 128, '
            '"desc_act": false}, with the numbers the quantiser was given',
        )
    if quant is not None and packed is None:
        raise ConfigError(
            "the settings say GPTQ, but no tensor is packed (none is named *.qweight)",
            file=file,
            remedy="remove the quantisation settings if the weights are dense",
        )
