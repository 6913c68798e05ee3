"""PDF files by hand: as plain as they come, and as hostile as they get."""

import re
import zlib
from collections.abc import Sequence


def pdf_of(objects: Sequence[bytes]) -> bytes:
    """A file of these objects, numbered from 1; the first is the catalogue."""
    out = bytearray(b"%PDF-1.4\n")
    places = []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\n" % (len(objects) + 1)
    out += b"startxref\n%d\n%%%%EOF" % start
    return bytes(out)


def stream(content: bytes, more: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), more, content)


def text_pdf(pages: Sequence[str]) -> bytes:
    """A file with some lines of text on each page."""
    return pdf_with([stream(_written(text.encode("ascii").split(b"\n"))) for text in pages])


def _written(lines: Sequence[bytes]) -> bytes:
    escaped = (re.sub(rb"([\\()])", rb"\\\1", line) for line in lines)
    return b"BT /F1 12 Tf 14 TL 72 720 Td %s ET" % b" T* ".join(b"(%s) Tj" % one for one in escaped)


def pdf_with(contents: Sequence[bytes], kids: bytes | None = None) -> bytes:
    """A file with these streams as its pages."""
    first = 4
    places = [first + 2 * number for number in range(len(contents))]
    kids = b" ".join(b"%d 0 R" % place for place in places) if kids is None else kids
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(contents)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for place, content in zip(places, contents, strict=True):
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
        objects += [page % (place + 1) + b"/Resources << /Font << /F1 3 0 R >> >> >>", content]
    return pdf_of(objects)


def bomb(num_bytes: int) -> bytes:
    """A small file whose page grows to `num_bytes` when it is unpacked, twice over."""
    packer = zlib.compressobj(9)
    block = b" " * 2**20
    packed = b"".join(packer.compress(block) for _ in range(num_bytes // 2**20)) + packer.flush()
    twice = zlib.compress(packed, 9)
    return pdf_with([stream(twice, b"/Filter [/FlateDecode /FlateDecode]")])


def endless_pages() -> bytes:
    """A tree of pages that contains itself."""
    return pdf_with([stream(b"")], kids=b"2 0 R")


def endless_xref() -> bytes:
    """A table that says the former one is itself."""
    good = text_pdf(["x"])
    start = good.index(b"xref\n")
    return good.replace(b"/Root", b"/Prev %d /Root" % start)


def deep() -> bytes:
    """Arrays in arrays in arrays."""
    return pdf_of([b"<< /Type /Catalog /Pages 2 0 R >>", b"[" * 100_000 + b"]" * 100_000])


def slow(num_operators: int) -> bytes:
    """A page that takes long to walk through, alone."""
    return pdf_with([slow_page(num_operators)])


def slow_page(num_operators: int) -> bytes:
    """Its content."""
    content = zlib.compress(b"BT /F1 1 Tf " + b"(a)Tj T* " * num_operators + b"ET", 9)
    return stream(content, b"/Filter /FlateDecode")
