"""Many engines asked as one model: the same record, whoever dies on the way."""

import itertools
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from inline_worker import InlineWorker

from longwing.cluster.pool import EnginePool
from longwing.errors import ContextLengthError, EvalError
from longwing.evals.run import Plan, run
from longwing.evals.task import Answer

PLAN = Plan(tasks=("passkey",), lengths=(300, 600), cases=6)


class Clerk:
    """Finds a pass key where the case's number is even; a token is four characters."""

    name = "clerk"
    context_len = 1000

    @property
    def settings(self) -> dict[str, object]:
        return {"dtype": "paper"}

    def count_tokens(self, text: str, *, chat: bool) -> int:
        return -(-len(text) // 4)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        if max_new_tokens > self.context_len:
            raise ContextLengthError(len(prompt) // 4, max_new_tokens, self.context_len)
        (key,) = re.findall(r"The pass key is (\d+)\. Remember it\.", prompt)
        said = key if int(key) % 2 == 0 else "I forgot"
        return Answer(text=said, prompt_len=len(prompt) // 4, num_tokens=3, seconds=0.5)

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        return [float(len(option)) for option in options]

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        return [None, *(-1.0 for _ in token_ids[1:])]


def pool_of(*deaths: int, per_worker: int = 1, num: int = 2) -> EnginePool:
    """A pool whose first workers die of their so-many-th question; those after them do not.

    A worker's first three questions are what its model is.
    """
    left = itertools.chain(deaths, itertools.repeat(0))
    lock = threading.Lock()

    def hire() -> InlineWorker:
        with lock:
            return InlineWorker(Clerk, next(left))

    return EnginePool(hire, Clerk(), num_workers=num, per_worker=per_worker)


def cases(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A record's header and its cases in the order of the plan, without what the clock says."""
    header, *lines = map(json.loads, file.read_text().splitlines())
    order = sorted(lines, key=lambda line: (line["size"], line["index"]))
    return {**header, "begun": 0}, [{**line, "seconds": 0} for line in order]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("alone") / "run.jsonl"
    run(Clerk(), PLAN, file)
    return file


@pytest.mark.parametrize("deaths", [(), (4,), (5, 7)])
@pytest.mark.parametrize("per_worker", [1, 3])
def test_record_is_that_of_one_model_whoever_dies(
    deaths: tuple[int, ...], per_worker: int, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.jsonl"
    with pool_of(*deaths, per_worker=per_worker) as pool:
        run(pool, PLAN, out, concurrency=pool.concurrency)
    assert cases(out) == cases(alone)
    assert len(cases(out)[1]) == 12


def test_run_begun_alone_is_finished_by_many(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    out.write_bytes(b"".join(alone.read_bytes().splitlines(keepends=True)[:5]))
    with pool_of() as pool:
        run(pool, PLAN, out, concurrency=pool.concurrency)
    assert cases(out) == cases(alone)


def test_question_that_kills_whoever_is_asked_ends_the_run_in_words() -> None:
    with pool_of(*[4] * 9) as pool, pytest.raises(EvalError, match="3 engines were lost over"):
        run(pool, PLAN)


def test_pool_goes_on_with_those_that_are_left_and_ends_when_none_is() -> None:
    # The second worker cannot start, nor can who comes after the first one dies.
    with pool_of(7, 1, 1, num=2) as pool:
        assert [pool.choose("", ["a"]) for _ in range(3)] == [[1.0]] * 3
        with pytest.raises(EvalError, match="no engine is left: killed"):
            pool.choose("", ["a"])


def test_pool_whose_engines_cannot_start_says_why() -> None:
    def broken() -> object:
        raise EvalError("no weights")

    with pytest.raises(EvalError, match="no weights"):
        EnginePool(lambda: InlineWorker(broken), Clerk(), num_workers=2, per_worker=1)


def test_pool_that_can_hire_nobody_says_why() -> None:
    def hire() -> InlineWorker:
        raise ConnectionError("the cluster is gone")

    with pytest.raises(EvalError, match="the cluster is gone"):
        EnginePool(hire, Clerk(), num_workers=2, per_worker=1)


def test_what_a_model_refuses_is_refused_by_the_pool_and_costs_no_engine() -> None:
    with pool_of(num=1) as pool:
        with pytest.raises(ContextLengthError):
            pool.generate("x", 5000, chat=False)
        assert pool.logprobs([1, 2]) == [None, -1.0]


@pytest.mark.parametrize("ask", [lambda pool: pool.encode("ab"), lambda pool: pool.name])
def test_what_needs_no_weights_is_answered_here(ask: Callable[[EnginePool], object]) -> None:
    with pool_of(4, num=1) as pool:
        assert ask(pool) in ([97, 98], "clerk")
