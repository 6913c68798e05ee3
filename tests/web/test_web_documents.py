"""Documents: text of every kind, and files that are made to do harm."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from pdf_files import bomb, deep, endless_pages, endless_xref, pdf_with, slow, stream, text_pdf
from web_site import Site

from longwing.web import documents, reader
from longwing.web.reader import decode, read_html

FILE = {"content-type": "application/octet-stream"}


@pytest.fixture
def site(shelf_folder: Path, tmp_path: Path) -> Site:
    return Site(shelf_folder, tmp_path)


def send(site: Site, name: str, content: bytes) -> httpx.Response:
    return site.ask(f"/ui/api/documents?name={name}", method="POST", content=content, headers=FILE)


def said(site: Site, name: str, content: bytes) -> Any:
    answer = send(site, name, content)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("name", "kind"), [("a.txt", "text"), ("a.b.MD", "markdown"), ("a.log", "text")]
)
def test_text_is_text_with_plain_line_ends(site: Site, name: str, kind: str) -> None:
    found = said(site, name, b"Hello\r\nw\x00orld\x1b[31m\r")
    assert (found["kind"], found["text"]) == (kind, "Hello\nworld[31m\n")
    assert (found["characters"], found["tokens"]) == (16, 16)  # a token a byte
    assert (found["pages"], found["page_starts"], found["warnings"]) == (None, None, [])


def test_special_tokens_in_a_document_are_text(site: Site) -> None:
    assert said(site, "a.txt", b"<end>")["tokens"] == 5


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("naïve".encode(), "naïve"),
        ("naïve".encode("utf-8-sig"), "naïve"),
        ("naïve".encode("utf-16"), "naïve"),
        ("naïve".encode("cp1252"), "naïve"),
        (b"\xff\xfe\x00\xd8", "\ufffd"),
    ],
)
def test_every_common_encoding_is_read(content: bytes, text: str) -> None:
    assert decode(content) == text


def test_html_is_what_a_browser_would_show(site: Site) -> None:
    page = (
        "<!doctype html><html><head><title> A &amp;\n B </title><style>p{}</style></head><body>"
        "<h1>Head</h1><script>evil()</script><p>one   <b>two</b><br>three</p>"
        "<table><tr><th>a</th><td>b</td></tr></table><pre>x\n  y</pre>"
        "<svg><text>no</text></svg><p>&lt;script&gt;</p></body></html>"
    )
    found = said(site, "page.html", page.encode())
    assert found["title"] == "A & B"
    assert found["text"] == "Head\n\none two\nthree\n\na\tb\n\nx\ny\n\n<script>"


@pytest.mark.parametrize(
    "page",
    [
        "<div>" * 100_000 + "deep",
        "<" * 50_000 + "<p>deep",
        "<!--" * 20_000 + "--><p>deep",
        "<script>" * 1000 + "</script><p>deep",
        '<meta charset="no-such">deep',
        "<a " + "x=1 " * 50_000,
    ],
)
def test_html_that_makes_no_sense_ends_soon(page: str) -> None:
    assert isinstance(read_html(page.encode())["pages"], list)


def test_a_declared_encoding_is_heeded() -> None:
    page = '<meta charset="koi8-r"><p>привет'.encode("koi8-r")
    assert read_html(page)["pages"] == ["привет"]


def test_a_pdf_is_text_page_by_page(site: Site) -> None:
    content = text_pdf(["Hello page one", "And page two"])
    found = said(site, "named-wrongly.txt", content)
    assert found["kind"] == "pdf"
    assert found["pages"] == 2
    starts = found["page_starts"]
    assert found["text"][starts[0] :].startswith("Hello page one")
    assert found["text"][starts[1] :].startswith("And page two")


def test_a_page_without_text_is_told(site: Site) -> None:
    content = pdf_with([stream(b"BT /F1 9 Tf (seen) Tj ET"), stream(b"")])
    assert said(site, "a.pdf", content)["warnings"] == ["page 2 holds no text (a scan?)"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.pdf", pdf_with([stream(b"")]), "holds no text; a scan"),
        ("a.pdf", b"%PDF-1.4 nothing", "damaged"),
        ("a.pdf", b"MZ", "not a PDF"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"\x00\x01" * 500, "not text"),
        ("a.exe", b"x", '"exe" cannot be read'),
        ("noname", b"x", "cannot be read"),
        ("", b"x", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(
    site: Site, name: str, content: bytes, why: str
) -> None:
    answer = send(site, name, content)
    assert answer.status_code == 422, answer.text
    assert why in answer.json()["error"]


@pytest.mark.parametrize(
    "content",
    [bomb(4 << 30), endless_pages(), endless_xref(), deep(), slow(3_000_000)],
    ids=["bomb", "endless pages", "endless xref", "deep", "slow"],
)
def test_a_hostile_pdf_costs_seconds_of_a_process_and_no_more(
    site: Site, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PATIENCE_S", 4.0)
    assert len(content) < 8 << 20
    answer = send(site, "a.pdf", content)
    assert answer.status_code in (200, 422), answer.text
    assert len(answer.content) < 1 << 20


def test_the_server_answers_while_a_pdf_is_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PATIENCE_S", 2.0)

    async def work(http):
        path, content = "/ui/api/documents?name=a.pdf", slow(3_000_000)
        calls = [http.post(path, content=content, headers=FILE) for _ in range(2)]
        slow_ones = [asyncio.ensure_future(call) for call in calls]
        while True:
            health = await http.get("/health")
            third = await http.post(path, content=b"x", headers=FILE)
            if third.status_code == 429:
                break
        return health, third, [answer.status_code for answer in await asyncio.gather(*slow_ones)]

    health, third, slow_ones = site.run(work)
    assert health.status_code == 200
    assert "retry-after" in third.headers
    assert slow_ones == [422, 422]


def test_a_file_may_be_larger_than_a_request_and_not_larger_than_the_limit(
    shelf_folder: Path, tmp_path: Path
) -> None:
    site = Site(shelf_folder, tmp_path, payload_limit=1000)

    async def work(http):
        path = "/ui/api/documents?name=a.txt"
        fits = await http.post(path, content=b"word " * 1000, headers=FILE)
        announced = {**FILE, "content-length": str(documents.MAX_BYTES + 1)}
        large = await http.post(path, content=b"x", headers=announced)
        body = {"model": "x" * 2000}
        return fits, large, await http.post("/ui/api/load", json=body)

    assert [answer.status_code for answer in site.run(work)] == [200, 413, 413]


def test_too_many_characters_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 100)
    answer = send(site, "a.txt", b"x" * 101)
    assert answer.status_code == 422
    assert "101 characters; 100 are the most" in answer.json()["error"]


def test_the_reader_refuses_too_many_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_CHARACTERS", 20)
    for read, content in ((reader.read_pdf, text_pdf(["x" * 30])), (read_html, b"y" * 30)):
        with pytest.raises(Exception, match="more than 20 characters"):
            read(content)


def test_a_conversation_becomes_tokens_under_any_template_that_can_be_used(site: Site) -> None:
    turns = [{"role": "user", "content": "Hi <end>"}, {"role": "assistant", "content": "Oh"}]

    async def work(http):
        state = (await http.get("/ui/api/state")).json()["model"]
        name = state["templates"][0]
        body = {"messages": turns, "template": name}
        whole = (await http.post("/ui/api/prompt", json=body)).json()
        more = (await http.post("/ui/api/prompt", json={**body, "continue_final": True})).json()
        refused = [
            await http.post("/ui/api/prompt", json={"messages": turns}),  # it has none of its own
            await http.post("/ui/api/prompt", json={**body, "template": "{{ 7 * 7 }}"}),
            await http.post("/ui/api/prompt", json={"messages": []}),
            await http.post("/ui/api/prompt", json={"messages": [{"role": "user"}]}),
            await http.post("/ui/api/prompt", json={**body, "tools": []}),
        ]
        ids = {"model": state["model_id"], "prompt": whole["ids"], "max_tokens": 1}
        return state, whole, more, refused, await http.post("/v1/completions", json=ids)

    state, whole, more, refused, completion = site.run(work)
    assert not state["has_chat_template"]
    assert whole["template"] == state["templates"][0]
    assert whole["tokens"] == len(whole["ids"])
    assert 256 not in whole["ids"]  # <end>, as typed, is text
    assert whole["ids"][: more["tokens"]] == more["ids"]
    assert [answer.status_code for answer in refused] == [422] * 5
    assert completion.status_code == 200


def test_a_document_needs_its_own_content_type(site: Site) -> None:
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json"):
        answer = site.ask(
            "/ui/api/documents?name=a.txt",
            method="POST",
            content=b"x",
            headers={"content-type": kind},
        )
        assert answer.status_code == 415
