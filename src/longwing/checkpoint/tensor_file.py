"""One .safetensors file, read strictly and written whole.

What stands in a header, and every rule it must keep, is `tensor_header.py`; which files make a
model is `folder.py`. Reading is our own code for two reasons: an untrusted header is checked in
full before a byte of it is believed, and the data is read by `pread` into fresh memory, not mapped
(a file cut short under a map is SIGBUS, which no program survives). Writing is our own too: the
safetensors library stores metadata in random order, and a resumed run must give the same bytes as
an uninterrupted one.

The one idea: a file is opened anew for each reading and must be the one whose header was checked,
by its stamp, before and after. So there is nothing to close, and no tensor of two states.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from longwing.checkpoint.parts import byte_runs
from longwing.checkpoint.paths import opened
from longwing.checkpoint.publish import new_file
from longwing.checkpoint.tensor_header import (
    AGAIN,
    TensorInfo,
    header_len,
    make_header,
    parse_header,
)
from longwing.errors import CheckpointError

PART_BYTES = 2**24
MAX_READERS = 8
"""A tensor is read in parts of this size, so many at once."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """One .safetensors file whose header was found good. Holds no descriptor, so nothing to close.

    Attributes:
        path: where it is.
        metadata: the header's `__metadata__`, words to words.
        tensors: name -> TensorInfo, in file order.
        stamp: device, inode, size and modification time when the header was read.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    stamp: tuple[int, int, int, int]

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Read and check the header; no tensor data is read.

        Raises:
            CheckpointError: the file is missing, cut short, too long, or its header breaks any rule
                of the format. Nothing larger than the header has been allocated by then.
        """
        with opened(path, path.name) as descriptor:
            stamp = _stamp(descriptor)
            header = _read_header(descriptor, stamp[2], path.name)
        metadata, tensors = parse_header(header, stamp[2], path.name)
        return cls(
            path=path,
            metadata=MappingProxyType(metadata),
            tensors=MappingProxyType(tensors),
            stamp=stamp,
        )

    def read(self, name: str, cut: Sequence[slice] | None = None) -> Tensor:
        """The tensor `name`, or a part of it, on the CPU, in memory of its own.

        Args:
            name: of the tensor.
            cut: the part, a slice of step 1 for each dimension: no other byte is read. None is all.

        Raises:
            CheckpointError: no such tensor; the file changed since it was opened or while it was
                read; the system failed to read; or a BOOL byte is neither 0 nor 1.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError("holds no such tensor", file=self.path.name, tensor=name)
        shape, runs = info.shape, [(0, info.nbytes)]
        if cut is not None:
            shape = tuple(len(range(n)[piece]) for n, piece in zip(shape, cut, strict=True))
            runs = list(byte_runs(info.shape, cut, info.dtype.itemsize))
        data = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        with opened(self.path, self.path.name) as descriptor:
            self._check_unchanged(descriptor)
            if len(data):
                _read_runs(descriptor, data.numpy().data, info.offset, runs, self.path.name)
            self._check_unchanged(descriptor)
        if info.dtype is torch.bool and bool((data > 1).any()):
            raise CheckpointError(
                "a BOOL byte is neither 0 nor 1", file=self.path.name, tensor=name, remedy=AGAIN
            )
        return data.view(info.dtype).reshape(shape)

    def _check_unchanged(self, descriptor: int) -> None:
        if _stamp(descriptor) != self.stamp:
            raise CheckpointError(
                "the file changed after it was opened",
                file=self.path.name,
                remedy="wait until whatever writes it has finished, then load again",
            )


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file that appears whole or not at all; equal input gives equal bytes.

    Wide numbers come first, then names in order, so that every tensor is aligned to its own
    numbers. Tensors that share memory are written as often as they are named; drop the copy of a
    tied weight.

    Raises:
        CheckpointError: a name or number type that the format cannot hold, or the system refuses.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ordered = {name: tensors[name] for name in order}
    header = make_header(ordered, metadata or {}, path.name)
    with new_file(path) as stream:
        stream.write(header)
        for tensor in ordered.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                stream.write(flat.view(torch.uint8).numpy().data)


def _stamp(descriptor: int) -> tuple[int, int, int, int]:
    """What tells one state of a file from another: device, inode, bytes, change time in ns."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_runs(
    descriptor: int, view: memoryview, offset: int, runs: Sequence[tuple[int, int]], file: str
) -> None:
    """Fill `view` with runs of one length, counted from `offset`; many in parts side by side."""
    first, length = runs[0]
    if len(runs) == 1:
        _read_into(descriptor, view, offset + first, file)
        return
    at_once = max(PART_BYTES // length, 1)

    def read(begin: int) -> None:
        for index, (start, _) in enumerate(runs[begin : begin + at_once], begin):
            piece = view[index * length : (index + 1) * length]
            _read_part(descriptor, piece, offset + start, file)

    with ThreadPoolExecutor(MAX_READERS) as readers:
        for _ in readers.map(read, range(0, len(runs), at_once)):
            pass


def _read_into(descriptor: int, view: memoryview, offset: int, file: str) -> None:
    """Fill `view` from `offset` on, a large one in parts side by side.

    Fresh memory is given out page by page as it is first written, at about the speed of one core.
    """
    starts = range(0, len(view), PART_BYTES)
    if len(starts) < 2:
        _read_part(descriptor, view, offset, file)
        return

    def read(start: int) -> None:
        _read_part(descriptor, view[start : start + PART_BYTES], offset + start, file)

    with ThreadPoolExecutor(min(len(starts), MAX_READERS)) as readers:
        for _ in readers.map(read, starts):
            pass


def _read_part(descriptor: int, view: memoryview, offset: int, file: str) -> None:
    """Fill `view`; one call may give less than was asked for."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + 2**30]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"ends at byte {offset + done:,}, inside its data", file=file, remedy=AGAIN
            )
        done += count


def _read_header(descriptor: int, file_size: int, file: str) -> bytearray:
    """The JSON bytes, once their length is known to be sane."""
    if file_size < 8:
        raise CheckpointError(
            f"has {file_size} bytes, too few for a safetensors header", file=file, remedy=AGAIN
        )
    prefix = bytearray(8)
    _read_into(descriptor, memoryview(prefix), 0, file)
    length = header_len(prefix, file_size, file)
    header = bytearray(length)
    _read_into(descriptor, memoryview(header), 8, file)
    return header
