"""`export_model`: the folder itself, written beside its place and renamed when it is whole.

The one idea: a file of the source whose every tensor stays as it is gets a second name (a hard
link) and costs nothing; only the others are read, tensor by tensor, and written anew in shards of
bounded size. Memory stays at one shard and one layer.

A linked file is shared with the source: programs that edit a file in place would change both.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint import (
    TensorFile,
    new_file,
    new_folder,
    packed_names,
    packed_tensors,
    read_packed,
    write_tensor_file,
)
from longwing.errors import CheckpointError
from longwing.export.facts import Facts, Progress, read_facts
from longwing.export.repack import repack
from longwing.export.settings import write_settings
from longwing.export.targets import TARGETS
from longwing.export.verdict import ExportOptions, Verdict, judge
from longwing.kernels import PackedWeight, dequantize

SHARD_BYTES = 2 * 10**9
"""The most that a new file holds, and so about the most memory that an export takes."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        verdict: what to expect of it.
        num_tensors: tensors in the folder.
        num_bytes: bytes of weights in it, linked ones included.
        linked_bytes: of these, bytes shared with the source.
    """

    verdict: Verdict
    num_tensors: int
    num_bytes: int
    linked_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One or more tensors of the new folder that are made together.

    Attributes:
        sizes: name -> bytes.
        make: reads and makes them.
    """

    sizes: Mapping[str, int]
    make: Callable[[], Mapping[str, Tensor]]


def export_model(
    source: Path,
    out: Path,
    *,
    target: str,
    options: ExportOptions | None = None,
    overwrite: bool = False,
    link: bool = True,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a folder that loads in another engine; it appears whole or not at all.

    Args:
        source: the model folder.
        out: the folder to make; its parent must exist.
        target: a key of TARGETS.
        options: what may be changed beyond names and fields.
        overwrite: replace `out` if it is a model folder.
        link: let unchanged files share their bytes with the source where the file system can.
        progress: called with bytes of weights done and in all.

    Raises:
        CheckpointError: the folder would not load there (the remedy is named), is broken, or cannot
            be written: the disk is too small, `out` exists, or it is the source itself.
        RequestError: an option makes no sense for this folder.
    """
    _check_apart(source, out)
    facts = read_facts(source)
    verdict = judge(facts, TARGETS[target], options or ExportOptions())
    require_loads(verdict, source)
    whole, pieces = _sort_files(facts, verdict)
    with new_folder(out, overwrite=overwrite) as folder:
        copied = whole if not link or not _one_disk(source, folder) else []
        _check_room(folder, copied, pieces)
        write_settings(folder, facts, verdict)
        weight_map, linked = _write_weights(folder, whole, pieces, link, progress)
        sizes = {name: info.nbytes for file in whole for name, info in file.tensors.items()}
        sizes |= {name: size for piece in pieces for name, size in piece.sizes.items()}
        if len(set(weight_map.values())) > 1:
            _write_index(folder, weight_map, sum(sizes.values()))
    return ExportReport(
        verdict=verdict,
        num_tensors=len(sizes),
        num_bytes=sum(sizes.values()),
        linked_bytes=linked,
    )


def require_loads(verdict: Verdict, source: Path) -> None:
    """Do nothing if the folder will load.

    Raises:
        CheckpointError: it will not; says why and what would.
    """
    if verdict.loads:
        return
    near = verdict.nearest
    remedy = (
        f"longwing export with {' '.join(near.flags())} loads"
        if near is not None
        else "no option makes it load there"
    )
    raise CheckpointError(
        f"{verdict.level.words} in {verdict.target.name} {verdict.target.version}: "
        f"{verdict.findings[0].what}",
        file=str(source),
        remedy=remedy,
    )


def _check_apart(source: Path, out: Path) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or here.is_relative_to(there):
        raise CheckpointError(
            "is the source, or holds it", file=str(out), remedy="choose another place"
        )


def _sort_files(facts: Facts, verdict: Verdict) -> tuple[list[TensorFile], list[_Piece]]:
    """Files that stay as they are; and, of the others, what has to be written, in order."""
    files = {file.path: file for file in facts.checkpoint.shards.values()}
    made = _pieces(facts, verdict)
    whole, pieces = [], []
    for path in sorted(files):
        file = files[path]
        mine = {name: made[name] for name in file.tensors if name in made}
        if file.metadata.get("format") == "pt" and all(
            name in mine and mine[name] is None for name in file.tensors
        ):
            whole.append(file)
            continue
        for name in file.tensors:
            if name in mine:
                pieces.append(mine[name] or _as_it_is(facts, name, name))
    return whole, pieces


def _pieces(facts: Facts, verdict: Verdict) -> dict[str, _Piece | None]:
    """Tensor of the source -> what becomes of it: a piece, or None if nothing; dropped ones lack.

    A packed layer that changes stands at its qweight; its other tensors are dropped where they lie.
    """
    made: dict[str, _Piece | None] = {}
    embedding = f"{facts.model.EMBEDDING}.weight"
    for own, theirs in facts.inventory.dense.items():
        if theirs in facts.spare_biases:
            continue
        made[theirs] = None if own == theirs else _as_it_is(facts, theirs, own)
    if facts.tied and "lm_head.weight" in made and embedding in made:
        del made["lm_head.weight"]
    for name in facts.packed:
        names = packed_names(name)
        if _changes(facts, verdict, name):
            made[names["qweight"]] = _layer(facts, verdict, name)
        else:
            present = (full for suffix, full in names.items() if suffix != "bias")
            made |= {full: None for full in present if full in facts.checkpoint.tensors}
    return made


def _changes(facts: Facts, verdict: Verdict, name: str) -> bool:
    form, layer = verdict.form, facts.packed[name]
    if form.quant is None or name in form.layers:
        return True
    lacks_g_idx = verdict.target.name == "transformers" and not layer.has_g_idx
    return lacks_g_idx or form.quant.checkpoint_format != facts.settings.checkpoint_format


def _as_it_is(facts: Facts, theirs: str, own: str) -> _Piece:
    return _Piece(
        sizes={own: facts.checkpoint.tensors[theirs].nbytes},
        make=lambda: {own: facts.checkpoint.read(theirs)},
    )


def _layer(facts: Facts, verdict: Verdict, name: str) -> _Piece:
    """A packed layer in its new form."""
    form, layer = verdict.form, facts.packed[name]
    K, N = layer.in_features, layer.out_features
    if form.quant is None:
        dtype = getattr(torch, form.dtype or "float16")
        return _Piece(sizes={f"{name}.weight": K * N * 2}, make=lambda: _dense(facts, name, dtype))
    bits, group_size = form.layers.get(name, (layer.bits, layer.group_size))
    G = 1 if group_size == -1 else -(-K // group_size)
    names = packed_names(name)
    scale_bytes = facts.checkpoint.tensors[names["scales"]].dtype.itemsize
    sizes = {
        names["qweight"]: K * N * bits // 8,
        names["qzeros"]: G * N * bits // 8,
        names["scales"]: G * N * scale_bytes,
        names["g_idx"]: 4 * K,
    }
    return _Piece(sizes=sizes, make=lambda: _packed(facts, verdict, name))


def _dense(facts: Facts, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    dense_NK = dequantize(_read(facts, name), dtype).T.contiguous()
    if not bool(torch.isfinite(dense_NK).all()):
        raise CheckpointError(
            f"has values that do not fit {dtype}",
            tensor=f"{name}.weight",
            remedy="export with --dtype bfloat16",
        )
    return {f"{name}.weight": dense_NK}


def _packed(facts: Facts, verdict: Verdict, name: str) -> dict[str, Tensor]:
    weight = _read(facts, name)
    if name in verdict.form.layers:
        weight = repack(weight, *verdict.form.layers[name])
    quant = verdict.form.quant or facts.settings
    tensors = packed_tensors(weight, quant.checkpoint_format)
    return {packed_names(name)[suffix]: tensor for suffix, tensor in tensors.items()}


def _read(facts: Facts, name: str) -> PackedWeight:
    layer = facts.packed[name]
    return read_packed(
        facts.checkpoint, name, layer.in_features, layer.out_features, facts.settings
    )


def _one_disk(source: Path, folder: Path) -> bool:
    return source.resolve().stat().st_dev == folder.stat().st_dev


def _check_room(folder: Path, copied: Sequence[TensorFile], pieces: Sequence[_Piece]) -> None:
    need = sum(file.path.stat().st_size for file in copied)
    need += sum(size for piece in pieces for size in piece.sizes.values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"needs {need / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left",
            file=str(folder.parent),
            remedy="free some, or choose a place on another disk",
        )


def _write_weights(
    folder: Path,
    whole: Sequence[TensorFile],
    pieces: Sequence[_Piece],
    link: bool,
    progress: Progress | None,
) -> tuple[dict[str, str], int]:
    """Link or copy whole files, write the rest in shards, and name them all.

    Returns:
        (tensor name -> file name, bytes shared with the source).
    """
    total = sum(file.path.stat().st_size for file in whole)
    total += sum(size for piece in pieces for size in piece.sizes.values())
    done = linked = 0
    parts: list[tuple[Path, list[str]]] = []

    def place() -> Path:
        return folder / f"part-{len(parts)}.safetensors"

    for file in whole:
        size = file.path.stat().st_size
        linked += size if _link(file.path, place(), link) else 0
        parts.append((place(), list(file.tensors)))
        done += size
        _say(progress, done, total)
    for shard in _shards(pieces):
        tensors: dict[str, Tensor] = {}
        for piece in shard:
            tensors |= piece.make()
            done += sum(piece.sizes.values())
            _say(progress, done, total)
        write_tensor_file(place(), tensors, {"format": "pt"})
        parts.append((place(), list(tensors)))
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        name = "model.safetensors" if len(parts) == 1 else name
        os.rename(path, folder / name)
        weight_map |= dict.fromkeys(names, name)
    return weight_map, linked


def _shards(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Runs of at most SHARD_BYTES, or of one larger piece."""
    shard: list[_Piece] = []
    filled = 0
    for piece in pieces:
        size = sum(piece.sizes.values())
        if shard and filled + size > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(piece)
        filled += size
    if shard:
        yield shard


def _link(source: Path, target: Path, link: bool) -> bool:
    """Give a file a second name, or copy it; whether its bytes are shared now."""
    try:
        if link:
            os.link(source.resolve(), target)
            return True
    except OSError:
        pass  # another disk, or a file system without links
    try:
        shutil.copyfile(source, target)
    except OSError as fault:
        raise CheckpointError(f"cannot be copied: {fault.strerror}", file=source.name) from fault
    return False


def _say(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with new_file(folder / INDEX) as stream:
        stream.write(json.dumps(index, indent=2).encode() + b"\n")
