"""Many at once give what each alone would: every path against the plain one, and nothing leaks."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of, finish, ids, request, run, text

from longwing.engine.events import Failed, Finished, PromptRead, Reading, Step
from longwing.engine.generator import Completion, Generator, load
from longwing.engine.lookup import PromptLookup
from longwing.engine.request import FinishReason, SamplingParams
from longwing.errors import CapacityError, ContextLengthError, OverloadedError, RequestError

Folder = Callable[[str], Path]

NAMES = ("falcon-7b", "falcon-40b", "falcon-rw", "llama3", "llama-dynamic", "mistral")

PATHS: dict[str, dict[str, Any]] = {
    "one by one": {"max_sequences": 1},
    "batched": {},
    "chunks of 5": {"max_batch_tokens": 5},
    "pages of 1": {"page_len": 1, "num_pages": 512},
    "few pages, so preempted": {"num_pages": 16},
    "without a prefix cache": {"prefix_cache": False},
    "with drafts": {"max_draft": 6, "draft_sequences": 16},
    "drafts and few pages": {"max_draft": 6, "draft_sequences": 16, "num_pages": 16},
}


def prompts() -> list[list[int]]:
    """Nine prompts of 1 to 70 tokens; some repeat themselves, some share a beginning."""
    dice = random.Random(3)
    shared = [dice.randrange(256) for _ in range(40)]
    loop = [5, 6, 7, 8] * 8
    own = [[dice.randrange(256) for _ in range(length)] for length in (1, 7, 8, 33)]
    return [*own, shared, [*shared, 9, 9], [*shared[:24], 1, 2, 3], loop, [*shared, *loop[:30]]]


@pytest.fixture(scope="module")
def plain(tiny_folder: Folder) -> Callable[[str], Generator]:
    made: dict[str, Generator] = {}

    def generator(name: str) -> Generator:
        if name not in made:
            made[name] = load(tiny_folder(name), context=128)
        return made[name]

    return generator


@pytest.fixture(scope="module")
def alone(plain: Callable[[str], Generator]) -> Callable[[str], list[Completion]]:
    """What the plain path answers to each of the prompts."""
    made: dict[str, list[Completion]] = {}

    def answers(name: str) -> list[Completion]:
        if name not in made:
            made[name] = [
                plain(name).generate(prompt, max_new_tokens=24, ignore_eos=True)
                for prompt in prompts()
            ]
        return made[name]

    return answers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_path_gives_the_plain_paths_tokens(
    name: str, path: str, tiny_folder: Folder, alone: Callable[[str], list[Completion]]
) -> None:
    engine = engine_of(tiny_folder(name), context=128, **PATHS[path])
    told = run(engine, [request(prompt) for prompt in prompts()])
    for place, expected in enumerate(alone(name)):
        assert ids(told[str(place)]) == expected.token_ids, place
        assert text(told[str(place)]) == expected.text
    if "preempted" in path:
        assert engine.stats.num_preempted > 0
    if path == "with drafts":
        assert engine.stats.num_drafted > 0
    engine.cache.check([])
    assert engine.cache.num_used == 0


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_right_or_wrong_leave_the_text_as_it_is(
    name: str,
    temperature: float,
    tiny_folder: Folder,
    plain: Callable[[str], Generator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random models hardly repeat themselves, so an oracle drafts: mostly right, for a while."""
    settings = {"max_new_tokens": 30, "temperature": temperature, "seed": 4}
    prompt = list(range(20))
    answer = plain(name).generate(prompt, ignore_eos=True, **settings)
    whole, dice = [*prompt, *answer.token_ids], random.Random(8)

    def oracle(lookup: PromptLookup, limit: int) -> list[int]:
        draft = whole[len(lookup) : len(lookup) + limit]
        if draft and dice.random() < 0.5:
            draft[dice.randrange(len(draft))] ^= 1
        return draft

    monkeypatch.setattr(PromptLookup, "draft", oracle)
    engine = engine_of(tiny_folder(name), context=128, max_draft=5, draft_sequences=4)
    told = run(engine, [request(prompt, **settings)])["0"]
    assert ids(told) == answer.token_ids
    assert text(told) == answer.text
    assert 0 < engine.stats.num_accepted < engine.stats.num_drafted
    assert engine.stats.num_steps < 25


def test_sampled_text_is_the_plain_paths_whatever_the_neighbours_and_drafts(
    tiny_folder: Folder, plain: Callable[[str], Generator]
) -> None:
    engine = engine_of(tiny_folder("falcon-40b"), max_draft=4, draft_sequences=16, num_pages=20)
    settings = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    told = run(
        engine,
        [request(prompt, **settings, seed=place) for place, prompt in enumerate(prompts())],
    )
    for place, prompt in enumerate(prompts()):
        alone = plain("falcon-40b").generate(
            prompt, max_new_tokens=24, ignore_eos=True, seed=place, **settings
        )
        assert ids(told[str(place)]) == alone.token_ids, place


def test_prompt_that_came_before_is_not_read_again(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("llama3"))
    prompt = list(range(50))
    first = run(engine, [request(prompt)])["0"]
    again = run(engine, [request(prompt)])["0"]
    assert ids(first) == ids(again)
    assert first[-1].cached_len == 0
    assert again[-1].cached_len == 48  # whole pages of 8, and at least one token is run
    other = run(engine, [request(prompt, salt="somebody else")])["0"]
    assert other[-1].cached_len == 0


def test_follow_up_question_finds_the_answer_in_the_cache_too(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("llama3"))
    prompt = list(range(40))
    answer = ids(run(engine, [request(prompt)])["0"])
    last = run(engine, [request([*prompt, *answer, 1, 2, 3])])["0"][-1]
    assert last.cached_len == (40 + 23) // 8 * 8  # the last token of an answer is never run


def test_sequences_of_different_rungs_share_a_batch_but_no_pages(tiny_folder: Folder) -> None:
    """Dynamic NTK: a longer answer has another RoPE base, so its cached keys differ too."""
    folder = tiny_folder("llama-dynamic")
    engine, plain = engine_of(folder, context=128), load(folder, context=128)
    prompt = list(range(20))
    requests = [request(prompt, max_new_tokens=num) for num in (4, 40, 90)]
    told = [run(engine, [item])["0"] for item in requests]
    assert engine.model.rotary is not None
    assert engine.model.rotary.rungs == (32, 64, 128)
    assert [events[-1].cached_len for events in told] == [0, 0, 0]
    together = run(engine, requests)
    for place, num in enumerate((4, 40, 90)):
        alone = plain.generate(prompt, max_new_tokens=num, ignore_eos=True)
        assert ids(told[place]) == ids(together[str(place)]) == alone.token_ids


def test_long_prompt_does_not_hold_up_the_others(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("llama3"), max_batch_tokens=16, num_pages=64)
    engine.add("short", request([1, 2, 3], max_new_tokens=30))
    told: dict[str, list[Any]] = {"short": [], "long": []}
    for name, event in engine.step():
        told[name].append(event)
    engine.add("long", request(list(range(200)), max_new_tokens=2))
    for _ in range(10):
        for name, event in engine.step():
            told[name].append(event)
    assert len(ids(told["short"])) == 11  # one a step, as if it were alone
    assert [event.done for event in told["long"]][:3] == [15, 30, 45]
    finish(engine, told)


def test_events_come_in_order_and_tell_how_far_the_prompt_is(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("falcon-40b"), max_batch_tokens=10)
    events = run(engine, [request(range(25), max_new_tokens=3)])["0"]
    kinds = [type(event) for event in events]
    assert kinds == [Reading, Reading, Reading, Step, Step, Step, Finished]
    assert [event.done for event in events[:3]] == [10, 20, 25]
    last = events[-1]
    assert (last.prompt_len, last.num_generated, last.reason) == (25, 3, FinishReason.LENGTH)
    assert min(last.queue_s, last.prefill_s, last.decode_s) >= 0


def test_log_probabilities_are_those_of_the_whole_sequence(
    tiny_folder: Folder, plain: Callable[[str], Generator]
) -> None:
    engine = engine_of(tiny_folder("llama3"), max_batch_tokens=9)
    prompt = list(range(30))
    run(engine, [request(prompt)])  # what the cache holds must not hide the prompt's own
    events = run(engine, [request(prompt, logprobs=2, prompt_logprobs=3)])["0"]
    (read,) = (event for event in events if isinstance(event, PromptRead))
    logits_TV = plain("llama3").logits([*prompt, *ids(events)])
    expected_TV = torch.log_softmax(logits_TV.double(), dim=-1)
    assert read.tokens[0].logprob is None
    for place, token in enumerate(read.tokens[1:]):
        assert token.id == prompt[place + 1]
        assert token.logprob == pytest.approx(float(expected_TV[place, token.id]), abs=1e-4)
        top = expected_TV[place].topk(3)
        assert [token_id for token_id, _ in token.top] == top.indices.tolist()
    for place, step in enumerate(event for event in events if isinstance(event, Step)):
        row_V = expected_TV[len(prompt) - 1 + place]
        assert step.logprob == pytest.approx(float(row_V[step.id]), abs=1e-4)
        assert [token_id for token_id, _ in step.top] == row_V.topk(2).indices.tolist()


def test_stop_string_is_kept_or_left_out_as_asked(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("falcon-40b"))
    free = text(run(engine, [request([1, 2, 3])])["0"])
    stop = free[5:8]
    cut = free.index(stop)
    without, kept = run(
        engine,
        [request([1, 2, 3], stop=(stop,)), request([1, 2, 3], stop=(stop,), include_stop=True)],
    ).values()
    assert (text(without), text(kept)) == (free[:cut], free[: cut + 3])
    assert without[-1].reason is FinishReason.STOP_SEQUENCE
    assert without[-1].stop == stop


def test_two_thousand_random_cancels_leave_nothing_behind(tiny_folder: Folder) -> None:
    engine = engine_of(
        tiny_folder("llama3"), num_pages=24, max_batch_tokens=12, max_draft=3, draft_sequences=16
    )
    dice = random.Random(11)
    alive: list[str] = []
    for number in range(2000):
        length = dice.choice([1, 3, 17, 60])
        name = f"r{number}"
        engine.add(name, request([dice.randrange(4) for _ in range(length)], max_new_tokens=20))
        alive.append(name)
        for _ in range(dice.randrange(2)):
            for done, event in engine.step():
                if isinstance(event, (Finished, Failed)):
                    assert isinstance(event, Finished)
                    alive.remove(done)
        while len(alive) > 8 or (alive and dice.random() < 0.5):
            engine.cancel(alive.pop(dice.randrange(len(alive))))
    for name in alive:
        engine.cancel(name)
    assert not engine.busy
    engine.cache.check([])
    assert engine.cache.num_used == 0
    assert engine.step() == []


def test_request_that_cannot_be_served_is_refused_before_it_waits(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("falcon-40b"), max_waiting=2)
    with pytest.raises(ContextLengthError, match="exceeds the context of 256"):
        engine.add("a", request(range(200), max_new_tokens=57))
    with pytest.raises(RequestError, match="below 320"):
        engine.add("a", request([320]))
    engine.add("b", request([1]))
    engine.add("c", request([1]))
    with pytest.raises(OverloadedError):
        engine.add("d", request([1]))
    assert engine.stats.waiting == 2


def test_context_is_what_the_pages_hold(tiny_folder: Folder) -> None:
    assert engine_of(tiny_folder("falcon-40b"), num_pages=5).context == 40
    with pytest.raises(CapacityError, match="ask for 40 or less"):
        engine_of(tiny_folder("falcon-40b"), num_pages=5, context=100)


def test_row_without_a_token_fails_its_request_alone(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, plain: Callable[[str], Generator]
) -> None:
    engine = engine_of(tiny_folder("falcon-40b"))
    whole = engine.runner.logits
    count = 0

    def broken(hidden_TD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        nonlocal count
        logits_RV = whole(hidden_TD, rows).clone()
        count += 1
        if count == 4:
            logits_RV[1] = float("nan")
        return logits_RV

    monkeypatch.setattr(engine.runner, "logits", broken)
    told = run(engine, [request([1, 2]), request([3, 4]), request([5, 6])])
    assert isinstance(told["1"][-1], Failed)
    assert told["1"][-1].kind == "generation"
    for name, prompt in (("0", [1, 2]), ("2", [5, 6])):
        alone = plain("falcon-40b").generate(prompt, max_new_tokens=24, ignore_eos=True)
        assert ids(told[name]) == alone.token_ids


def test_running_out_of_memory_costs_one_request_and_changes_no_other(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, plain: Callable[[str], Generator]
) -> None:
    prompt_list = prompts()
    for at in range(1, 12):
        engine = engine_of(tiny_folder("falcon-40b"), max_batch_tokens=20)
        forward, count = engine.runner.forward, 0

        def exhausted(
            batch: Any, tokens_T: Any, forward: Any = forward, at: int = at, **wanted: bool
        ) -> torch.Tensor:
            nonlocal count
            count += 1
            if count == at:
                raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
            return forward(batch, tokens_T, **wanted)

        monkeypatch.setattr(engine.runner, "forward", exhausted)
        told = run(engine, [request(prompt, max_new_tokens=6) for prompt in prompt_list])
        failed = [name for name, events in told.items() if isinstance(events[-1], Failed)]
        assert len(failed) == 1
        for name, events in told.items():
            if name not in failed:
                alone = plain("falcon-40b").generate(
                    prompt_list[int(name)], max_new_tokens=6, ignore_eos=True
                )
                assert ids(events) == alone.token_ids
        engine.cache.check([])


def test_settings_that_change_nothing_are_nothing_to_the_engine(tiny_folder: Folder) -> None:
    engine = engine_of(tiny_folder("falcon-40b"))
    params = SamplingParams(max_new_tokens=5)
    assert params.is_greedy
    told = run(engine, [request([1, 2, 3], max_new_tokens=5, seed=9)])
    assert told["0"][-1].seed == 9
