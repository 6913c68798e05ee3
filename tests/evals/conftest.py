"""Data of the evaluations' tests: LongChat's first cases, and QuALITY files made up here."""

import json
from pathlib import Path

import pytest

LONGCHAT = Path(__file__).parents[1] / "data" / "longchat"


@pytest.fixture
def longchat() -> Path:
    return LONGCHAT


@pytest.fixture
def quality_file(tmp_path: Path) -> Path:
    """400 questions of 1.0.1's form about four stories; every other one is hard."""
    articles = []
    for story in range(4):
        questions = [
            {
                "question": f"What is number {number}?",
                "question_unique_id": f"{story}_{number}",
                "options": ["one", "two", "three", "four"],
                "gold_label": (7 * number + story) % 4 + 1,
                "difficult": number % 2,
            }
            for number in range(100)
        ]
        article = f"<h1>Story {story}</h1><p>It was a <i>dark</i>\nnight &amp; long.</p>"
        articles.append({"article_id": str(story), "article": article, "questions": questions})
    file = tmp_path / "quality.jsonl"
    file.write_text("".join(json.dumps(article) + "\n" for article in articles))
    return file


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """8,000 characters of text."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and back. " * 150)
    return file
