"""The plain path: what ends an answer, what is shown when, and what is refused."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor

from longwing.engine.generator import Generator, load
from longwing.engine.request import FinishReason, SamplingParams
from longwing.errors import CapacityError, ContextLengthError, RequestError, SamplingError
from longwing.models import load_model
from longwing.parallel import Group

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Folder) -> Generator:
    return load(tiny_folder("falcon-40b"))


def test_stream_and_generate_give_the_same_text_and_tokens(tiny: Generator) -> None:
    whole = tiny.generate("Hello", temperature=1.3, seed=5, max_new_tokens=40, ignore_eos=True)
    chunks = list(tiny.stream("Hello", temperature=1.3, seed=5, max_new_tokens=40, ignore_eos=True))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.token.id for chunk in chunks] == whole.token_ids
    assert [chunk.completion is not None for chunk in chunks] == [False] * 39 + [True]


def test_answer_ends_before_a_stop_string_and_says_so(tiny: Generator) -> None:
    free = tiny.generate("Hello", max_new_tokens=30, ignore_eos=True)
    stop = free.text[4:7]
    at = free.text.index(stop)
    answer = tiny.generate("Hello", max_new_tokens=30, ignore_eos=True, stop=(stop,))
    assert answer.text == free.text[:at]
    assert answer.finish_reason is FinishReason.STOP_SEQUENCE


def test_end_token_ends_the_answer_and_is_not_shown(tiny: Generator) -> None:
    free = tiny.generate("Hello", max_new_tokens=10, ignore_eos=True)
    third = free.token_ids[2]
    answer = tiny.generate("Hello", max_new_tokens=10, stop_token_ids=frozenset({third}))
    first = free.token_ids.index(third)
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.text == tiny.tokenizer.decode(free.token_ids[:first])
    assert answer.finish_reason is FinishReason.STOP_SEQUENCE


def test_end_tokens_of_generation_config_are_obeyed(tiny_folder: Folder, tmp_path: Path) -> None:
    free = load(tiny_folder("falcon-40b")).generate("Hello", max_new_tokens=10, ignore_eos=True)
    folder = shutil.copytree(tiny_folder("falcon-40b"), tmp_path / "model")
    ends = {"eos_token_id": [256, free.token_ids[1]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    answer = load(folder).generate("Hello", max_new_tokens=10)
    assert answer.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[1]) + 1]
    assert answer.finish_reason is FinishReason.EOS_TOKEN


def test_unset_length_is_256_tokens_or_what_the_context_leaves(tiny_folder: Folder) -> None:
    tiny = load(tiny_folder("falcon-40b"), context=300)
    assert len(tiny.generate([1] * 3, ignore_eos=True).tokens) == 256
    answer = tiny.generate([1] * 290, ignore_eos=True)
    assert len(answer.tokens) == 10
    assert answer.finish_reason is FinishReason.LENGTH


def test_running_out_of_memory_is_told_as_such(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_args: object, **_settings: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(torch, "empty", exhausted)
    with pytest.raises(CapacityError, match=r"reading a prompt of 5 tokens: Tried.*longwing plan"):
        tiny.generate("Hello")


@pytest.mark.parametrize("context", [0, -5, 2.5, 2**25])
def test_context_that_is_no_length_is_refused(context: object, tiny_folder: Folder) -> None:
    with pytest.raises(RequestError, match=f"context is {context}"):
        load(tiny_folder("falcon-rw"), context=context)  # type: ignore[arg-type]


def test_prompt_longer_than_context_is_refused_and_told_the_limit(tiny: Generator) -> None:
    for prompt_len, max_new in ((257, None), (256, None), (250, 7)):
        with pytest.raises(ContextLengthError, match="the context of 256"):
            tiny.generate([1] * prompt_len, max_new_tokens=max_new)


def test_unusable_requests_are_refused_before_anything_runs(tiny: Generator) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        tiny.stream("")
    with pytest.raises(RequestError, match="token id 320 is outside the vocabulary of 320"):
        tiny.stream([1, 320])
    with pytest.raises(SamplingError, match="temperature"):
        tiny.stream("x", temperature=-1)
    with pytest.raises(SamplingError, match="no_such_setting"):
        tiny.stream("x", no_such_setting=1)
    with pytest.raises(RequestError, match="not both"):
        tiny.stream("x", SamplingParams(), temperature=1)
    with pytest.raises(RequestError, match=r"1\.5 in the prompt is no token id"):
        tiny.stream([1.5])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="not NoneType"):
        tiny.stream(None)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="must be SamplingParams, not dict"):
        tiny.stream("x", {})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match='device "foo" is not here; there are auto, cpu'):
        load("anywhere", device="foo")
    with pytest.raises(RequestError, match='dtype "int4" is not one of'):
        load("anywhere", dtype="int4")


def test_logprobs_are_those_of_the_model_itself(tiny: Generator) -> None:
    answer = tiny.generate("Hello", max_new_tokens=3, logprobs=2, ignore_eos=True)
    prompt = tiny.tokenizer.encode("Hello")
    logprobs_V = tiny.logits(prompt)[-1].log_softmax(-1)
    first = answer.tokens[0]
    assert first.logprob == pytest.approx(float(logprobs_V[first.id]), abs=1e-4)
    best = logprobs_V.topk(2)
    assert [token_id for token_id, _ in first.top_logprobs] == best.indices.tolist()


def test_progress_reports_each_chunk_of_the_prompt(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longwing.engine.generator.PREFILL_CHUNK", 4)
    seen: list[tuple[int, int]] = []
    tiny.generate(
        [1] * 10, max_new_tokens=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]


class _InThreads(Group):
    """Ranks that are threads of this process: each says its tensor, and all read what was said."""

    def __init__(self, rank: int, said: list[Tensor], meeting: Barrier) -> None:
        super().__init__(rank, len(said))
        self._said, self._meeting = said, meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._exchanged(tensor)).sum(0))

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchanged(tensor), dim)

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        self._said[self.rank] = tensor.clone()
        self._meeting.wait()
        said = list(self._said)
        self._meeting.wait()
        return said


@pytest.mark.parametrize("name", ["falcon-40b", "llama3"])
def test_ranks_that_share_a_model_each_give_its_answer(name: str, tiny_folder: Folder) -> None:
    whole = load(tiny_folder(name), context=64)
    said, meeting = [torch.empty(0)] * 2, Barrier(2, timeout=20)

    def answer(rank: int) -> list[int]:
        try:
            part = load_model(tiny_folder(name), context=64, group=_InThreads(rank, said, meeting))
            generator = Generator(part, whole.tokenizer)
            return generator.generate([3, 1, 4], max_new_tokens=12, ignore_eos=True).token_ids
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(2) as ranks:
        answers = list(ranks.map(answer, range(2)))
    assert answers == [whole.generate([3, 1, 4], max_new_tokens=12, ignore_eos=True).token_ids] * 2
