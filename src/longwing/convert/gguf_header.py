"""The header of a GGUF file, walked front to back: metadata, and the table of tensors.

GGUF is llama.cpp's format: a magic number, counts, key/value metadata, a table of tensors, padding,
data; all of it little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Access to
fields and tensors is `gguf_file.py`; what they mean for a model, `llama.py` and `tokenizer.py`.

The one idea: the file is hostile until it has been walked through. Several readers of this format
were broken by lengths that lie, so no length is believed before it is compared with the bytes that
remain, and nothing is allocated before that. Python's integers do not overflow, so a product of
dimensions needs no care beyond the comparison.

Shapes: O, I out and in features, the order of PyTorch; GGUF stores I first.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from longwing.errors import ConvertError

Array = np.ndarray[Any, np.dtype[Any]]
Value = bool | int | float | str | tuple[str, ...] | Array
"""A metadata value; an array of numbers is a numpy array, one of strings a tuple."""

MAX_HEADER_BYTES = 64 * 2**20
"""Metadata and table together. The largest vocabularies in use take about 16 MB."""

MAX_ENTRIES = 2**16
"""Metadata fields, and tensors. The largest models have some thousands of tensors."""

MAX_STRINGS = 2**20
"""Strings in one array. The longest list of merges in use has about 515,000."""

MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMS = 4
MAX_ALIGNMENT = 2**16

_MAGIC = b"GGUF"
_SCALARS: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9

# The least an entry can take: an empty string's length, a type, a one-byte value; and a tensor's
# empty name, number of dimensions, one dimension, type, offset.
_MIN_FIELD_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_DAMAGED = "the file is cut short or damaged: fetch it again"


def refusal(file: Path, reason: str, *, part: str = "", remedy: str = "") -> ConvertError:
    """A ConvertError worded alike everywhere: file, field or tensor at fault, reason, remedy."""
    if not part.isprintable() or len(part) > 80:  # a name out of the file, and no ordinary one
        part = show(part)
    where = ": ".join(item for item in (file.name, part) if item)
    return ConvertError(f"{where}: {reason}" + (f"; {remedy}" if remedy else ""))


def show(value: object) -> str:
    """A value for a message: escaped, and cut to 60 characters, since a stranger chose it."""
    if isinstance(value, np.ndarray | tuple):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One line of the table of tensors, already checked against the file.

    Attributes:
        name: llama.cpp's name, e.g. "blk.0.attn_q.weight".
        shape: in PyTorch's order, (O, I) for a matrix.
        kind: how ggml encodes the numbers.
        start: first byte in the file.
        num_bytes: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


class Header:
    """The checked header of a GGUF file, version 2 or 3, little-endian.

    Args:
        path: its name, for messages.
        file: the file, at its beginning.
        size: its length in bytes.

    Attributes:
        fields: metadata by key, in the file's order.
        tensors: the table by tensor name, in the file's order.

    Raises:
        ConvertError: another format, or a length, count, type or offset that cannot be true.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self._file = file
        self._size = size
        self._position = 0
        num_tensors, num_fields = self._preamble()
        self.fields = self._metadata(num_fields)
        self.tensors = self._table(num_tensors)

    def _refuse(self, reason: str, part: str = "", remedy: str = "") -> ConvertError:
        return refusal(self.path, reason, part=part, remedy=remedy)

    def _take(self, count: int, part: str) -> bytes:
        """The next `count` bytes, once they are known to exist and the header is of sane size."""
        remaining = self._size - self._position
        if count > remaining:
            reason = f"needs {count} bytes at byte {self._position}, but only {remaining} remain"
            raise self._refuse(reason, part, _DAMAGED)
        if self._position + count > MAX_HEADER_BYTES:
            raise self._refuse(f"the header passes the limit of {MAX_HEADER_BYTES} bytes", part)
        data = self._file.read(count)
        if len(data) != count:
            raise self._refuse("the file became shorter while it was read", part)
        self._position += count
        return data

    def _u32(self, part: str) -> int:
        return int.from_bytes(self._take(4, part), "little")

    def _u64(self, part: str) -> int:
        return int.from_bytes(self._take(8, part), "little")

    def _string(self, part: str, limit: int | None = None) -> str:
        length = self._u64(part)
        if limit is not None and length > limit:
            raise self._refuse(f"has a name of {length} bytes; at most {limit} are allowed", part)
        try:
            return self._take(length, part).decode()
        except UnicodeDecodeError:
            raise self._refuse("holds a string that is not UTF-8", part) from None

    def _check_count(self, count: int, least_bytes: int, limit: int, part: str) -> None:
        """Refuse a count beyond `limit`, or one that the bytes that remain could not hold."""
        remaining = self._size - self._position
        if count * least_bytes > remaining:
            reason = f"is {count}, which takes at least {count * least_bytes} bytes"
            raise self._refuse(f"{reason}; {remaining} remain", part, _DAMAGED)
        if count > limit:
            raise self._refuse(f"is {count}; at most {limit} are allowed", part)

    def _preamble(self) -> tuple[int, int]:
        """Magic and version are checked; the two counts come back."""
        magic = self._take(4, "magic")
        if magic != _MAGIC:
            raise self._refuse(f"starts with {magic!r}, not {_MAGIC!r}: this is not a GGUF file")
        version = self._u32("version")
        if version and version % 2**16 == 0:
            raise self._refuse("is big-endian; little-endian GGUF files are supported")
        if version not in (2, 3):
            remedy = "convert it again with a current llama.cpp" if version < 2 else ""
            raise self._refuse(f"is {version}; 2 and 3 are supported", "version", remedy)
        num_tensors = self._u64("tensor count")
        num_fields = self._u64("field count")
        self._check_count(num_fields, _MIN_FIELD_BYTES, MAX_ENTRIES, "field count")
        self._check_count(num_tensors, _MIN_TENSOR_BYTES, MAX_ENTRIES, "tensor count")
        return num_tensors, num_fields

    def _metadata(self, count: int) -> dict[str, Value]:
        fields: dict[str, Value] = {}
        for index in range(count):
            key = self._string(f"key {index}", MAX_KEY_BYTES)
            if key in fields:
                raise self._refuse("appears twice", key)
            fields[key] = self._value(key, self._u32(key))
        return fields

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        scalar = self._scalar_type(key, kind)
        number = self._numbers(key, scalar, 1)[0]
        # A float32 as its writer typed it: 1e-05, not 9.999999747378752e-06.
        value: Value = float(str(number)) if scalar.str == "<f4" else number.item()
        return value

    def _array(self, key: str) -> Value:
        kind, count = self._u32(key), self._u64(key)
        if kind == _ARRAY:
            raise self._refuse("is an array of arrays, which no model file needs", key)
        if kind == _STRING:
            self._check_count(count, 8, MAX_STRINGS, key)
            return tuple(self._string(key) for _ in range(count))
        return self._numbers(key, self._scalar_type(key, kind), count)

    def _scalar_type(self, key: str, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise self._refuse(f"has value type {kind}, which GGUF does not define", key)
        return _SCALARS[kind]

    def _numbers(self, key: str, scalar: np.dtype[Any], count: int) -> Array:
        data = self._take(count * scalar.itemsize, key)
        if scalar.kind == "b" and not set(data) <= {0, 1}:
            raise self._refuse("holds a boolean that is neither 0 nor 1", key)
        return np.frombuffer(data, dtype=scalar)

    def _table(self, count: int) -> dict[str, TensorEntry]:
        alignment = self._alignment()
        table: dict[str, TensorEntry] = {}
        for index in range(count):
            entry = self._entry(index, alignment)
            if entry.name in table:
                raise self._refuse("appears twice", entry.name)
            table[entry.name] = entry
        data_start = -(-self._position // alignment) * alignment
        table = {
            name: replace(entry, start=data_start + entry.start) for name, entry in table.items()
        }
        self._check_places(table)
        return table

    def _alignment(self) -> int:
        value = self.fields.get("general.alignment", 32)
        if isinstance(value, int) and 1 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0:
            return value
        raise self._refuse(
            f"is {show(value)}; a power of two up to {MAX_ALIGNMENT} is needed", "general.alignment"
        )

    def _entry(self, index: int, alignment: int) -> TensorEntry:
        """One line of the table; `start` still counts from the beginning of the data."""
        name = self._string(f"tensor {index}", MAX_TENSOR_NAME_BYTES)
        num_dims = self._u32(name)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._refuse(f"has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed", name)
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims, name))
        number, start = self._u32(name), self._u64(name)
        if 0 in dims:
            raise self._refuse(f"has shape {dims}, which holds nothing", name)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._refuse(f"has ggml type {number}, which is not known", name) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if dims[0] % block:
            raise self._refuse(
                f"has rows of {dims[0]}, not whole {kind.name} blocks of {block}", name
            )
        if start % alignment:
            raise self._refuse(f"starts at {start}, not a multiple of {alignment}", name)
        num_bytes = math.prod(dims) // block * block_bytes
        return TensorEntry(name=name, shape=dims[::-1], kind=kind, start=start, num_bytes=num_bytes)

    def _check_places(self, table: dict[str, TensorEntry]) -> None:
        """Every tensor inside the file and none over another: little must not become much."""
        end, before = 0, ""
        for entry in sorted(table.values(), key=lambda entry: entry.start):
            if entry.start < end:
                raise self._refuse(f"lies over {before!r} in the file", entry.name)
            end, before = entry.start + entry.num_bytes, entry.name
            if end > self._size:
                what = f"shape {entry.shape} as {entry.kind.name}"
                reason = f"{what} ends at byte {end}; the file has {self._size}"
                raise self._refuse(reason, entry.name, _DAMAGED)
