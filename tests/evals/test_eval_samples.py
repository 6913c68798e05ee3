"""What is asked: the published words, at any length and depth, the same for the same seed."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from eval_models import Blind, Oracle

from longwing.errors import EvalError
from longwing.evals.longchat import read_cases
from longwing.evals.quality import PROMPT, read_questions
from longwing.evals.retrieval import KINDS, LINE, LINES_HEAD, LINES_TAIL, Retrieval, largest
from longwing.evals.run import TASKS, Plan
from longwing.evals.task import Sample
from longwing.evals.words import NUM_LABELS, TOPICS, labels, sentences, turns, vocabulary


def made(task: str, *, length: int = 2048, **settings: object) -> list[Sample]:
    retrieval = Retrieval(task, lengths=[length], num_cases=6, **settings)  # type: ignore[arg-type]
    return list(retrieval.samples(retrieval.cells[0], Blind()))


def test_pass_key_prompt_is_the_published_one() -> None:
    prompt, (key,) = KINDS["passkey"].build(random.Random(0), 200, 0.1)
    first, before, told, after, asked = prompt.split("\n")
    assert first == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there."
    )
    assert told == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert asked == "What is the pass key? The pass key is"
    garbage = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    ) * 9
    assert before == garbage[:20]
    assert after == garbage[:180]  # from the beginning again, not from where the first part ended


def test_lines_are_framed_as_in_longchat(longchat: Path) -> None:
    case = read_cases(longchat, "lines")[200][0]
    label = re.search(r"in line (.+?)\?", case.prompt)[1]  # type: ignore[index]
    assert case.prompt.startswith(LINES_HEAD + "line ")
    assert case.prompt.endswith("\n" + LINES_TAIL.format(label=label))
    assert LINE.format(label=label, value=case.expected) in case.prompt
    prompt, _ = KINDS["lines"].build(random.Random(0), 40, 0.5)
    assert prompt.startswith(LINES_HEAD)
    assert prompt.endswith("I need the number. ")


def test_topics_are_framed_as_in_longchat(longchat: Path) -> None:
    theirs = read_cases(longchat, "topics")[5][0].prompt
    ours, _ = KINDS["topics"].build(random.Random(0), 30, 0)
    head, tail = "USER: I would like to discuss the topic of ", " Now the record ends."
    assert ours.partition(head)[0] == theirs.partition(head)[0]
    assert ours.partition(tail)[2] == theirs.partition(tail)[2]
    for mark in (" \n ASSISTANT: ", " \n USER: ", "let's talk about the next topic."):
        assert mark in ours
        assert mark in theirs


def test_quality_prompt_is_the_published_one(quality_file: Path) -> None:
    question = read_questions(quality_file)[0]
    assert question.prompt == (
        "You are provided a story and a multiple-choice question with 4 possible answers (marked "
        "by A, B, C, D). Choose the best answer by writing its corresponding letter (either A, B, "
        "C, or D).\n\nStory:\nStory 0\n\nIt was a dark night & long.\n\nQuestion and Possible "
        "Answers:\nWhat is number 0?\n (A) one\n (B) two\n (C) three\n (D) four\n\nAnswer: ("
    )
    assert PROMPT.endswith("Answer: (")


@pytest.mark.parametrize("task", KINDS)
def test_same_seed_gives_the_same_samples_and_another_seed_others(task: str) -> None:
    first, again, other = (made(task, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert not {sample.sha256 for sample in first} & {sample.sha256 for sample in other}
    assert len({sample.sha256 for sample in first}) == 6


@pytest.mark.parametrize("length", [1024, 3000, 32_768])
@pytest.mark.parametrize("task", KINDS)
def test_generated_case_fills_its_length_and_never_exceeds_it(task: str, length: int) -> None:
    retrieval = Retrieval(task, lengths=[length], num_cases=2)
    model = Blind()
    for sample in retrieval.samples(retrieval.cells[0], model):
        longest_unit = {"topics": 250, "facts": 25, "lines": 20, "passkey": 1}[task]
        assert length - longest_unit < retrieval.length(sample, model) <= length


@pytest.mark.parametrize("task", KINDS)
def test_needle_lies_at_its_depth(task: str) -> None:
    for sample in made(task, length=8192, depths=(0.0, 0.5, 1.0)):
        assert sample.depth is not None
        prompt = str(sample.prompt)
        if task == "facts":  # the first of four; the others lie anywhere
            found = sorted(prompt.find(f" is {value}.") / len(prompt) for value in sample.expected)
            assert any(abs(place - sample.depth) < 0.05 for place in found)
            continue
        needle = {"topics": "{}.", "lines": "is <{}>", "passkey": "key is {}."}[task]
        place = prompt.find(needle.format(sample.expected[0])) / len(prompt)
        assert abs(place - sample.depth) < 0.15


@pytest.mark.parametrize(
    ("num_cases", "expected"),
    [(20, (0.0, 0.25, 0.5, 0.75, 1.0) * 4), (7, (0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.25))],
)
def test_depths_take_turns_so_that_an_unfinished_cell_has_seen_all_alike(
    num_cases: int, expected: tuple[float, ...]
) -> None:
    retrieval = Retrieval("lines", lengths=[1024], num_cases=num_cases)
    depths = [sample.depth for sample in retrieval.samples(retrieval.cells[0], Blind())]
    assert tuple(depths) == expected


def test_fewer_cases_than_depths_are_spread_over_them() -> None:
    retrieval = Retrieval("lines", lengths=[1024], num_cases=2)
    depths = [sample.depth for sample in retrieval.samples(retrieval.cells[0], Blind())]
    assert depths == [0.0, 0.5]


def test_generated_words_do_not_occur_in_longchats_lines(longchat: Path) -> None:
    theirs = set((longchat / "label_words.txt").read_text().split())
    assert len(theirs) > 7000
    assert not vocabulary() & theirs


def test_generated_topics_are_none_of_longchats(longchat: Path) -> None:
    names = (longchat / "topics" / "topics.txt").read_text().splitlines()
    theirs = {name.strip().lower() for name in names}
    for cases in read_cases(longchat, "topics").values():
        theirs |= {case.expected.lower() for case in cases}
    assert len(theirs) > 90
    assert len(set(TOPICS)) == len(TOPICS) > 300
    assert not any(ours in name or name in ours for ours in TOPICS for name in theirs)


@pytest.mark.parametrize("count", [1, NUM_LABELS // 2, NUM_LABELS])
def test_labels_are_all_different_however_many(count: int) -> None:
    assert len(set(labels(random.Random(0), count))) == count


def test_filler_holds_no_digit_that_could_be_taken_for_an_answer() -> None:
    rng = random.Random(0)
    told = " ".join(next(sentences(rng)) for _ in range(40))
    spoken = " ".join(" ".join(next(turns(rng))) for _ in range(20))
    assert not re.search(r"\d", told + spoken)


@pytest.mark.parametrize("count", [lambda n: 40 + 19 * n, lambda n: 9 + n // 4 + n % 3])
@pytest.mark.parametrize("limit", [60, 1000, 50_000])
def test_largest_size_is_found_within_one_unit(count: Callable[[int], int], limit: int) -> None:
    size = largest(count, limit, least=1)
    assert size is not None
    assert count(size) <= limit
    assert count(size) + 20 > limit


def test_length_too_short_for_any_case_is_refused_with_what_it_takes() -> None:
    with pytest.raises(EvalError, match=r"topics at 64 tokens: .* take \d{3}; ask for a greater"):
        made("topics", length=64)


def test_topic_at_a_depth_is_asked_for_by_its_number() -> None:
    (sample,) = made("topics", length=20_000, depths=(1.0,))[:1]
    assert re.search(r"What is the \d+th|st|nd|rd topic we discussed\?", str(sample.prompt))
    assert Oracle().answer(str(sample.prompt)).lower() == f"the topic was {sample.expected[0]}!"


def test_pass_key_in_characters_has_the_published_sizes() -> None:
    plan = Plan(tasks=("passkey",), characters=(12_000, 38_000), cases=2)
    task = TASKS["passkey"](plan, Blind())
    assert [(cell.unit, cell.size) for cell in task.cells] == [
        ("characters", 12_000),
        ("characters", 38_000),
    ]
    for cell in task.cells:
        for sample in task.samples(cell, Blind()):
            _, before, _, after, _ = str(sample.prompt).split("\n")
            assert len(before) + len(after) == cell.size
