"""`State`: weights and moments after some step, on disk, by however many processes it was written.

Each process writes its rows of every tensor to a file of its own, the first process also what is
not sharded. `state.json`
says after how many steps, and names the files in the order of their rows; it is replaced in one
piece once all of them are on disk, so a kill at any time leaves a state that is whole. Whoever
reads asks for rows by number and does not see the files, so a run can go on with more processes or
fewer, and the result is written from here, one tensor at a time.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint import TensorFile, new_file, parse_object, write_tensor_file
from longwing.errors import CheckpointError

FACTS = "state.json"
_PART = re.compile(r"state-\d+-\d+\.safetensors")


@dataclass(frozen=True, kw_only=True)
class State:
    """A state that is whole.

    Attributes:
        steps: optimiser steps that had been taken.
        parts: the files, in the order of their rows.
    """

    steps: int
    parts: tuple[TensorFile, ...]

    @classmethod
    def open(cls, folder: Path) -> "State":
        """The state in a folder; reads headers alone.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        found = parse_object((folder / FACTS).read_bytes(), FACTS)
        steps, names = found.get("steps"), found.get("files")
        if type(steps) is not int or not isinstance(names, list) or not names:
            raise CheckpointError("does not say which files it is of", file=str(folder / FACTS))
        for name in names:
            if not isinstance(name, str) or not _PART.fullmatch(name):
                raise CheckpointError(f"names a file {name!r}", file=str(folder / FACTS))
        return cls(steps=steps, parts=tuple(TensorFile.open(folder / name) for name in names))

    def __contains__(self, name: str) -> bool:
        return name in self.parts[0].tensors

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the files' order."""
        return tuple(self.parts[0].tensors)

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """`count` rows of a tensor from `first` on, or all to the end; on the CPU.

        Only files that have some of these rows are read.
        """
        stop = None if count is None else first + count
        found, start = [], 0
        for part in self.parts:
            if name not in part.tensors:  # not sharded: the first has it
                continue
            end = start + part.tensors[name].shape[0]
            low, high = max(first, start), end if stop is None else min(stop, end)
            if low < high:
                found.append(part.read(name)[low - start : high - start])
            start = end
        if not found:  # a process that has no row of a small tensor
            return self.parts[0].read(name)[:0]
        return found[0] if len(found) == 1 else torch.cat(found)


def has_state(folder: Path) -> bool:
    """Whether there is a state in the folder."""
    return (folder / FACTS).exists()


def part_name(steps: int, rank: int) -> str:
    """What the file of a process is called."""
    return f"state-{steps}-{rank}.safetensors"


def write_part(folder: Path, tensors: Mapping[str, Tensor], steps: int, rank: int) -> None:
    """Write one process's rows; they count once `commit` has been called.

    Tensors may lie on a GPU; they are fetched one by one.
    """
    write_tensor_file(folder / part_name(steps, rank), tensors, {"steps": str(steps)})


def commit(folder: Path, steps: int, num_parts: int) -> None:
    """Make the parts that all have written the state, and drop the one before."""
    names = [part_name(steps, rank) for rank in range(num_parts)]
    with new_file(folder / FACTS) as stream:
        stream.write(json.dumps({"steps": steps, "files": names}).encode() + b"\n")
    for file in folder.iterdir():
        if _PART.fullmatch(file.name) and file.name not in names:
            file.unlink()
