"""An open GGUF file: typed access to its metadata, and its tensors as plain numbers.

The header has been walked and checked by `gguf_header.py` before anything here can be asked. The
arithmetic of the many ggml encodings is left to the `gguf` package; the file itself is read, not
mapped, so one that shrinks meanwhile gives an error message and not a bus error.

Shapes: O, I out and in features.
"""

import math
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from longwing.convert.gguf_header import Array, Header, TensorEntry, refusal, show
from longwing.errors import ConvertError

CHUNK_NUMBERS = 2**22
"""Numbers dequantised at a time: 16 MB as float32, however large the tensor."""


class GgufFile:
    """A GGUF file in one piece, open for reading; use it in a `with` statement.

    Opening walks the header (about 0.2 s for a vocabulary of 50,000 tokens) and reads no tensor.

    Args:
        path: the file.

    Attributes:
        fields: metadata by key, in the file's order.
        tensors: the table by tensor name, in the file's order.

    Raises:
        ConvertError: it cannot be read, is another format, or lies about a length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # opening a pipe would wait for ever
            raise refusal(path, "is not a file" if path.exists() else "does not exist")
        try:
            self._file = path.open("rb")
        except OSError as fault:
            raise refusal(path, f"cannot be read: {fault.strerror}") from fault
        try:
            header = Header(path, self._file, path.stat().st_size)
        except BaseException:
            self._file.close()
            raise
        self.fields = header.fields
        self.tensors = header.tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def refusal(self, reason: str, *, part: str = "", remedy: str = "") -> ConvertError:
        """A ConvertError that names this file."""
        return refusal(self.path, reason, part=part, remedy=remedy)

    def integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        """A whole number in [low, high]; one given per layer must be the same for all."""
        value = self.fields.get(key, default)
        if value is None:
            raise self.refusal("is missing", part=key)
        if isinstance(value, np.ndarray) and value.size and np.all(value == value[0]):
            value = value[0].item()
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(f"is {show(value)}, where one whole number is needed", part=key)
        if not low <= value <= high:
            raise self.refusal(f"is {value}, outside {low} to {high}", part=key)
        return value

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self.fields.get(key, default)
        if value is None:
            raise self.refusal("is missing", part=key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(f"is {show(value)}, where a number is needed", part=key)
        if not (math.isfinite(value) and low <= value <= high):
            raise self.refusal(f"is {value:g}, outside {low:g} to {high:g}", part=key)
        return float(value)

    def text(self, key: str, *, default: str | None = None) -> str:
        """A string."""
        value = self.fields.get(key, default)
        if value is None:
            raise self.refusal("is missing", part=key)
        if not isinstance(value, str):
            raise self.refusal(f"is {show(value)}, where a string is needed", part=key)
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean."""
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(f"is {show(value)}, where a boolean is needed", part=key)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of strings."""
        value = self.fields.get(key)
        if value is None:
            raise self.refusal("is missing", part=key)
        if not isinstance(value, tuple):
            raise self.refusal(f"is {show(value)}, where an array of strings is needed", part=key)
        return value

    def numbers(self, key: str, *, length: int) -> Array:
        """An array of `length` numbers."""
        value = self.fields.get(key)
        if value is None:
            raise self.refusal("is missing", part=key)
        if not isinstance(value, np.ndarray) or value.size != length or value.dtype.kind == "b":
            reason = f"is {show(value)}, where an array of {length} numbers is needed"
            raise self.refusal(reason, part=key)
        return value

    def check_readable(self, entry: TensorEntry) -> None:
        """Refuse a tensor whose encoding has no decoder, before any work; costs one block.

        Raises:
            ConvertError: integers, or an encoding that only llama.cpp itself decodes.
        """
        _, block_bytes = GGML_QUANT_SIZES[entry.kind]
        try:
            _decode(np.zeros((1, block_bytes), dtype=np.uint8), entry.kind)
        except NotImplementedError:
            reason = f"is encoded as {entry.kind.name}, which cannot be turned into weights"
            raise self.refusal(reason, part=entry.name) from None

    def read(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        """One tensor as `dtype`; costs the memory of the result and a few chunks of float32.

        Raises:
            ConvertError: a number is not finite, or does not fit `dtype`; or the file has shrunk.
        """
        rows, width = math.prod(entry.shape[:-1]), entry.shape[-1]
        row_bytes = entry.num_bytes // rows
        rows_at_once = max(1, CHUNK_NUMBERS // width)
        result_OI = torch.empty((rows, width), dtype=dtype)
        self._file.seek(entry.start)
        for first in range(0, rows, rows_at_once):
            part_OI = result_OI[first : first + rows_at_once]
            data = self._file.read(len(part_OI) * row_bytes)
            if len(data) != len(part_OI) * row_bytes:
                raise self.refusal("the file became shorter while it was read", part=entry.name)
            encoded = np.frombuffer(data, dtype=np.uint8).reshape(len(part_OI), row_bytes)
            exact_OI = torch.from_numpy(_decode(encoded, entry.kind))
            if not part_OI.copy_(exact_OI).isfinite().all():
                raise self._overflow(entry, exact_OI, dtype)
        return result_OI.view(entry.shape)

    def _overflow(self, entry: TensorEntry, exact: Tensor, dtype: torch.dtype) -> ConvertError:
        if not exact.isfinite().all():
            return self.refusal("holds a number that is NaN or infinite", part=entry.name)
        return self.refusal(
            f"holds {exact.abs().max().item():g}, beyond the largest {dtype} number, "
            f"{torch.finfo(dtype).max:g}",
            part=entry.name,
            remedy="convert to bfloat16 or float32",
        )


def _decode(encoded: Array, kind: GGMLQuantizationType) -> Array:
    """(rows, bytes) uint8 to (rows, I) float32, writable."""
    with np.errstate(over="ignore", invalid="ignore"):  # `read` refuses what is not finite
        if kind == GGMLQuantizationType.F64:
            return encoded.view("<f8").astype(np.float32)
        plain: Array = dequantize(encoded, kind)
    return plain if plain.flags.writeable else plain.copy()
