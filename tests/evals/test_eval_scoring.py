"""How answers are judged: the published rules, to their edges; and the figures made of them."""

import pytest

from longwing.evals.retrieval import KINDS
from longwing.evals.table import grid, rows, wilson


@pytest.mark.parametrize(
    ("task", "answer", "expected", "score"),
    [
        ("lines", "The <REGISTER_CONTENT> in line torpid-kid is <2416>.", ["2416"], 1),
        ("lines", "2416, no: 7", ["2416"], 0),
        ("lines", "line 7 holds 02416", ["2416"], 1),
        ("lines", "2,416", ["2416"], 0),
        ("lines", "24160", ["2416"], 0),
        ("lines", "none", ["2416"], 0),
        ("lines", "", ["2416"], 0),
        ("lines", "9" * 6000, ["2416"], 0),
        ("lines", "0", ["0"], 1),
        ("passkey", " 34112. Remember it. 5", ["34112"], 1),
        ("passkey", " not 5 but 34112", ["34112"], 0),
        ("passkey", " 341", ["34112"], 0),
        ("topics", "It was 'The Psychology of Creativity'.", ["The psychology of creativity"], 1),
        ("topics", "the psychology\n of  creativity", ["The psychology of creativity"], 1),
        ("topics", "psychology", ["The psychology of creativity"], 0),
        ("topics", "", ["The psychology of creativity"], 0),
        ("facts", "14, 15 and 16", ["14", "15", "16", "17"], 0.75),
        ("facts", "17 16 15 14", ["14", "15", "16", "17"], 1),
        ("facts", "1415", ["14", "15", "16", "17"], 0),
    ],
)  # fmt: skip
def test_answer_is_scored_as_published(
    task: str, answer: str, expected: list[str], score: float
) -> None:
    assert KINDS[task].score(answer, expected) == score


@pytest.mark.parametrize(
    ("right", "cases", "low", "high"),
    [  # from the closed form, to three places
        (0, 20, 0.0, 0.161),
        (20, 20, 0.839, 1.0),
        (10, 20, 0.299, 0.701),
        (42, 50, 0.715, 0.917),
        (1, 1, 0.207, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_interval_is_wilsons(right: int, cases: int, low: float, high: float) -> None:
    assert wilson(right, cases) == pytest.approx((low, high), abs=6e-4)


def case(index: int, score: float, depth: float | None, **more: object) -> dict[str, object]:
    return {
        "kind": "case", "task": "facts", "source": "generated", "size": 2048, "unit": "tokens",
        "index": index, "depth": depth, "sha256": str(index), "score": score,
        "correct": score == 1, "prompt_tokens": 1900, "seconds": 1.0, **more,
    }  # fmt: skip


def test_accuracy_counts_what_is_wholly_right_and_the_score_its_parts() -> None:
    (row,) = rows([case(0, 1.0, 0.0), case(1, 0.5, 0.5), case(2, 0.0, 1.0), case(3, 1.0, 1.0)])
    assert (row.accuracy, row.score, row.num_cases, row.length) == (0.5, 0.625, 4, 2048)


def test_case_that_was_too_long_counts_as_too_long_and_not_as_wrong() -> None:
    long = {**case(2, 0, 1.0), "needs": 9999}
    for name in ("score", "correct", "prompt_tokens", "seconds"):
        del long[name]
    (row,) = rows([case(0, 1.0, 0.0), case(1, 1.0, 0.5), long])
    assert (row.accuracy, row.num_cases, row.num_too_long) == (1.0, 2, 1)


def test_grid_keeps_few_depths_and_puts_many_into_bands() -> None:
    few = grid([case(i, i % 2, i % 3 / 2) for i in range(12)], "facts")
    assert sorted(spot.depth for spot in few) == [0.0, 0.5, 1.0]
    assert {spot.score for spot in few} == {0.5}
    many = grid([case(i, 1.0, i / 39) for i in range(40)], "facts")
    assert [spot.depth for spot in many] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert sum(spot.num_cases for spot in many) == 40
    assert grid([case(0, 1.0, 0.0), case(1, 1.0, 0.0)], "facts") == []
