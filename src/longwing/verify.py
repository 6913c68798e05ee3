"""`verify`: everything that is wrong with a model folder, tensor by tensor.

The loader stops at the first problem; this goes on and lists them all. It asks the same questions
with the same code (`Checkpoint.open`, `take_inventory`, `read_packed`), so what it passes, loads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longwing.checkpoint import MANIFEST, Checkpoint, check_manifest, packed_names, read_packed
from longwing.errors import CheckpointError
from longwing.models import (
    Inventory,
    ModelConfig,
    empty_model,
    end_ids,
    not_finite,
    take_inventory,
)
from longwing.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verify` found.

    Attributes:
        folder: the folder.
        problems: what keeps the folder from loading or from being what its maker wrote.
        notes: what is worth knowing and harmless.
        num_tensors: tensors listed in the headers; 0 when they could not be read.
        num_bytes: their bytes.
        checked_values: the data was read too, not the headers alone.
        checked_manifest: a manifest was there and compared.
    """

    folder: Path
    problems: tuple[CheckpointError, ...]
    notes: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    checked_values: bool
    checked_manifest: bool

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify(folder: Path, *, values: bool = True, progress: Progress | None = None) -> Verdict:
    """Check settings, headers, names, shapes, values and manifest; raises nothing of its own.

    Args:
        folder: the model folder.
        values: read the data too: every number finite, every packed layer consistent. Costs one
            pass over the files; without it a folder of any size takes about a second.
        progress: called as bytes are read.
    """
    notes: list[str] = []
    problems: list[CheckpointError] = []
    checkpoint = None
    try:
        checkpoint = Checkpoint.open(folder)
        config = ModelConfig.from_hf(checkpoint.config)
    except CheckpointError as error:
        problems.append(error)
    else:
        if config.unknown:
            notes.append(f"config.json fields not known here: {', '.join(config.unknown)}")
        problems += _bad_generation_config(checkpoint, config)
        if checkpoint.quant is not None:
            notes += checkpoint.quant.notes
        inventory = take_inventory(empty_model(config), checkpoint)
        problems += inventory.problems
        if values:
            problems += _bad_values(checkpoint, config, inventory, progress)
    problems += _bad_tokenizer(folder)
    has_manifest = (folder / MANIFEST).is_file()
    if has_manifest:
        problems += check_manifest(folder)
    else:
        notes.append(f"no {MANIFEST}: whether the files are as they were written cannot be told")
    tensors = checkpoint.tensors if checkpoint else {}
    return Verdict(
        folder=folder,
        problems=tuple(problems),
        notes=tuple(notes),
        num_tensors=len(tensors),
        num_bytes=sum(info.nbytes for info in tensors.values()),
        checked_values=values and checkpoint is not None,
        checked_manifest=has_manifest,
    )


def _bad_values(
    checkpoint: Checkpoint,
    config: ModelConfig,
    inventory: Inventory,
    progress: Progress | None,
) -> Iterator[CheckpointError]:
    """Read every tensor the model uses whose header passed; one error for each that fails."""
    already = {problem.tensor for problem in inventory.problems}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done = 0
    linears = dict(empty_model(config).linears())
    for name in inventory.packed:
        parts = set(packed_names(name).values()) & set(checkpoint.tensors)
        done += sum(checkpoint.tensors[part].nbytes for part in parts)
        if checkpoint.quant is not None and not parts & already:
            linear = linears[name]
            try:
                read_packed(
                    checkpoint, name, linear.in_features, linear.out_features, checkpoint.quant
                )
            except CheckpointError as error:
                yield error
        if progress is not None:
            progress(done, total)
    for name in inventory.dense.values():
        if name in already or name not in checkpoint.tensors:
            continue
        try:
            tensor = checkpoint.read(name)
        except CheckpointError as error:
            yield error
            continue
        done += tensor.nbytes
        problem = not_finite(checkpoint, name, tensor, tensor)
        if problem is not None:
            yield problem
        if progress is not None:
            progress(done, total)


def _bad_generation_config(checkpoint: Checkpoint, config: ModelConfig) -> list[CheckpointError]:
    """What generation_config.json says of ends of answers, if it cannot be used."""
    try:
        end_ids(checkpoint.generation_config, config.vocab_size)
    except CheckpointError as error:
        return [error]
    return []


def _bad_tokenizer(folder: Path) -> list[CheckpointError]:
    """The tokenizer's files, if they cannot be used."""
    try:
        Tokenizer.from_folder(folder)
    except CheckpointError as error:
        return [error]
    return []
