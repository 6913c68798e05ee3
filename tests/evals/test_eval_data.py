"""LongChat's and QuALITY's files: read as published, refused by file and line."""

import json
from pathlib import Path

import pytest
from eval_models import Blind, Oracle

from longwing.errors import EvalError
from longwing.evals.longchat import known_columns, read_cases
from longwing.evals.quality import plain_text, read_questions
from longwing.evals.retrieval import KINDS
from longwing.evals.run import TASKS, Plan
from longwing.tokenizer import Tokenizer
from tokenizer.tokenizer_folders import OPEN_ASSISTANT, falcon_json, write_folder


def test_longchat_cases_are_read_with_answer_and_depth(longchat: Path) -> None:
    lines = read_cases(longchat, "lines")
    assert {column: len(cases) for column, cases in lines.items()} == {200: 3, 300: 1}
    first = lines[200][0]
    assert (first.expected, first.depth) == ("2416", pytest.approx(7 / 199))
    topics = read_cases(longchat, "topics")
    assert topics[5][0].expected == "The psychology of creativity"
    for task, cases in (("lines", lines), ("topics", topics)):
        for case in (case for column in cases.values() for case in column):
            assert KINDS[task].score(Oracle().answer(case.prompt), [case.expected]) == 1


def test_columns_pick_files_and_an_unknown_one_is_refused_with_those_there(longchat: Path) -> None:
    assert list(read_cases(longchat, "lines", [300, 5])) == [300]
    assert known_columns(longchat) == {"topics": [5], "lines": [200, 300]}
    plan = Plan(tasks=("lines",), longchat=longchat, columns=(700,))
    with pytest.raises(EvalError, match=r"column 700: topics has 5; lines has 200, 300"):
        TASKS["lines"](plan, Blind())


def test_folder_without_cases_is_refused_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"topics/testcases holds no file like 5_topics\.jsonl"):
        read_cases(tmp_path, "topics")


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ('["a"]', "no JSON object"),
        ('{"prompt": "a"}', "not a case of LongChat's lines .KeyError: 'expected_number'"),
        (
            '{"prompt": 1, "expected_number": 2, "random_idx": ["a", 0], "num_lines": 3}',
            "TypeError",
        ),
        ("\xff", "not UTF-8"),
    ],
)
def test_malformed_line_is_named_with_its_file(
    longchat: Path, tmp_path: Path, broken: str, why: str
) -> None:
    good = (longchat / "lines/testcases/200_lines.jsonl").read_bytes().splitlines()[0]
    file = tmp_path / "lines" / "testcases" / "37_lines.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\n".join([good] * 36 + [broken.encode("latin-1"), good]))
    with pytest.raises(EvalError, match=rf"37_lines\.jsonl, line 37: .*{why}"):
        read_cases(tmp_path, "lines")


def test_falcon_lengths_are_within_the_published_columns(tmp_path: Path, longchat: Path) -> None:
    described = falcon_json(*OPEN_ASSISTANT)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, described, eos_token="<|endoftext|>"))
    columns = [("topics", 5, 2548, 3133), ("lines", 200, 3789, 3858), ("lines", 300, 5629, 5695)]
    for task, column, shortest, longest in columns:
        for case in read_cases(longchat, task)[column]:
            turn = [{"role": "user", "content": case.prompt}]
            assert shortest <= len(tokenizer.chat(turn, template="falconlite2")) <= longest


def test_old_form_of_quality_is_read_once_and_hard_is_what_annotators_in_a_hurry_missed(
    tmp_path: Path,
) -> None:
    article = {
        "unique_id": "7_X",
        "article": ["<p>\n", " One &amp; two.\n", "<br/>three\n", "</p>\n", "<p>four</p>"],
        "question1": "Which?",
        **{f"question1option{n}": f"option {n}" for n in range(1, 5)},
        "question1_gold_label": 3,
        "question1_annotator_speed_answers": [3, 3, 1, 1, 2],
        "question2": "Who?",
        **{f"question2option{n}": f"option {n}" for n in range(1, 5)},
        "question2_gold_label": "4",
        "question2_annotator_speed_answers": ["4", "4", "4", "1", "2"],
    }
    file = tmp_path / "old.jsonl"
    file.write_text((json.dumps(article) + "\n") * 2)
    first, second = read_questions(file)
    assert first.story == "One & two. three\n\nfour"
    assert (first.gold, first.hard, second.gold, second.hard) == (2, True, 3, False)


def test_html_becomes_text_without_what_is_not_shown() -> None:
    page = "<head><title>No</title><style>p {}</style></head><h1> A\n B</h1><p>c<i>d</i>\n\n e<p>f"
    assert plain_text(page) == "A B\n\ncd e\n\nf"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"article": "a", "questions": [{}]}', "KeyError"),
        ('{"article": "a", "questions": []}', "holds no question"),
        ('{"article": ["a"]}', "KeyError"),
        (
            '{"article": "a", "questions": [{"question": "q", "question_unique_id": "1", '
            '"options": ["a", "b"], "gold_label": 1, "difficult": 0}]}',
            "2 options",
        ),
    ],
)
def test_file_that_is_not_qualitys_is_refused(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(EvalError, match=why):
        read_questions(file)
