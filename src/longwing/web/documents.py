"""`Documents`: a file that a person drops, as text that comes in pieces, with its tokens counted.

Text and Markdown are decoded here; PDF and HTML are read by a child process (`reader.py`), which is
killed when it is late. A PDF comes page by page: each is counted while the next one is read. A file
is one body, without multipart; nothing is kept of it.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from longwing.errors import OverloadedError, RequestError
from longwing.tokenizer import Tokenizer
from longwing.web.reader import MAX_CHARACTERS, Said, decode
from longwing.web.token_counter import TokenCounter

MAX_BYTES = 32 * 2**20
PATIENCE_S = 120.0
"""Seconds that a file may take to be read."""
MAX_AT_ONCE = 2
PIECE = 8192
"""Characters that are counted, and told, at a time."""
MAX_LINE = 12 * MAX_CHARACTERS + 2**10
"""Bytes of a line of the reader's: a page whose every character is escaped twice."""

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
class Piece:
    """The next part of a document's text.

    Attributes:
        text: it.
        num_tokens: of the document so far.
        share: of the document that is read, from 0 to 1.
        page: which page the part is of, from 1; None where there are no pages.
        num_pages: of the document; None where there are none.
    """

    text: str
    num_tokens: int
    share: float
    page: int | None
    num_pages: int | None

    def to_json(self) -> dict[str, object]:
        """As the page gets it."""
        return {
            "text": self.text,
            "tokens": self.num_tokens,
            "share": round(self.share, 4),
            "page": self.page,
            "pages": self.num_pages,
        }


@dataclass(frozen=True, kw_only=True)
class Document:
    """What there is to say of a document whose text has been told.

    Attributes:
        name, kind: what it was, and as what it was read.
        title: its own, if it has one.
        num_characters, num_tokens: of the text alone.
        prompt_bytes: of its tokens, as a prompt of the API.
        page_starts: where each page begins, in characters; None where there are no pages.
        warnings: what a person should know.
    """

    name: str
    kind: str
    title: str | None
    num_characters: int
    num_tokens: int
    prompt_bytes: int
    page_starts: tuple[int, ...] | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """As the page gets it."""
        starts = self.page_starts
        facts = {
            "name": self.name,
            "kind": self.kind,
            "title": self.title,
            "characters": self.num_characters,
            "tokens": self.num_tokens,
            "prompt_bytes": self.prompt_bytes,
            "pages": None if starts is None else len(starts),
            "page_starts": None if starts is None else list(starts),
            "warnings": list(self.warnings),
        }
        return {"document": facts}


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

    async def read(
        self, name: str, content: bytes, tokenizer: Tokenizer
    ) -> AsyncGenerator[Piece | Document]:
        """The file's text, piece by piece, and in the end what there is to say of it.

        Raises:
            RequestError: it is of no kind that can be read, or holds nothing to read.
        """
        kind = kind_of(name, content)
        loop = asyncio.get_running_loop()
        counter = TokenCounter(tokenizer)
        so_far = _SoFar()
        async with contextlib.aclosing(_said(kind, content)) as lines:
            async for line in lines:
                for text, share in so_far.add(line):
                    await loop.run_in_executor(self._threads, counter.add, text)
                    yield Piece(
                        text=text,
                        num_tokens=counter.num_tokens,
                        share=share,
                        page=len(so_far.starts) if kind == "pdf" else None,
                        num_pages=so_far.num_pages if kind == "pdf" else None,
                    )
        if so_far.is_blank:
            scans = "; a scan must be put through text recognition first" if kind == "pdf" else ""
            raise RequestError(f"the document holds no text{scans}")
        yield Document(
            name=name,
            kind=kind,
            title=so_far.title and _tidy(so_far.title)[:300],
            num_characters=so_far.num_characters,
            num_tokens=counter.num_tokens,
            prompt_bytes=counter.num_bytes,
            page_starts=tuple(so_far.starts) if kind == "pdf" else None,
            warnings=tuple(so_far.warnings),
        )


class _SoFar:
    """What a file has said so far; its pages are apart by an empty line."""

    def __init__(self) -> None:
        self.title: str | None = None
        self.warnings: list[str] = []
        self.starts: list[int] = []
        self.num_pages = 1
        self.num_characters = 0
        self.is_blank = True

    def add(self, line: Said) -> Iterator[tuple[str, float]]:
        """Take a line of the reader's; pieces of its text, and which share is read after each."""
        self.title = line.get("title") or self.title
        self.num_pages = line.get("num_pages", self.num_pages)
        self.warnings += line.get("warnings", [])
        if "page" not in line:
            return
        page = _tidy(line["page"])
        text = _PAGE_BREAK + page if self.starts else page
        self.num_characters += len(text)
        self.starts.append(self.num_characters - len(page))
        self.is_blank &= not page.strip()
        for start in range(0, len(text), PIECE):
            read = min(1.0, (start + PIECE) / len(text))
            yield text[start : start + PIECE], (len(self.starts) - 1 + read) / self.num_pages


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


async def _said(kind: str, content: bytes) -> AsyncGenerator[Said]:
    """What the file says, line by line, whoever reads it.

    Raises:
        RequestError: the child refused, died, or was late.
    """
    if kind not in ("pdf", "html"):
        yield {"page": _decoded(content)}
        return
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "longwing.web.reader", kind),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        start_new_session=True,
        limit=MAX_LINE,
    )
    if process.stdin is not None:
        process.stdin.write(content)
        process.stdin.close()
    try:
        async with contextlib.aclosing(_lines(process.stdout)) as lines:
            async for line in lines:
                yield line
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # what it had written, too: an unread pipe stays open


async def _lines(stream: asyncio.StreamReader | None) -> AsyncGenerator[Said]:
    """The child's lines; its own time is measured, not that of whoever listens."""
    clock = asyncio.get_running_loop().time
    left_s = PATIENCE_S
    while stream is not None:
        began = clock()
        try:
            raw = await asyncio.wait_for(stream.readline(), left_s)
        except TimeoutError:
            raise RequestError(f"the document could not be read within {PATIENCE_S:g} s") from None
        except ValueError:
            raise RequestError("the document's pages are too long to be read") from None
        left_s -= clock() - began
        if not raw.endswith(b"\n"):
            raise RequestError("the document needs too much time or memory to be read")
        line: Said = json.loads(raw)
        if line.get("refused") == "not installed":
            raise NotInstalledError("reading PDF needs pypdf; install it with: pip install pypdf")
        if "refused" in line:
            raise RequestError(f"the document cannot be read: {line['refused']}")
        yield line
        if line.get("is_last"):
            return
