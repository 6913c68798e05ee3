"""`Calibration`: the token sequences that a quantiser shows the model.

Holds how texts become samples. Documents are encoded, joined with the end-of-text token between
them, and cut into samples of one length; which of them are taken, a seed decides. Samples of long
documents can be mixed in, each from inside one document, so that a model with extended context is
calibrated on positions it will serve.

A text is never read as special tokens, so what a chat's template puts between turns cannot be
written in one. A document may instead be given as token ids, "input_ids", and is then taken as is.

Without files the text that ships with the package is used (English prose, speeches and worked sums,
all free of restrictions; text/README.md), so that quantising works offline.
"""

import hashlib
import json
import lzma
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from longwing.errors import CalibrationError
from longwing.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "text" / "calibration.jsonl.xz"

_SLICE = 100_000
"""Characters encoded at once: a book in one piece would take the tokenizer's time squared."""

_ENOUGH = 8
"""Reading stops at this many times the tokens that are needed; corpora can be endless."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Samples of tokens, and what is needed to tell them from any others.

    Attributes:
        samples: (T,) int64 each.
        source: the files they came from, for people.
        sha256: of all token ids in order, hex.
    """

    samples: tuple[Tensor, ...]
    source: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Tokens in all samples."""
        return sum(len(sample) for sample in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(len(sample) for sample in self.samples)


def make_calibration(
    tokenizer: Tokenizer,
    files: Sequence[Path] = (),
    *,
    num_samples: int = 128,
    seqlen: int = 2048,
    num_long: int = 0,
    long_seqlen: int = 0,
    seed: int = 0,
) -> Calibration:
    """Read texts and cut samples from them.

    Args:
        tokenizer: the model's.
        files: .txt (one document), .jsonl (a field "text", or "input_ids" with the tokenizer's
            own ids, on every line) or .parquet (a column "text"; needs pyarrow); none means the
            bundled text.
        num_samples: samples of `seqlen` tokens.
        seqlen: their length.
        num_long: further samples, of `long_seqlen` tokens, each from within one document.
        long_seqlen: their length.
        seed: chooses among more windows than are needed.

    Raises:
        CalibrationError: a file that cannot be read, or too little text; says how much there is.
    """
    for name, value in (("samples", num_samples), ("seqlen", seqlen)):
        if value < 1:
            raise CalibrationError(f"{name} is {value}; at least 1 is needed")
    need = num_samples * seqlen + num_long * long_seqlen
    documents = _encoded(tokenizer, files or (BUNDLED,), _ENOUGH * need)
    rng = random.Random(seed)
    samples = _windows(documents, tokenizer, seqlen, num_samples, rng)
    samples += _long_windows(documents, long_seqlen, num_long, rng)
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little") + sample.numpy().tobytes())
    names = ", ".join(file.name for file in files) or "the text that ships with longwing"
    return Calibration(samples=tuple(samples), source=names, sha256=digest.hexdigest())


def _encoded(tokenizer: Tokenizer, files: Iterable[Path], enough: int) -> list[list[int]]:
    """Token ids of the documents, in order, until there are enough tokens."""
    documents: list[list[int]] = []
    count = 0
    read = ((file, document) for file in files for document in _documents(file))
    for source, document in read:
        if isinstance(document, str):
            ids = _encode(tokenizer, document)
        else:
            ids = _checked(tokenizer, document, source)
        if ids:
            documents.append(ids)
            count += len(ids)
        if count >= enough:
            break
    return documents


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, encoded slice by slice."""
    slices = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
    return [token for part in slices for token in tokenizer.encode(part, add_bos=False)]


def _checked(tokenizer: Tokenizer, ids: list[int], file: Path) -> list[int]:
    """Ids of a file, if the tokenizer has them all."""
    vocab_size = tokenizer.vocab_size
    for token in ids:
        if not 0 <= token < vocab_size:
            raise CalibrationError(
                f"{file}: input_ids hold {token}, and the model's tokenizer has ids 0 to "
                f"{vocab_size - 1}; make them with this model's tokenizer"
            )
    return ids


def _windows(
    documents: list[list[int]],
    tokenizer: Tokenizer,
    seqlen: int,
    num_samples: int,
    rng: random.Random,
) -> list[Tensor]:
    """Samples cut from all documents laid end to end."""
    end = sorted(tokenizer.eos_ids)[:1]
    ended = (ids if ids[-1:] == end else [*ids, *end] for ids in documents)
    stream = [token for ids in ended for token in ids]
    num_windows = len(stream) // seqlen
    if num_windows < num_samples:
        raise CalibrationError(
            f"the calibration text has {len(stream):,} tokens, and {num_samples} samples of "
            f"{seqlen} need {num_samples * seqlen:,}; give more text, or ask for less"
        )
    chosen = sorted(rng.sample(range(num_windows), num_samples))
    return [torch.tensor(stream[i * seqlen : (i + 1) * seqlen]) for i in chosen]


def _long_windows(
    documents: list[list[int]], long_seqlen: int, num_long: int, rng: random.Random
) -> list[Tensor]:
    """Samples each from within one document of at least that length."""
    if num_long == 0:
        return []
    if long_seqlen < 1:
        raise CalibrationError("long samples were asked for without their length")
    starts = [
        (ids, start)
        for ids in documents
        for start in range(0, len(ids) - long_seqlen + 1, long_seqlen)
    ]
    if len(starts) < num_long:
        longest = max(map(len, documents), default=0)
        raise CalibrationError(
            f"the calibration text holds {len(starts)} windows of {long_seqlen:,} tokens inside "
            f"one document, and {num_long} are needed; its longest document has {longest:,} tokens"
        )
    return [torch.tensor(ids[at : at + long_seqlen]) for ids, at in rng.sample(starts, num_long)]


def _documents(file: Path) -> Iterator[str | list[int]]:
    """The documents of one file, by its ending: texts, or token ids."""
    try:
        yield from _READERS[_kind(file)](file)
    except (OSError, UnicodeDecodeError, lzma.LZMAError, ValueError) as fault:
        raise CalibrationError(f"{file} cannot be read: {fault}") from fault


def _kind(file: Path) -> str:
    name = file.name.removesuffix(".xz")
    kind = Path(name).suffix
    if kind not in _READERS:
        raise CalibrationError(
            f"{file}: a calibration file ends in {', '.join(_READERS)}, not in {kind or 'nothing'}"
        )
    return kind


def _plain(file: Path) -> Iterator[str]:
    with (
        lzma.open(file, "rt", encoding="utf-8")
        if file.suffix == ".xz"
        else file.open(encoding="utf-8") as stream
    ):
        yield stream.read()


def _json_lines(file: Path) -> Iterator[str | list[int]]:
    with (
        lzma.open(file, "rt", encoding="utf-8")
        if file.suffix == ".xz"
        else file.open(encoding="utf-8") as stream
    ):
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            fields = record if isinstance(record, dict) else {}
            ids, text = fields.get("input_ids"), fields.get("text")
            if _is_ids(ids):
                yield ids
            elif ids is None and isinstance(text, str):
                yield text
            else:
                raise CalibrationError(
                    f'{file}, line {number}: no field "text" with a string, nor "input_ids" with '
                    "a list of token ids"
                )


def _is_ids(document: object) -> TypeGuard[list[int]]:
    return isinstance(document, list) and all(type(token) is int for token in document)


def _parquet(file: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(
            f"{file}: reading parquet needs pyarrow; pip install pyarrow"
        ) from None
    table = pyarrow.parquet.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
        raise CalibrationError(f'{file} has no column "text", only {table.schema_arrow.names}')
    for batch in table.iter_batches(columns=["text"]):
        yield from (value.as_py() for value in batch.column(0) if value.is_valid)


_READERS = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
