"""The bundled model, asked as a person asks it, answers right about a long document."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
from browser_server import ServeProcess
from playwright.sync_api import expect

from longwing.evals.retrieval import lines

NUM_LINES = 500  # about 10,000 tokens


def bundled() -> Path | None:
    """The bundled model's folder, if this longwing has one."""
    spec = importlib.util.find_spec("longwing.tiny")
    places = (spec.submodule_search_locations or []) if spec else []
    found = [path.parent for place in places for path in sorted(Path(place).rglob("config.json"))]
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.skipif(bundled() is None, reason="this longwing has no bundled model")
def test_the_bundled_model_finds_a_line_among_ten_thousand_tokens(visit, tmp_path):
    prompt, (value,) = lines(random.Random(7), NUM_LINES, 0.5)
    document, _, question = prompt.partition("\n\nNow the record is over.")
    process = ServeProcess(
        str(bundled()), "--runs-dir", str(tmp_path / "runs"), "--context", "16k",
        LONGWING_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    try:
        page = visit(url=process.url).open()
        page.drop("record.txt", document)
        counted = page.at.locator("#reader .reader-facts .help").inner_text()
        assert 8_000 < int(re.search(r"[\d,]+", counted)[0].replace(",", "")) < 13_000
        page.ask("ask", f"Now the record is over.{question}")
        answer = page.answered("ask")
        assert re.findall(r"\d+", answer.locator(".text").inner_text())[-1] == value
        expect(answer.locator("button.quote").first).to_contain_text(value)
        page.ask("ask", f"Now the record is over.{question}")
        expect(page.answered("ask", 2).locator(".status")).to_contain_text("were remembered")
    finally:
        process.stop()
