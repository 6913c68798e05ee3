"""`Documents`: a file that a person drops, as text, with its tokens counted.

Text and Markdown are decoded here; PDF and HTML are read by a child process (`reader.py`), which is
killed when it is late. A file is one body, without multipart; nothing is kept of it.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from longwing.errors import OverloadedError, RequestError
from longwing.tokenizer import Tokenizer
from longwing.web.reader import MAX_CHARACTERS, decode

MAX_BYTES = 32 * 2**20
PATIENCE_S = 120.0
"""Seconds that a file may take to be read."""
MAX_AT_ONCE = 2

KINDS: Mapping[str, str] = {
    "txt": "text",
    "text": "text",
    "log": "text",
    "md": "markdown",
    "markdown": "markdown",
    "html": "html",
    "htm": "html",
    "pdf": "pdf",
}
"""By the name's suffix."""

_KEPT = ("PYTHONPATH", "LD_LIBRARY_PATH")
"""Of the environment, what the child needs to start."""
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_PAGE_BREAK = "\n\n"


class NotInstalledError(RequestError):
    """The library that reads this kind is not there."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file as text.

    Attributes:
        name, kind: what it was, and as what it was read.
        title: its own, if it has one.
        text: all of it; pages are apart by an empty line.
        num_tokens: of the text alone.
        page_starts: where each page begins, in characters; None where there are no pages.
        warnings: what a person should know.
    """

    name: str
    kind: str
    title: str | None
    text: str
    num_tokens: int
    page_starts: tuple[int, ...] | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """As the page gets it."""
        starts = self.page_starts
        return {
            "name": self.name,
            "kind": self.kind,
            "title": self.title,
            "text": self.text,
            "characters": len(self.text),
            "tokens": self.num_tokens,
            "pages": None if starts is None else len(starts),
            "page_starts": None if starts is None else list(starts),
            "warnings": list(self.warnings),
        }


class Documents:
    """Reads files, a few at a time.

    Args:
        threads: where tokens are counted.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._num_at_work = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the few; taken before the file is received.

        Raises:
            OverloadedError: all are taken.
        """
        if self._num_at_work >= MAX_AT_ONCE:
            raise OverloadedError(f"{MAX_AT_ONCE} documents are being read, the most at a time", 2)
        self._num_at_work += 1
        try:
            yield
        finally:
            self._num_at_work -= 1

    async def read(self, name: str, content: bytes, tokenizer: Tokenizer) -> Document:
        """The file as text.

        Raises:
            RequestError: it is of no kind that can be read, or holds nothing to read.
        """
        kind = kind_of(name, content)
        title: str | None = None
        warnings: tuple[str, ...] = ()
        if kind in ("pdf", "html"):
            said = await _read_apart(kind, content)
            pages, title, warnings = said["pages"], said["title"], tuple(said["warnings"])
        else:
            pages = [_decoded(content)]
        pages = [_tidy(page) for page in pages]
        text = _PAGE_BREAK.join(pages)
        if not text.strip():
            scans = "; a scan must be put through text recognition first" if kind == "pdf" else ""
            raise RequestError(f"the document holds no text{scans}")
        loop = asyncio.get_running_loop()
        num_tokens = await loop.run_in_executor(self._threads, _count, tokenizer, text)
        lengths = (len(page) + len(_PAGE_BREAK) for page in pages)
        return Document(
            name=name,
            kind=kind,
            title=title and _tidy(title)[:300],
            text=text,
            num_tokens=num_tokens,
            page_starts=tuple(accumulate(lengths, initial=0))[:-1] if kind == "pdf" else None,
            warnings=warnings,
        )


def kind_of(name: str, content: bytes) -> str:
    """As what a file is to be read: a PDF says so itself, others by their names.

    Raises:
        RequestError: nobody can tell.
    """
    if content.startswith(b"%PDF-"):
        return "pdf"
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    if suffix not in KINDS:
        raise RequestError(
            f'files ending in "{suffix[:20]}" cannot be read; give one of {", ".join(KINDS)}'
        )
    if suffix == "pdf":
        if b"%PDF-" in content[:1024]:
            return "pdf"
        raise RequestError("this is not a PDF, though its name says so")
    return KINDS[suffix]


def _decoded(content: bytes) -> str:
    text = decode(content)
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"the document holds {len(text):,} characters; {MAX_CHARACTERS:,} are the most"
        )
    if text.count("\0") > 8 + len(text) / 100:
        raise RequestError("this is not text, though its name says so")
    return text


def _tidy(text: str) -> str:
    """Plain line ends, no control characters, and nothing that UTF-8 cannot say."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return _NOT_TEXT.sub("", plain).encode("utf-8", "ignore").decode()


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, special_tokens=False, add_bos=False))


async def _read_apart(kind: str, content: bytes) -> dict[str, Any]:
    """What the child says of the file.

    Raises:
        RequestError: it refused, died, or was late.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "longwing.web.reader", kind),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        start_new_session=True,
    )
    try:
        answer, _ = await asyncio.wait_for(process.communicate(content), PATIENCE_S)
    except TimeoutError:
        raise RequestError(f"the document could not be read within {PATIENCE_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode or not answer:
        raise RequestError("the document needs too much time or memory to be read")
    said: dict[str, Any] = json.loads(answer)
    if said.get("refused") == "not installed":
        raise NotInstalledError("reading PDF needs pypdf; install it with: pip install pypdf")
    if "refused" in said:
        raise RequestError(f"the document cannot be read: {said['refused']}")
    return said
