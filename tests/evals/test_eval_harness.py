"""The adapter to lm-evaluation-harness, against transformers on the same weights."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import Blind, Oracle
from transformers import AutoModelForCausalLM

from longwing.cli.eval_model import LocalModel
from longwing.engine.generator import load
from longwing.errors import EvalError
from longwing.evals.harness import HarnessAnswers, harness_model

TEXT = "All work and no play makes a dull text of this, again and again. "


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> LocalModel:
    return LocalModel(load(tiny_folder("llama2"), device="cpu"), "tiny")


@pytest.fixture(scope="module")
def judge(tiny_folder: Callable[[str], Path], model: LocalModel) -> Callable[[str], torch.Tensor]:
    """The log-probabilities (T, V) of a text's positions, by transformers."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder("llama2"), dtype=torch.float32)

    def logprobs_TV(text: str) -> torch.Tensor:
        with torch.inference_mode():
            return reference(torch.tensor([model.encode(text)])).logits[0].log_softmax(-1)

    return logprobs_TV


def summed(logprobs_TV: torch.Tensor, ids: list[int], start: int) -> float:
    return float(sum(logprobs_TV[at - 1, ids[at]] for at in range(start, len(ids))))


def test_loglikelihood_is_that_of_transformers_and_blanks_go_over_the_border(
    model: LocalModel, judge: Callable[[str], torch.Tensor]
) -> None:
    answers = HarnessAnswers(model)
    ids = model.encode(TEXT + "dull")
    expected = summed(judge(TEXT + "dull"), ids, len(TEXT) - 1)  # the blank is foretold too
    found, is_greedy = answers.loglikelihood(TEXT, "dull")
    assert found == pytest.approx(expected, rel=1e-5)
    assert not is_greedy
    assert answers.loglikelihood(TEXT.rstrip(), " dull")[0] == found


def test_greedy_continuation_is_known_as_such() -> None:
    certain, unsure = HarnessAnswers(Oracle()), HarnessAnswers(Blind())
    assert certain.loglikelihood("You hear?", " No.") == (0.0, True)  # never asked to write it
    assert unsure.loglikelihood("You hear?", "I was not")[1]
    assert not unsure.loglikelihood("You hear?", "Yes")[1]


def test_whole_text_is_scored_once_in_windows_that_are_full_to_the_last(
    model: LocalModel, judge: Callable[[str], torch.Tensor]
) -> None:
    text = TEXT * 6  # 390 tokens of a context of 256
    ids = model.encode(text)
    first = summed(judge(text[:256]), ids[:256], 1)
    second = summed(judge(text[-256:]), ids[-256:], 256 - (len(ids) - 256))
    assert HarnessAnswers(model).rolling(text) == pytest.approx(first + second, rel=1e-5)


def test_text_that_nothing_precedes_is_foretold_after_the_prefix(
    model: LocalModel, judge: Callable[[str], torch.Tensor]
) -> None:
    prefix_id = model.encode("#")[0]
    answers, ids = HarnessAnswers(model, prefix_id), model.encode("#" + TEXT)
    expected = summed(judge("#" + TEXT), ids, 1)
    assert answers.rolling(TEXT) == pytest.approx(expected, rel=1e-5)
    assert answers.loglikelihood("", TEXT)[0] == pytest.approx(expected, rel=1e-5)


def test_answer_ends_before_a_stop_string_and_sampling_is_refused(model: LocalModel) -> None:
    answers = HarnessAnswers(model)
    whole = answers.until(TEXT, {"max_gen_toks": 8})
    assert whole == model.generate(TEXT, 8, chat=False).text
    stop = whole[3]
    assert answers.until(TEXT, {"max_gen_toks": 8, "until": [stop]}) == whole.partition(stop)[0]
    with pytest.raises(EvalError, match="these are greedy"):
        answers.until(TEXT, {"do_sample": True, "temperature": 0.7})


@dataclass
class Request:
    args: tuple[Any, ...]


def test_harness_takes_it_for_one_of_its_own(model: LocalModel) -> None:
    base = pytest.importorskip("lm_eval.api.model")
    adapted = harness_model(model)
    assert isinstance(adapted, base.LM)
    answers = HarnessAnswers(model)
    assert adapted.loglikelihood([Request((TEXT, "dull"))]) == [answers.loglikelihood(TEXT, "dull")]
    assert adapted.loglikelihood_rolling([Request((TEXT,))]) == [answers.rolling(TEXT)]
    settings = {"max_gen_toks": 4}
    assert adapted.generate_until([Request((TEXT, settings))]) == [answers.until(TEXT, settings)]


def test_missing_harness_is_said_with_its_remedy(
    model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(EvalError, match="pip install lm-eval"):
        harness_model(model)
