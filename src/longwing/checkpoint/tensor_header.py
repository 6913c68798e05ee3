"""The header of a .safetensors file: read as a stranger's, checked in full, and written.

Holds the format: eight bytes of header length, a JSON header, then the bytes of every tensor, end
to end. No file is touched here; that is `tensor_file.py`.

The one idea: the header must account for every byte of the file exactly once. Entries sorted by
offset, each begins where the last ended, and the last ends where the file does. Nothing is believed
before it has been checked, and what could take memory is bounded before it is parsed.

Source: the safetensors format description and the checks of its `tensor.rs`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.checkpoint.strict_json import parse_object, show
from longwing.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_TENSORS = 100_000
"""Entries in one file; the largest models published have some tens of thousands."""

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

AGAIN = "download it again"
"""The remedy for a file that is damaged."""

_IMPOSTORS: Mapping[bytes, tuple[str, str]] = {
    b"version ": ("a Git LFS pointer", "fetch the file itself: git lfs pull"),
    b"PK\x03\x04": ("a PyTorch pickle (zip)", "fetch the .safetensors version; pickles run code"),
    b"GGUF": ("a GGUF file", "rename it to .gguf and use longwing convert"),
    b"<": ("a web page", f"{AGAIN}; an error page was saved in its place"),
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


def header_len(prefix: bytes | bytearray, file_size: int, file: str) -> int:
    """How long the JSON is, by the first eight bytes of a file, once that is known to be sane.

    Raises:
        CheckpointError: it is not; the message says what the file is instead, if that can be seen.
    """
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        for magic, (what, remedy) in _IMPOSTORS.items():
            if prefix.startswith(magic):
                raise CheckpointError(f"is {what}, not safetensors", file=file, remedy=remedy)
        raise CheckpointError(
            f"header length {length:,} exceeds the format's limit of {MAX_HEADER_BYTES:,} bytes",
            file=file,
            remedy=AGAIN,
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"is cut short: header length {length:,}, but {file_size - 8:,} bytes follow it",
            file=file,
            remedy=AGAIN,
        )
    if length < 2:
        raise CheckpointError(f"header length {length} is too small", file=file, remedy=AGAIN)
    return length


def parse_header(
    header: bytearray, file_size: int, file: str
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensors of a header, every rule checked; the tensors in file order.

    Args:
        header: the JSON.
        file_size: bytes of the whole file.
        file: its name, for messages.

    Raises:
        CheckpointError: a rule of the format is broken.
    """
    if not header.startswith(b"{"):
        raise CheckpointError("header does not begin with {", file=file, remedy=AGAIN)
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


def make_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: str) -> bytes:
    """The length and the JSON: all that stands before the data of these tensors, in their order.

    Raises:
        CheckpointError: a name, number type or shape that the format cannot hold.
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = _parse_metadata(dict(sorted(metadata.items())), file)
    end = 0
    for name, tensor in tensors.items():
        _check_name(name, file)
        if tensor.dtype not in _WORDS or tensor.dim() > MAX_RANK:
            raise CheckpointError(
                f"cannot hold {tensor.dtype} of shape {tuple(tensor.shape)}",
                file=file,
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
    return len(raw).to_bytes(8, "little") + raw


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
        return CheckpointError(reason, file=file, tensor=name, remedy=AGAIN)

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
            remedy=AGAIN,
        )
    reached, previous = data_start, "the header"
    for name, info in ordered.items():
        if info.offset < reached:
            raise CheckpointError(
                f"overlaps {previous} by {reached - info.offset:,} bytes",
                file=file,
                tensor=name,
                remedy=AGAIN,
            )
        if info.offset > reached:
            raise CheckpointError(
                f"a hole of {info.offset - reached:,} bytes lies before it",
                file=file,
                tensor=name,
                remedy=AGAIN,
            )
        reached, previous = info.offset + info.nbytes, name
    if reached != file_size:
        raise CheckpointError(
            f"{file_size - reached:,} bytes follow the last tensor", file=file, remedy=AGAIN
        )
