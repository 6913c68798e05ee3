"""A loaded model that is asked many questions at a time, against the plain path."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longwing.cli.eval_engine import BatchedModel, load_batches
from longwing.cli.eval_model import LocalModel
from longwing.cli.options import LoadOptions
from longwing.engine.generator import load
from longwing.errors import ContextLengthError, EngineDeadError
from longwing.evals.run import Plan, run

PROMPTS = [f"All work and no play makes a dull text {number}." for number in range(12)]


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama-dynamic")


@pytest.fixture(scope="module")
def plain(folder: Path) -> LocalModel:
    return LocalModel(load(folder, device="cpu", context=2048), "tiny")


@pytest.fixture
def batched(folder: Path) -> Iterator[BatchedModel]:
    options = LoadOptions(device="cpu", context="2k")
    with BatchedModel(load_batches(folder, options, 4), "tiny") as model:
        yield model


def test_answers_of_a_batch_are_those_of_the_plain_path(
    plain: LocalModel, batched: BatchedModel
) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(batched.generate, text, 8, (), chat=False) for text in PROMPTS]
        losses = pool.submit(batched.logprobs, plain.encode(PROMPTS[0]))
        told = [future.result() for future in asked]
    for text, answer in zip(PROMPTS, told, strict=True):
        expected = plain.generate(text, 8, chat=False)
        assert (answer.text, answer.num_tokens) == (expected.text, expected.num_tokens)
        assert answer.prompt_len == expected.prompt_len == len(text)
        assert answer.seconds > 0
    expected_losses = plain.logprobs(plain.encode(PROMPTS[0]))
    assert losses.result()[1:] == pytest.approx(expected_losses[1:], abs=1e-4)
    assert batched.choose("What? (", "ABCD") == pytest.approx(
        plain.choose("What? (", "ABCD"), abs=1e-4
    )


def test_run_may_go_on_with_another_number_of_questions_at_a_time(
    plain: LocalModel, batched: BatchedModel, tmp_path: Path
) -> None:
    plan, out = Plan(tasks=("passkey",), lengths=(600, 1200), cases=3), tmp_path / "run.jsonl"
    whole = run(batched, plan, out, concurrency=4)
    assert len(whole.records) == 6
    assert run(plain, plan, out).records == whole.records


def test_question_that_does_not_fit_is_refused_and_the_others_go_on(batched: BatchedModel) -> None:
    with pytest.raises(ContextLengthError, match="2049"):
        batched.generate("a" * 2041, 8, chat=False)
    assert batched.generate("a", 2, chat=False).num_tokens == 2


def test_engine_that_fails_fails_whoever_waits(
    batched: BatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(batched._engine, "step", broken)
    with pytest.raises(EngineDeadError, match="a defect"):
        batched.generate("a", 2, chat=False)
    with pytest.raises(EngineDeadError, match="a defect"):
        batched.logprobs([1, 2])
