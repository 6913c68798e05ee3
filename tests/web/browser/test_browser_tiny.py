"""The bundled model, asked as a person asks it, answers right about long documents."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_server import ServeProcess
from pdf_files import text_pdf
from playwright.sync_api import expect

from longwing import tiny
from longwing.evals.retrieval import lines

NUM_LINES = 500  # about 10,000 tokens
LONG_MS = 600_000  # half a minute's work, on a machine that may have ten others' to do


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    root = tmp_path_factory.mktemp("bundled")
    process = ServeProcess(
        str(Path(tiny.__file__).parent / "model"), "--runs-dir", str(root / "runs"),
        "--context", "16k", "--num-pages", "1024", LONGWING_CACHE=str(root / "cache"),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.stop()


@pytest.mark.slow
def test_the_bundled_model_finds_a_line_among_ten_thousand_tokens(visit, bundled):
    document, question, value = record(NUM_LINES)
    page = visit(url=bundled.url).open()
    page.drop("record.txt", document)
    assert 8_000 < num_tokens(page) < 13_000
    page.ask("ask", question)
    answer = page.answered("ask", patience_ms=LONG_MS)
    assert re.findall(r"\d+", answer.locator(".text").inner_text())[-1] == value
    expect(answer.locator("button.quote").first).to_contain_text(value)
    page.ask("ask", question)
    expect(page.answered("ask", 2).locator(".status")).to_contain_text("were remembered")


@pytest.mark.slow
def test_the_bundled_model_finds_a_line_in_a_pdf_of_several_pages(visit, bundled):
    document, question, value = record(60)
    rows = document.split("\n")
    pages = [rows[start : start + 20] for start in range(0, len(rows), 20)]
    page = visit(url=bundled.url).open()
    page.drop("record.pdf", text_pdf(["\n".join(rows) for rows in pages]))
    assert 900 < num_tokens(page) < 1_600
    page.ask("ask", question)
    answer = page.answered("ask")
    assert re.findall(r"\d+", answer.locator(".text").inner_text())[-1] == value
    where = next(n for n, rows in enumerate(pages, 1) if any(value in row for row in rows))
    expect(answer.locator("button.quote").first).to_contain_text(f"page {where}")


def record(num_lines: int) -> tuple[str, str, str]:
    """A record of named lines, a question about one in its middle, and the answer."""
    prompt, (value,) = lines(random.Random(7), num_lines, 0.5)
    document, begins, question = prompt.partition("\n\nNow the record is over.")
    return document, f"{begins.strip()}{question}", value


def num_tokens(page) -> int:
    counted = page.at.locator("#reader .facts-line").inner_text()
    return int(re.search(r"[\d,]+", counted)[0].replace(",", ""))
