"""Runs: every case once, on record, whatever interrupts them."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from eval_models import Blind, Oracle

from longwing.errors import EvalError
from longwing.evals.journal import Journal, read_run
from longwing.evals.quality import LETTERS, read_questions
from longwing.evals.run import TASKS, Plan, run
from longwing.evals.table import ORDER, rows, wilson
from longwing.evals.task import Answer

RETRIEVAL = ("topics", "lines", "passkey", "facts")
PLAN = Plan(tasks=("lines", "passkey"), lengths=(1024, 2048), cases=4)


def test_oracle_is_right_always_and_the_blind_one_never(longchat: Path) -> None:
    for settings in ({"lengths": (1024, 8192)}, {"longchat": longchat}):
        plan = Plan(tasks=RETRIEVAL, cases=5, **settings)  # type: ignore[arg-type]
        for model, accuracy in ((Oracle(), 1.0), (Blind(), 0.0)):
            found = rows(run(model, plan).records)
            assert {row.task for row in found} == set(RETRIEVAL)
            assert [row.accuracy for row in found] == [accuracy] * len(found)
            assert [row.chance for row in found] == [0.0] * len(found)


def test_oracle_knows_every_letter_and_the_blind_one_a_quarter(quality_file: Path) -> None:
    questions = read_questions(quality_file)
    key = {question.prompt: LETTERS[question.gold] for question in questions}
    plan = Plan(tasks=("quality",), quality=quality_file)
    whole, hard = rows(run(Oracle(key=key), plan).records)
    assert (whole.accuracy, whole.num_cases, hard.num_cases) == (1.0, 400, 200)
    for row in rows(run(Blind(), plan).records):
        assert row.chance == 0.25
        assert row.low is not None
        assert row.high is not None
        assert row.low < 0.25 < row.high


def test_two_runs_of_one_plan_ask_the_same(tmp_path: Path) -> None:
    prompts = [[r["sha256"] for r in run(model, PLAN).records] for model in (Oracle(), Blind())]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 16


class Killed(Oracle):
    """Ends the process, as it were, at its n-th answer."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.left = iter(range(last))  # threads take from it one at a time

    def answer(self, prompt: str) -> str:
        if next(self.left, None) is None:
            raise KeyboardInterrupt
        return super().answer(prompt)


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("last", [0, 5, 15])
def test_interrupted_run_goes_on_and_ends_in_the_same_table(
    tmp_path: Path, last: int, concurrency: int
) -> None:
    whole = run(Oracle(), PLAN)
    out = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Killed(last), PLAN, out, concurrency=concurrency)
    assert len(read_run(out).records) == last  # nothing finished is lost
    model = Oracle()
    again = run(model, PLAN, out, concurrency=concurrency)
    assert model.asked == 16 - last
    assert rows(again.records) == rows(whole.records)
    assert rows(read_run(out).records) == rows(again.records)


HANGING = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from eval_models import Oracle
from test_eval_run import PLAN
from longwing.evals.run import run

class Hanging(Oracle):
    def answer(self, prompt):
        if self.asked > 6:
            print("asked", flush=True)
            sys.stdin.read()
        return super().answer(prompt)

run(Hanging(), PLAN, Path(sys.argv[1]))
"""


def test_killed_process_loses_nothing_that_it_finished(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    command = [sys.executable, "-c", HANGING, str(out), *sys.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"asked\n"
        with pytest.raises(EvalError, match="being written by another run"):
            run(Oracle(), PLAN, out)
        process.kill()
    assert len(read_run(out).records) == 6
    model = Oracle()
    again = run(model, PLAN, out)
    assert model.asked == 10
    assert rows(again.records) == rows(run(Oracle(), PLAN).records)


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_line_that_was_cut_short_is_asked_again(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "run.jsonl"
    whole = run(Oracle(), PLAN, out)
    out.write_bytes(out.read_bytes()[:-cut])
    assert len(read_run(out).records) == 15
    model = Oracle()
    assert run(model, PLAN, out).records == whole.records
    assert model.asked == 1


def test_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    run(Oracle(), PLAN, out)
    before, model = out.read_bytes(), Oracle()
    run(model, PLAN, out)
    assert model.asked == 0
    assert out.read_bytes() == before


def test_header_says_what_was_run(tmp_path: Path) -> None:
    run(Oracle(dtype="float16"), PLAN, tmp_path / "run.jsonl")
    header = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])
    assert header["model"] == {"name": "oracle", "context": 100_000, "dtype": "float16"}
    assert header["plan"]["lengths"] == [1024, 2048]
    assert header["longwing"]


def test_case_on_record_has_all_that_a_table_needs() -> None:
    record = run(Oracle(), PLAN).records[0]
    assert record["answer"] == f"The <REGISTER_CONTENT> in line {_line(record)}."
    for name in ("sha256", "depth", "prompt_tokens", "new_tokens", "seconds", "score"):
        assert record[name] is not None


def _line(record: object) -> str:
    return record["answer"].removeprefix("The <REGISTER_CONTENT> in line ")[:-1]  # type: ignore[index]


def test_run_of_another_plan_or_model_is_not_continued_unless_told_to_begin_anew(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run.jsonl"
    run(Oracle(), PLAN, out)
    other = Plan(tasks=PLAN.tasks, lengths=PLAN.lengths, cases=4, seed=1)
    with pytest.raises(EvalError, match=r"another run: plan seed 0, now 1\. .*--restart"):
        run(Oracle(), other, out)
    with pytest.raises(EvalError, match='model name "oracle", now "blind"'):
        run(Blind(), PLAN, out)
    assert len(run(Blind(), PLAN, out, restart=True).records) == 16


def test_case_that_has_changed_since_is_not_taken_for_done(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    run(Oracle(), PLAN, out)
    out.write_text(out.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(EvalError, match=r"case 0 of lines at 1024 tokens was another one"):
        run(Oracle(), PLAN, out)


def test_two_runs_cannot_write_one_record(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    with (
        Journal.opened(out, {"kind": "run", "model": {}}),
        pytest.raises(EvalError, match=r"being written by another run"),
    ):
        run(Oracle(), PLAN, out)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ('{"kind": "run", "model": {}}\n{"kind": "case"}\n', r"line 2: not the record"),
        (
            '{"kind": "run", "model": {}}\n{"kind": \n',
            r"line 2: not valid JSON: Expecting",
        ),
        ('{"task": "lines"}\n', r"line 1: not the record"),
    ],
)
def test_file_that_is_no_run_is_refused_by_line(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(text)
    with pytest.raises(EvalError, match=why):
        read_run(file)
    with pytest.raises(EvalError, match=r"missing\.jsonl cannot be read: No such file"):
        read_run(tmp_path / "missing.jsonl")


def test_cell_beyond_the_context_is_told_and_not_asked(tmp_path: Path) -> None:
    model = Oracle(context_len=1500)  # and the oracle refuses a prompt that is longer
    out = tmp_path / "run.jsonl"
    found = rows(run(model, PLAN, out).records)
    assert [(row.length, row.num_cases, row.num_too_long, row.accuracy) for row in found] == [
        (1024, 4, 0, 1.0),
        (2048, 0, 4, None),
        (1024, 4, 0, 1.0),
        (2048, 0, 4, None),
    ]
    size = out.stat().st_size
    run(model, PLAN, out)
    assert out.stat().st_size == size


def test_given_case_beyond_the_context_is_told_and_not_cut(longchat: Path) -> None:
    plan = Plan(tasks=("lines",), longchat=longchat)
    model = Oracle(context_len=3100)
    found = {row.size: row for row in rows(run(model, plan).records)}
    assert (found[200].num_cases, found[200].num_too_long) == (3, 0)
    assert (found[300].num_cases, found[300].num_too_long, found[300].accuracy) == (0, 1, None)


class Slow(Oracle):
    """Answers only once so many are asked at the same time."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(together, timeout=20)

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        self.barrier.wait()
        return super().generate(prompt, max_new_tokens, stop, chat=chat)


def test_as_many_are_asked_at_a_time_as_may_be() -> None:
    records = run(Slow(4), PLAN, concurrency=4).records
    assert len(records) == 16
    assert all(record["correct"] for record in records)


class Failing(Oracle):
    """The server goes away after five answers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = iter(range(5))

    def answer(self, prompt: str) -> str:
        if next(self.left, None) is None:
            raise EvalError("the server has gone")
        return super().answer(prompt)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_failing_model_ends_the_run_and_keeps_what_it_said(
    tmp_path: Path, concurrency: int
) -> None:
    out = tmp_path / "run.jsonl"
    with pytest.raises(EvalError, match="the server has gone"):
        run(Failing(), PLAN, out, concurrency=concurrency)
    assert len(read_run(out).records) == 5


def test_progress_counts_tokens_to_the_end_and_only_what_is_left(tmp_path: Path) -> None:
    out, told = tmp_path / "run.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        run(Killed(12), PLAN, out)
    run(Oracle(), PLAN, out, progress=lambda done, total: told.append((done, total)))
    assert told == [(2048 * n, 4 * 2048) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tasks": ("lines", "sums")}, 'task "sums" is not one of topics, lines, passkey'),
        ({"tasks": ()}, "no task is given"),
        ({"tasks": ("lines",), "depths": (1.5,)}, "a depth is between 0"),
        ({"tasks": ("lines",), "lengths": (0,)}, "a length of 0 is too small"),
        ({"tasks": ("lines",), "columns": (5,)}, "columns are LongChat's"),
        ({"tasks": ("lines",), "characters": (5,)}, "are for passkey"),
        ({"tasks": ("lines",), "cases": 0}, "cases is 0"),
    ],
)
def test_plan_that_no_run_can_have_is_refused(settings: dict[str, object], why: str) -> None:
    with pytest.raises(EvalError, match=why):
        Plan(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["quality", "perplexity"])
def test_task_without_its_data_says_how_to_give_it(task: str) -> None:
    with pytest.raises(EvalError, match=rf"{task} needs .*--data FILE"):
        TASKS[task](Plan(tasks=(task,)), Blind())


def test_lengths_that_nobody_gave_double_up_to_the_context() -> None:
    task = TASKS["lines"](Plan(tasks=("lines",)), Blind(context_len=5000))
    assert [cell.size for cell in task.cells] == [1024, 2048, 4096]


def test_interval_of_a_row_is_that_of_its_cases() -> None:
    (row, *_) = rows(run(Oracle(), PLAN).records)
    assert (row.low, row.high) == wilson(4, 4)


def test_every_task_has_its_place_in_tables() -> None:
    assert set(ORDER) == set(TASKS)
