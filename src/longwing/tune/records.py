"""Files to documents: token ids, and which of them are to be learned.

    FILE.txt     one document; every token is learned
    FILE.jsonl   one record a line:
                   {"text": …}                       every token is learned
                   {"prompt": …, "answer": …}        the answer and the end after it are
                   {"messages": [{"role", "content"}, …]}   what the assistant says is

Either may be packed with xz. Further fields of a record are not looked at. Texts longer than the
context are cut into pieces of it; a record with an answer is never cut, since half a question has
no answer: it is refused, or left out if asked for.

The one idea: a prompt is encoded just as `generate` will encode it, and what follows it in the
whole conversation is the answer. If the whole does not begin with the prompt's own tokens, the
model would be tuned on prompts that it will never see, so that is an error, no approximation.

Shape key: T tokens of a document.
"""

import hashlib
import lzma
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longwing.checkpoint import parse_object
from longwing.errors import CheckpointError, RequestError, TemplateError, TuningError
from longwing.tokenizer import Tokenizer

MAX_LINE_BYTES = 256 * 2**20
_SLICE = 100_000
"""Characters encoded at once: a book in one piece would take the tokenizer's time squared."""

_ENDINGS = (".txt", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text that attention stays within.

    Attributes:
        tokens_T: (T,) int32.
        learned_T: (T,) bool, the tokens to be learned.
    """

    tokens_T: Tensor
    learned_T: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """All documents of a run, in the order of their files.

    Attributes:
        documents: each of at least two tokens, one of them learned, and at most the context.
        num_skipped: records left out because they were too long.
        sha256: of all tokens and what is learned of them, hex.
    """

    documents: tuple[Document, ...]
    num_skipped: int
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return sum(len(document.tokens_T) for document in self.documents)

    @property
    def num_learned(self) -> int:
        """Tokens that are learned in full."""
        return sum(int(document.learned_T.sum()) for document in self.documents)


class Encoder:
    """Records to documents, for one model.

    Args:
        tokenizer: the model's.
        context: the longest document, in tokens.
        template: for records with a prompt: "auto" (the model's own, if it has one), "plain" (none)
            or a name; conversations need a template.
        ends: the config's ids that end an answer, for a tokenizer that names none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        template: str = "auto",
        ends: Sequence[int] = (),
    ) -> None:
        if template == "auto":
            template = "own" if tokenizer.has_chat_template else "plain"
        self.tokenizer = tokenizer
        self.context = context
        self.template = None if template == "own" else template
        framed = tokenizer.encode("")
        self.begin = [framed[0]] if framed and framed[0] == tokenizer.bos_id else []
        self.end = (sorted(tokenizer.eos_ids) or list(ends))[:1]
        if self.template not in (None, "plain", *tokenizer.template_names):
            known = ", ".join(("auto", "plain", *tokenizer.template_names))
            raise RequestError(f'template "{template}" is not one that this model can use: {known}')

    def text(self, text: str) -> Iterator[Document]:
        """A text as documents of at most the context; the end token closes the last."""
        ids = [*self.begin]
        for start in range(0, len(text), _SLICE):
            ids += self.tokenizer.encode(text[start : start + _SLICE], add_bos=False)
        ids += self.end
        for start in range(0, len(ids), self.context):
            piece = ids[start : start + self.context]
            if len(piece) > 1:
                yield _document(piece, [True] * len(piece))

    def answer(self, prompt: str, answer: str) -> Document:
        """A prompt and its answer."""
        if self.template == "plain" and not self.end:
            raise RequestError(
                "this model names no end-of-text token, so it could not learn where an answer "
                "ends; name one as eos_token in tokenizer_config.json, or choose a --template"
            )
        if self.template == "plain":
            before = self.tokenizer.encode(prompt)
            after = [*self.tokenizer.encode(answer, add_bos=False), *self.end]
            return _document(before + after, [False] * len(before) + [True] * len(after))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return self.messages(turns)

    def messages(self, messages: Sequence[dict[str, Any]]) -> Document:
        """A conversation, of which the assistant's turns are learned, their ends included."""
        if self.template == "plain":
            raise RequestError(
                "a conversation needs a chat template, and this model has none; choose one with "
                f"--template: {', '.join(self.tokenizer.template_names)}"
            )
        ids = self._chat(messages, prompt=False)
        learned = [False] * len(ids)
        for place, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            begin = self._chat(messages[:place], prompt=True) if place else []
            stop = self._chat(messages[: place + 1], prompt=False)
            if not place or ids[: len(begin)] != begin or ids[: len(stop)] != stop:
                raise RequestError(
                    f"message {place}: the template does not write the conversation so that it "
                    "begins with what the model is asked with; choose another with --template"
                )
            learned[len(begin) : len(stop)] = [True] * (len(stop) - len(begin))
        return _document(ids, learned)

    def _chat(self, messages: Sequence[dict[str, Any]], *, prompt: bool) -> list[int]:
        return self.tokenizer.chat(messages, template=self.template, add_generation_prompt=prompt)


def read_data(
    files: Sequence[Path],
    encoder: Encoder,
    *,
    vocab_size: int | None = None,
    prompt_weight: float = 0.0,
    skip_long: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingData:
    """Read and encode all files. Everything stays in memory, at 5 bytes a token.

    Args:
        files: their paths.
        encoder: the model's.
        vocab_size: rows of its embedding; a token beyond them is refused.
        prompt_weight: of prompts in the loss; at 0 a record needs an answer.
        skip_long: leave out records longer than the context, and count them.
        progress: told (bytes read, bytes in all).

    Raises:
        TuningError: a file or a record cannot be used (its file, line and reason are named), or
            there is no document at all.
    """
    documents, num_skipped = [], 0
    total, before = sum(_size(file) for file in files), 0
    for file in files:
        for where, at, made in _documents(file, encoder):
            for document in made:
                length = len(document.tokens_T)
                if length > encoder.context and not skip_long:
                    raise _too_long(where, document, encoder.context)
                if length > encoder.context:
                    num_skipped += 1
                    continue
                if not prompt_weight and not bool(document.learned_T[1:].any()):
                    raise TuningError(f"{where}: nothing in it is to be learned; give an answer")
                highest = int(document.tokens_T.max())
                if vocab_size is not None and highest >= vocab_size:
                    raise TuningError(
                        f"{where}: token {highest} is beyond the model's {vocab_size}; the "
                        "tokenizer in its folder is of another model"
                    )
                documents.append(document)
            if progress is not None:
                progress(before + at, total)
        before += _size(file)
    if not documents:
        left_out = f", and {num_skipped} records longer than the context" if num_skipped else ""
        names = ", ".join(str(file) for file in files) or "no file"
        raise TuningError(f"the training data ({names}) holds no document{left_out}")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.tokens_T).to_bytes(8, "little"))
        digest.update(document.tokens_T.numpy().tobytes() + document.learned_T.numpy().tobytes())
    return TrainingData(
        documents=tuple(documents), num_skipped=num_skipped, sha256=digest.hexdigest()
    )


def _documents(file: Path, encoder: Encoder) -> Iterator[tuple[str, int, list[Document]]]:
    """(where, bytes read so far, documents) for each record of a file."""
    kind = _kind(file)
    try:
        with file.open("rb") as raw, ExitStack() as stack:
            stream: Any = raw
            if file.suffix == ".xz":
                stream = stack.enter_context(lzma.open(raw))
            if kind == ".txt":
                yield str(file), _size(file), _text(stream.read(), str(file), encoder)
                return
            for number, line in enumerate(_lines(stream, file), start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, raw.tell(), _record(line, where, encoder)
    except (OSError, lzma.LZMAError, EOFError) as fault:
        raise TuningError(f"{file} cannot be read: {fault}") from fault


def _text(content: bytes, where: str, encoder: Encoder) -> list[Document]:
    """The documents of a text file."""
    try:
        return list(encoder.text(content.decode("utf-8")))
    except UnicodeDecodeError as fault:
        raise TuningError(f"{where}: byte {fault.start} is not UTF-8") from None
    except RequestError as fault:
        raise TuningError(f"{where}: {fault}") from fault


def _record(line: bytes, where: str, encoder: Encoder) -> list[Document]:
    """The documents of one line; every refusal says where."""
    try:
        return _parsed(parse_object(line, where), where, encoder)
    except CheckpointError as fault:
        raise TuningError(f"{where}: {fault.reason}") from None
    except (RequestError, TemplateError) as fault:
        raise TuningError(f"{where}: {fault}") from fault


def _parsed(record: Mapping[str, object], where: str, encoder: Encoder) -> list[Document]:
    """The documents of one record, by which fields it has."""
    kinds = [kind for kind in ("text", "messages", "prompt") if kind in record]
    if len(kinds) != 1:
        found = ", ".join(list(record)[:8]) or "nothing"
        raise TuningError(
            f'{where}: has {found}; a record needs "text", or "prompt" and "answer", or "messages"'
        )
    if kinds == ["messages"]:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise TuningError(f'{where}: "messages" is not a list of objects')
        return [encoder.messages(messages)]
    names = ("prompt", "answer") if kinds == ["prompt"] else ("text",)
    texts = []
    for name in names:
        value = record.get(name)
        if not isinstance(value, str):
            raise TuningError(f'{where}: "{name}" is {reprlib.repr(value)}, not a string')
        texts.append(value)
    return [encoder.answer(*texts)] if len(texts) == 2 else list(encoder.text(*texts))


def _lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise TuningError(f"{file}: a line is longer than {MAX_LINE_BYTES:,} bytes")
        yield line


def _document(ids: Sequence[int], learned: Sequence[bool]) -> Document:
    return Document(tokens_T=torch.tensor(ids, dtype=torch.int32), learned_T=torch.tensor(learned))


def _too_long(where: str, document: Document, context: int) -> TuningError:
    length, answer = len(document.tokens_T), int(document.learned_T.sum())
    return TuningError(
        f"{where}: prompt and answer take {length:,} tokens ({answer:,} of them the answer), and "
        f"the context is {context:,}; tune with --context {length}, shorten the record, or leave "
        "such records out with --skip-long"
    )


def _kind(file: Path) -> str:
    kind = Path(file.name.removesuffix(".xz")).suffix
    if kind not in _ENDINGS:
        raise TuningError(
            f"{file}: training data ends in {' or '.join(_ENDINGS)} (or that and .xz), not in "
            f"{kind or 'nothing'}"
        )
    return kind


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as fault:
        raise TuningError(f"{file} cannot be read: {fault.strerror}") from fault
