"""A PDF or an HTML page as text, in a process of its own: `python -m longwing.web.reader KIND`.

The file comes on stdin, lines of JSON go to stdout (`Said`), a page as soon as it is read. Both
formats can be made to take for ever or to fill the memory, so the process gives itself limits of
time and memory before it looks at a byte, can write no file, and is killed by whoever started it
(`documents.py`) when it is late. What it wrote is text, and nothing else of the file reaches the
server.
"""

import contextlib
import io
import json
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from typing import TypedDict

MAX_MEMORY = 1 << 30
MAX_CPU_S = 100
MAX_CHARACTERS = 8_000_000
MAX_PAGES = 10_000
MAX_WARNINGS = 20


class Said(TypedDict, total=False):
    """A line: something that a file says.

    Keys:
        title: its own, or None.
        num_pages: how many `page` lines will come; 1 unless said before the first.
        page: the text of the next page; HTML is one page.
        warnings: what a person should know.
        is_last: whether the file has been read to its end.
        refused: why it cannot be read; nothing comes after it.
    """

    title: str | None
    num_pages: int
    page: str
    warnings: list[str]
    is_last: bool
    refused: str


class _RefusedError(Exception):
    """The file cannot be read; says why."""


def read_pdf(content: bytes) -> Iterator[Said]:
    """The text of a PDF, page by page."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import FileNotDecryptedError, PyPdfError
    except ImportError:
        raise _RefusedError("not installed") from None
    try:
        pdf = PdfReader(io.BytesIO(content))
        if pdf.is_encrypted and not pdf.decrypt(""):
            raise _RefusedError("it is encrypted; remove the password first")
        title = pdf.metadata.title if pdf.metadata else None
        num_pages = len(pdf.pages)
    except FileNotDecryptedError:
        raise _RefusedError("it is encrypted; remove the password first") from None
    except (PyPdfError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise _RefusedError(f"it is damaged, or not a PDF ({type(error).__name__})") from None
    if num_pages > MAX_PAGES:
        raise _RefusedError(f"it has {num_pages} pages; {MAX_PAGES} are the most")
    yield {"title": str(title) if title else None, "num_pages": num_pages}
    warnings: list[str] = []
    left = MAX_CHARACTERS
    for number in range(num_pages):
        try:
            text = pdf.pages[number].extract_text()
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # each damaged page fails in its own way; the rest can be read
            text = ""
            warnings.append(f"page {number + 1} cannot be read ({type(error).__name__})")
        else:
            if not text.strip():
                warnings.append(f"page {number + 1} holds no text (a scan?)")
        left -= len(text)
        if left < 0:
            raise _RefusedError(f"it holds more than {MAX_CHARACTERS:,} characters")
        yield {"page": text}
    if len(warnings) > MAX_WARNINGS:
        warnings[MAX_WARNINGS:] = [f"and {len(warnings) - MAX_WARNINGS} pages more"]
    yield {"warnings": warnings, "is_last": True}


class _Text(HTMLParser):
    """What a browser would show of a page, roughly: blocks on lines of their own, no scripts."""

    _UNSEEN = frozenset({"script", "style", "template", "noscript", "svg", "head", "iframe"})
    _BLOCK = re.compile(
        "address|article|aside|blockquote|br|caption|center|d[dlt]|details|div|fieldset|"
        "figcaption|figure|footer|form|h[1-6r]|header|li|main|nav|[ou]l|option|p|pre|section|"
        "summary|table|tr"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title = ""
        self._hidden: list[str] = []
        self._in_title = False
        self._num_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a block, or what is not seen."""
        if tag in self._UNSEEN:
            self._hidden.append(tag)
        self._in_title = tag == "title" and not self.title
        self._num_pre += tag == "pre"
        self._break(tag)
        if tag in ("td", "th") and not self._hidden:
            self.parts.append("\t")

    def handle_endtag(self, tag: str) -> None:
        """End it."""
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        self._in_title = False
        self._num_pre -= tag == "pre" and self._num_pre > 0
        self._break(tag)

    def handle_data(self, data: str) -> None:
        """Keep what is seen."""
        if self._in_title:
            self.title += data
        elif not self._hidden:
            self.parts.append(data if self._num_pre else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if not self._hidden and self._BLOCK.fullmatch(tag):
            self.parts.append("\n")


_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([\w-]{1,30})", re.I)


def read_html(content: bytes) -> Iterator[Said]:
    """The text of a web page."""
    declared = _CHARSET.search(content[:4096])
    text = decode(content, declared[1].decode() if declared else None)
    parser = _Text()
    parser.feed(text)
    parser.close()
    lines = (line.strip(" \t") for line in "".join(parser.parts).split("\n"))
    shown = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    if len(shown) > MAX_CHARACTERS:
        raise _RefusedError(f"it holds more than {MAX_CHARACTERS:,} characters")
    yield {"title": " ".join(parser.title.split()) or None, "page": shown, "is_last": True}


_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def decode(content: bytes, declared: str | None = None) -> str:
    """Bytes as text: by their mark, as UTF-8, as they say, else as Western European."""
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            return content.decode(name, "replace").removeprefix("\ufeff")
    for name in ("utf-8", declared or "utf-8"):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return content.decode(name)
    return content.decode("cp1252", "replace")


READERS: Mapping[str, Callable[[bytes], Iterator[Said]]] = {"pdf": read_pdf, "html": read_html}
"""How each kind is read."""


def _limit() -> None:
    """Take less of the machine from here on, for good; and give way to the server."""
    os.nice(10)
    for what, most in (
        (resource.RLIMIT_AS, MAX_MEMORY),
        (resource.RLIMIT_CPU, MAX_CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # what cannot be lowered stays as it is
            resource.setrlimit(what, (most, most))


def main() -> None:
    """Read one file."""
    import logging

    logging.disable(logging.CRITICAL)  # pypdf's remarks quote the file
    _limit()
    try:
        for line in READERS[sys.argv[1]](sys.stdin.buffer.read()):
            _say(line)
    except _RefusedError as error:
        _say({"refused": str(error)})
    except (MemoryError, RecursionError):
        _say({"refused": "it needs too much memory to be read"})


def _say(line: Said) -> None:
    sys.stdout.buffer.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
