"""Documents: text of every kind, and files that are made to do harm."""

import asyncio
import json
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from pdf_files import (
    bomb,
    deep,
    endless_pages,
    endless_xref,
    pdf_with,
    slow,
    slow_page,
    stream,
    text_pdf,
)
from web_site import Site

from longwing import tiny
from longwing.tokenizer import Tokenizer
from longwing.web import documents, reader
from longwing.web.reader import decode, read_html
from longwing.web.token_counter import TokenCounter

FILE = {"content-type": "application/octet-stream"}


@pytest.fixture
def site(shelf_folder: Path, tmp_path: Path) -> Site:
    return Site(shelf_folder, tmp_path)


def send(site: Site, name: str, content: bytes) -> httpx.Response:
    return site.ask(f"/ui/api/documents?name={name}", method="POST", content=content, headers=FILE)


def events(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line[5:]) for line in answer.text.split("\n") if line.startswith("data:")]


def said(site: Site, name: str, content: bytes) -> Any:
    """What there is to say of the document, and its text."""
    *pieces, last = events(send(site, name, content))
    return {**last["document"], "text": "".join(piece["text"] for piece in pieces)}


def refusal(answer: httpx.Response) -> str:
    """Why it was refused: at once, or after some pieces."""
    last = events(answer)[-1] if answer.status_code == 200 else answer.json()
    assert last["error_type"] == "validation"
    return str(last["error"])


@pytest.mark.parametrize(
    ("name", "kind"), [("a.txt", "text"), ("a.b.MD", "markdown"), ("a.log", "text")]
)
def test_text_is_text_with_plain_line_ends(site: Site, name: str, kind: str) -> None:
    found = said(site, name, b"Hello\r\nw\x00orld\x1b[31m\r")
    assert (found["kind"], found["text"]) == (kind, "Hello\nworld[31m\n")
    assert (found["characters"], found["tokens"]) == (16, 16)  # a token a byte
    assert (found["pages"], found["page_starts"], found["warnings"]) == (None, None, [])


def test_tokens_are_counted_while_the_document_is_read(site: Site) -> None:
    content = b"The river rose. " * 2000
    *pieces, last = events(send(site, "a.txt", content))
    counts = [piece["tokens"] for piece in pieces]
    assert len(counts) > 2
    assert counts == sorted(set(counts))
    assert counts[0] == documents.PIECE  # a token a byte
    assert counts[-1] == last["document"]["tokens"] == len(content)
    assert [piece["share"] for piece in pieces] == sorted(piece["share"] for piece in pieces)
    assert pieces[-1]["share"] == 1


@pytest.mark.parametrize("which", ["bundled", "metaspace"])
def test_the_tokens_of_pieces_are_those_of_the_whole(which: str, shelf_folder: Path) -> None:
    folder = Path(tiny.__file__).parent / "model" if which == "bundled" else shelf_folder / "llama2"
    tokenizer = Tokenizer.from_folder(folder)
    draw = random.Random(3)
    words = [
        "the",
        "Überfall",
        "\n\n",
        "48213",
        "strong-box,",
        "   ",
        "鳥が",
        "réédité",
        "\U0001f986",
    ]
    text = " ".join(draw.choice(words) for _ in range(500))
    counter = TokenCounter(tokenizer)
    at = 0
    while at < len(text):
        stop = at + draw.choice([1, 7, 300, 900])
        counter.add(text[at:stop])
        at = stop
    assert counter.num_tokens == len(tokenizer.encode(text, add_bos=False))
    ids = tokenizer.encode(text, add_bos=False)
    assert counter.num_bytes == pytest.approx(len(str(ids).replace(" ", "")), rel=0.05)


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
    (line,) = read_html(page.encode())
    assert line["is_last"]


def test_a_declared_encoding_is_heeded() -> None:
    page = '<meta charset="koi8-r"><p>привет'.encode("koi8-r")
    assert [line["page"] for line in read_html(page)] == ["привет"]


def test_a_pdf_is_text_page_by_page(site: Site) -> None:
    content = text_pdf(["Hello page one", "And page two"])
    found = said(site, "named-wrongly.txt", content)
    assert found["kind"] == "pdf"
    assert found["pages"] == 2
    starts = found["page_starts"]
    assert starts[0] == 0
    assert found["text"][starts[0] :].startswith("Hello page one")
    assert found["text"][starts[1] :].startswith("And page two")


def test_the_pages_of_a_pdf_are_told_one_by_one(site: Site) -> None:
    content = text_pdf([f"Page number {number}" for number in range(1, 5)])
    *pieces, last = events(send(site, "a.pdf", content))
    assert [(piece["page"], piece["pages"]) for piece in pieces] == [(n, 4) for n in range(1, 5)]
    assert [piece["share"] for piece in pieces] == [0.25, 0.5, 0.75, 1]
    assert pieces[0]["tokens"] < pieces[1]["tokens"] < last["document"]["tokens"]


def test_who_leaves_while_a_document_is_read_ends_the_reading(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_AT_ONCE", 1)
    children = []

    async def recorded(*arguments: Any, **more: Any) -> Any:
        children.append(await start(*arguments, **more))
        return children[-1]

    start = asyncio.create_subprocess_exec
    monkeypatch.setattr(asyncio, "create_subprocess_exec", recorded)
    content = pdf_with([stream(b"BT /F1 9 Tf (One) Tj ET"), slow_page(3_000_000)])

    async def work(http):
        seen = asyncio.Event()
        body = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive():
            if (message := next(body, None)) is not None:
                return message
            await seen.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if b"One" in message.get("body", b""):
                seen.set()

        request = http.build_request("POST", "/ui/api/documents?name=a.pdf", headers=FILE)
        await site.app(
            {
                "type": "http", "method": "POST", "path": "/ui/api/documents", "root_path": "",
                "query_string": b"name=a.pdf", "headers": request.headers.raw, "scheme": "http",
                "http_version": "1.1", "server": ("localhost", 80), "client": ("127.0.0.1", 1),
            },
            receive,
            send,
        )  # fmt: skip
        return await http.post("/ui/api/documents?name=a.txt", content=b"x", headers=FILE)

    assert site.run(work).status_code == 200
    assert [child.returncode for child in children] == [-signal.SIGKILL]


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
    assert why in refusal(send(site, name, content))


@pytest.mark.parametrize(
    "content",
    [bomb(4 << 30), endless_pages(), endless_xref(), deep(), slow(3_000_000)],
    ids=["bomb", "endless pages", "endless xref", "deep", "slow"],
)
def test_a_hostile_pdf_costs_seconds_of_a_process_and_no_more(
    site: Site, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PATIENCE_S", 1.5)
    assert len(content) < 8 << 20
    answer = send(site, "a.pdf", content)
    assert answer.status_code in (200, 422), answer.text
    assert len(answer.content) < 1 << 20


def test_the_server_answers_while_a_pdf_is_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PATIENCE_S", 1.5)

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
        turns = [{"role": "user", "content": "word " * 1000}]
        body = {"messages": turns, "template": "plain"}
        prompt = await http.post("/ui/api/prompt", json=body)
        other = await http.post("/ui/api/load", json={"model": "x" * 2000})
        return fits, prompt, large, other

    assert [answer.status_code for answer in site.run(work)] == [200, 200, 413, 413]


def test_a_prompt_longer_than_other_bodies_takes_a_documents_place(
    shelf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_AT_ONCE", 0)

    async def work(http):
        bodies = [
            {"messages": [{"role": "user", "content": "x" * size}], "template": "plain"}
            for size in (10, 2000)
        ]
        return [await http.post("/ui/api/prompt", json=body) for body in bodies]

    answers = Site(shelf_folder, tmp_path, payload_limit=1000).run(work)
    assert [answer.status_code for answer in answers] == [200, 429]


def test_too_many_characters_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 100)
    answer = send(site, "a.txt", b"x" * 101)
    assert answer.status_code == 422
    assert "101 characters; 100 are the most" in refusal(answer)


def test_the_reader_refuses_too_many_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_CHARACTERS", 20)
    for read, content in ((reader.read_pdf, text_pdf(["x" * 30])), (read_html, b"y" * 30)):
        with pytest.raises(Exception, match="more than 20 characters"):
            list(read(content))


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
