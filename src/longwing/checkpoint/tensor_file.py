"""One .safetensors file, read strictly and written whole.

Holds the format: eight bytes of header length, a JSON header, then the bytes of every tensor, end
to end. Which files make a model is `folder.py`. Reading is our own code for two reasons: an
untrusted header is checked in full before a byte of it is believed, and the data is read by `pread`
into fresh memory, not mapped (a file cut short under a map is SIGBUS, which no program survives).
Writing is our own too: the safetensors library stores metadata in random order, and a resumed run
must give the same bytes as an uninterrupted one.

The one idea: the header must account for every byte of the file exactly once. Entries sorted by
offset, each begins where the last ended, and the last ends where the file does.

Source: the safetensors format description and the checks of its `tensor.rs`.
"""

import json
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
from longwing.checkpoint.strict_json import parse_object, show
from longwing.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_TENSORS = 100_000
"""Entries in one file; the largest models published have some tens of thousands."""

PART_BYTES = 2**24
MAX_READERS = 8
"""A tensor is read in parts of this size, so many at once."""

MAX_RANK = 8
MAX_NAME_LEN = 512
MAX_METADATA_KEYS = 10_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The header's words for number types. (F4 and F6 pack below a byte, which torch cannot hold.)"""

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_AGAIN = "download it again"

_IMPOSTORS: Mapping[bytes, tuple[str, str]] = {
    b"version ": ("a Git LFS pointer", "fetch the file itself: git lfs pull"),
    b"PK\x03\x04": ("a PyTorch pickle (zip)", "fetch the .safetensors version; pickles run code"),
    b"GGUF": ("a GGUF file", "rename it to .gguf and use longwing convert"),
    b"<": ("a web page", f"{_AGAIN}; an error page was saved in its place"),
}
"""First bytes of what is often found under a .safetensors name -> what it is, what to do."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies, and what it is.

    Attributes:
        dtype: its number type.
        shape: its extents, outermost first; () for a scalar.
        offset: first byte, counted from the start of the file.
        nbytes: bytes it takes: the product of the shape times the size of a number.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


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
        metadata, tensors = _parse_header(header, stamp[2], path.name)
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
                "a BOOL byte is neither 0 nor 1", file=self.path.name, tensor=name, remedy=_AGAIN
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
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = _parse_metadata(dict(sorted(metadata.items())), path.name)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        _check_name(name, path.name)
        if tensor.dtype not in _WORDS or tensor.dim() > MAX_RANK:
            raise CheckpointError(
                f"cannot hold {tensor.dtype} of shape {tuple(tensor.shape)}",
                file=path.name,
                tensor=name,
            )
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with new_file(path) as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
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
                f"ends at byte {offset + done:,}, inside its data", file=file, remedy=_AGAIN
            )
        done += count


def _read_header(descriptor: int, file_size: int, file: str) -> bytearray:
    """The JSON bytes, once their length is known to be sane."""
    if file_size < 8:
        raise CheckpointError(
            f"has {file_size} bytes, too few for a safetensors header", file=file, remedy=_AGAIN
        )
    prefix = bytearray(8)
    _read_into(descriptor, memoryview(prefix), 0, file)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        for magic, (what, remedy) in _IMPOSTORS.items():
            if prefix.startswith(magic):
                raise CheckpointError(f"is {what}, not safetensors", file=file, remedy=remedy)
        raise CheckpointError(
            f"header length {length:,} exceeds the format's limit of {MAX_HEADER_BYTES:,} bytes",
            file=file,
            remedy=_AGAIN,
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"is cut short: header length {length:,}, but {file_size - 8:,} bytes follow it",
            file=file,
            remedy=_AGAIN,
        )
    if length < 2:
        raise CheckpointError(f"header length {length} is too small", file=file, remedy=_AGAIN)
    header = bytearray(length)
    _read_into(descriptor, memoryview(header), 8, file)
    return header


def _parse_header(
    header: bytearray, file_size: int, file: str
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensors of a header, every rule checked."""
    if not header.startswith(b"{"):
        raise CheckpointError("header does not begin with {", file=file, remedy=_AGAIN)
    _bound_structure(header, file)
    entries = parse_object(header, file)
    metadata = _parse_metadata(entries.pop("__metadata__", {}), file)
    if len(entries) > MAX_TENSORS:
        raise _too_many(file)
    data_start = 8 + len(header)
    tensors = {name: _parse_entry(entry, data_start, file, name) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_cover(ordered, data_start, file_size, file)
    return metadata, ordered


def _bound_structure(header: bytearray, file: str) -> None:
    """Refuse a header that would parse into far more objects than MAX_TENSORS entries need.

    A hundred megabytes of brackets would become gigabytes of Python lists. An entry needs one
    object, two lists and, at the highest rank, eleven commas.
    """
    if (
        header.count(b"{") > MAX_TENSORS + 2
        or header.count(b"[") > 2 * MAX_TENSORS
        or header.count(b",") > (MAX_RANK + 4) * MAX_TENSORS
    ):
        raise _too_many(file)


def _too_many(file: str) -> CheckpointError:
    return CheckpointError(
        f"header describes more than {MAX_TENSORS:,} tensors",
        file=file,
        remedy="split the model into shards",
    )


def _parse_metadata(raw: object, file: str) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise CheckpointError(f"__metadata__ is {show(raw)}, not an object", file=file)
    if len(raw) > MAX_METADATA_KEYS:
        raise CheckpointError(
            f"__metadata__ has {len(raw):,} keys; the limit is {MAX_METADATA_KEYS:,}", file=file
        )
    for key, value in raw.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"__metadata__[{show(key)}] is {show(value)}, not a string", file=file
            )
    return raw


def _check_name(name: str, file: str) -> None:
    """Names end in messages and logs: control characters and lone surrogates are refused."""
    if not name or len(name) > MAX_NAME_LEN or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(
            f"tensor name {show(name)} is not 1 to {MAX_NAME_LEN} printable characters", file=file
        )


def _parse_entry(entry: object, data_start: int, file: str, name: str) -> TensorInfo:
    """One header entry, its parts agreeing with one another."""
    _check_name(name, file)

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(reason, file=file, tensor=name, remedy=_AGAIN)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"entry is {show(entry)}; dtype, shape and data_offsets are needed, no more")
    word = entry["dtype"]
    if not isinstance(word, str) or word not in DTYPES:
        raise refuse(f"dtype {show(word)} is unknown; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape):
        raise refuse(f"shape {show(shape)} is not a list of whole numbers from 0 to 2^63 - 1")
    if len(shape) > MAX_RANK:
        raise refuse(f"shape has {len(shape)} dimensions; the limit is {MAX_RANK}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise refuse(f"data_offsets {show(offsets)} are not two whole numbers from 0 to 2^63 - 1")
    begin, end = offsets
    if begin > end:
        raise refuse(f"data_offsets are reversed: {begin} > {end}")
    dtype = DTYPES[word]
    # Extents of 0 are left out: torch computes strides even for an empty tensor.
    if math.prod(extent or 1 for extent in shape) * dtype.itemsize >= 2**63:
        raise refuse(f"shape {show(shape)} overflows 64 bits")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise refuse(
            f"data_offsets hold {end - begin:,} bytes, but {word} of shape {show(shape)} "
            f"takes {nbytes:,}"
        )
    return TensorInfo(dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=nbytes)


def _are_counts(value: object) -> bool:
    """A list of whole numbers in [0, 2^63); true and 1.0 are not whole numbers here."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_cover(
    ordered: Mapping[str, TensorInfo], data_start: int, file_size: int, file: str
) -> None:
    """Every data byte belongs to exactly one tensor; `ordered` is sorted by offset."""
    end = max((info.offset + info.nbytes for info in ordered.values()), default=data_start)
    if end > file_size:
        raise CheckpointError(
            f"is cut short: the header describes {end:,} bytes, the file has {file_size:,}",
            file=file,
            remedy=_AGAIN,
        )
    reached, previous = data_start, "the header"
    for name, info in ordered.items():
        if info.offset < reached:
            raise CheckpointError(
                f"overlaps {previous} by {reached - info.offset:,} bytes",
                file=file,
                tensor=name,
                remedy=_AGAIN,
            )
        if info.offset > reached:
            raise CheckpointError(
                f"a hole of {info.offset - reached:,} bytes lies before it",
                file=file,
                tensor=name,
                remedy=_AGAIN,
            )
        reached, previous = info.offset + info.nbytes, name
    if reached != file_size:
        raise CheckpointError(
            f"{file_size - reached:,} bytes follow the last tensor", file=file, remedy=_AGAIN
        )
