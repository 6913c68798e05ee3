"""Perplexity: of models whose loss is known, and of a tiny one as transformers computes it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eval_models import Blind, Oracle
from transformers import AutoModelForCausalLM

from longwing.cli.eval_model import LocalModel
from longwing.engine.generator import load
from longwing.errors import ContextLengthError, EvalError
from longwing.evals.perplexity import Perplexity
from longwing.evals.run import Plan, run
from longwing.evals.table import Row, rows


def measured(model: Blind | LocalModel, file: Path, **settings: object) -> list[Row]:
    plan = Plan(tasks=("perplexity",), texts=(file,), **settings)  # type: ignore[arg-type]
    return rows(run(model, plan).records)


def test_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(
    text_file: Path,
) -> None:
    (row,) = measured(Blind(), text_file, lengths=(512,))
    assert row.perplexity == pytest.approx(Blind.VOCAB)
    assert row.last_perplexity == pytest.approx(Blind.VOCAB)
    (row,) = measured(Oracle(), text_file, lengths=(512,))
    assert row.perplexity == 1


class Fading(Blind):
    """Loss at a position is the position."""

    def logprobs(self, token_ids: object) -> list[float | None]:
        return [None, *(-float(place) for place in range(1, len(token_ids)))]  # type: ignore[arg-type]


def test_loss_by_position_and_at_the_end_is_that_of_the_positions(text_file: Path) -> None:
    (row,) = measured(Fading(), text_file, lengths=(320,), cases=3)
    assert row.loss == pytest.approx(160)
    assert row.last_loss == pytest.approx(279.5)  # the last 80
    assert row.stretches[1] == pytest.approx(14.5)
    assert row.stretches[-1] == pytest.approx(314.5)


@pytest.mark.parametrize("stride", [1000, 512, 100, 77])
def test_sliding_windows_count_every_token_once(text_file: Path, stride: int) -> None:
    (row,) = measured(Blind(), text_file, lengths=(1000,), stride=stride)
    windows = math.ceil(len(text_file.read_text()) / 1000)
    unforetold = 1 if stride < 1000 else windows  # the first token of a window that none precedes
    assert row.tokens == len(text_file.read_text()) - unforetold


def test_windows_stop_at_the_tokens_asked_for(text_file: Path) -> None:
    found = measured(Blind(), text_file, lengths=(256, 512), tokens=1024)
    assert [(row.num_cases, row.tokens) for row in found] == [(4, 1020), (2, 1022)]


def test_end_of_a_short_last_window_is_not_that_of_the_whole_length(text_file: Path) -> None:
    (row,) = measured(Fading(), text_file, lengths=(320,), tokens=320 + 160)
    assert row.num_cases == 2
    assert row.last_loss == pytest.approx(279.5)  # of the first window alone
    assert row.stretches[8] == pytest.approx(84.5)  # positions 80 to 89, in both
    assert row.stretches[16] == pytest.approx(164.5)  # in the first


def test_windows_of_several_texts_never_reach_from_one_into_the_next(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for file, letter in zip(files, "ab", strict=True):
        file.write_text(letter * 1000)
    task = Perplexity(files, lengths=(400,), max_tokens=900)
    (cell,) = task.cells
    assert (cell.source, cell.num_cases) == ("2 texts", 2)  # a guess: four letters a token
    samples = list(task.samples(cell, Blind()))
    assert [len(sample.prompt) for sample in samples] == [400, 400, 100] * 2
    assert [sample.facts["text"] for sample in samples] == ["one.txt"] * 3 + ["two.txt"] * 3
    assert [sample.index for sample in samples] == list(range(6))
    assert all(len(set(sample.prompt)) == 1 for sample in samples)
    few = Perplexity(files, lengths=(400,), num_cases=4)
    assert len(list(few.samples(few.cells[0], Blind()))) == 4


def test_text_shorter_than_a_window_is_refused_with_its_length(text_file: Path) -> None:
    with pytest.raises(EvalError, match=r"has 8,250 tokens, less than one window of 9,000"):
        measured(Blind(), text_file, lengths=(9000,))


@pytest.mark.parametrize("settings", [{"lengths": (1,)}, {"lengths": (100,), "stride": 200}])
def test_window_that_makes_no_sense_is_refused(
    text_file: Path, settings: dict[str, object]
) -> None:
    with pytest.raises(EvalError, match=r"1 tokens|stride of 200"):
        Perplexity([text_file], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama2", "falcon-40b", "falcon-rw"])
def test_loss_and_choices_of_a_tiny_model_are_those_of_transformers(
    tiny_folder: Callable[[str], Path], text_file: Path, name: str
) -> None:
    folder = tiny_folder(name)
    model = LocalModel(load(folder, device="cpu"), name)
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (row,) = measured(model, text_file, lengths=(200,), tokens=600)
    ids = model.encode(text_file.read_text())[:600]
    losses = []
    with torch.inference_mode():
        for start in (0, 200, 400):
            window_1T = torch.tensor([ids[start : start + 200]])
            losses.append(float(judge(window_1T, labels=window_1T).loss))
        logprobs_V = judge(torch.tensor([ids[:50]])).logits[0, -1].log_softmax(0)
    assert row.loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    prompt = text_file.read_text()[:50]
    letters = [model.encode(letter)[0] for letter in "ABCD"]
    assert model.choose(prompt, "ABCD") == pytest.approx(logprobs_V[letters].tolist(), abs=1e-3)


def test_window_beyond_the_context_is_refused_by_the_model_itself(
    tiny_folder: Callable[[str], Path],
) -> None:
    model = LocalModel(load(tiny_folder("llama2"), device="cpu"), "tiny")
    with pytest.raises(ContextLengthError, match="257"):
        model.logprobs([1] * 257)
