"""Steps launched before the last one's tokens are read: not a token, a text or a page differs.

`Echo` stands in for the model: its logits are a function of the text that it finds in the pages of
the sequence, so a token written to a wrong place, or chosen after a wrong one, changes the answer.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of, ids, request, run, text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longwing.engine.engine import Engine
from longwing.engine.events import Event, Failed, Finished, Step
from longwing.engine.request import Request
from longwing.engine.sampler import Choosing
from longwing.engine.sampling_state import SamplingState
from longwing.engine.sequence import Work

Folder = Callable[[str], Path]

LETTERS = range(60, 66)
"""Nearly all of what is said: few, so that texts repeat themselves and drafts are found."""

END = 70

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "top_k": {"temperature": 0.8, "top_k": 3},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p and typical_p": {"temperature": 1.5, "min_p": 0.1, "typical_p": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "frequency and presence": {
        "temperature": 0.7,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.4,
    },
    "log-probabilities": {"temperature": 1.0, "logprobs": 3, "repetition_penalty": 1.2},
    "an end token": {"temperature": 1.0, "stop_token_ids": frozenset({END})},
    "no end too early": {
        "temperature": 1.0,
        "stop_token_ids": frozenset({END}),
        "min_new_tokens": 7,
    },
}


class Echo:
    """A runner without a model. `ahead` counts the steps launched on tokens yet unknown."""

    def __init__(self, num_pages: int, page_len: int, vocab_len: int = 320) -> None:
        self.num_pages, self.page_len, self.vocab_len = num_pages, page_len, vocab_len
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.ahead = self.fails_at = 0
        self.has_bad_rows = True
        self.adapters = None

    def forward(
        self, batch: Sequence[Work], tokens_T: Tensor | None = None, *, ends_only: bool = False
    ) -> Tensor:
        self.ahead += tokens_T is not None
        if tokens_T is not None and self.ahead == self.fails_at:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        unknown = iter([] if tokens_T is None else tokens_T.tolist())
        found = []
        for work in batch:
            table = work.sequence.pages
            for at, token in enumerate(work.token_ids, work.start):
                token = token if tokens_T is None else next(unknown)
                page, slot = divmod(at, self.page_len)
                self.slots[table[page], slot] = (at, token)
                context = [
                    self.slots[table[i // self.page_len], i % self.page_len] for i in range(at)
                ]
                if not ends_only or at == work.start + len(work.token_ids) - 1:
                    found.append(zlib.crc32(repr([*context, (at, token)]).encode()))
        return torch.tensor(found)[:, None]

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Tensor:
        logits_RV = torch.empty(len(rows), self.vocab_len)
        for logits_V, seed in zip(logits_RV, hidden_TD[list(rows), 0].tolist(), strict=True):
            logits_V.copy_(
                torch.randn(self.vocab_len, generator=torch.Generator().manual_seed(seed))
            )
            logits_V[LETTERS.start : LETTERS.stop] += 6
            logits_V[END] += 5
            if self.has_bad_rows and seed % 101 == 0:
                logits_V[5] = float("nan")
        return logits_RV


@pytest.fixture(scope="module")
def engine(tiny_folder: Folder) -> Iterator[Engine]:
    made = engine_of(tiny_folder("falcon-40b"))
    runner = made.runner
    yield made
    made.runner = runner
    made.close()


def begin(engine: Engine, overlap: str, **options: Any) -> Echo:
    """The engine anew, on an `Echo`."""
    own = {"num_pages": 200, "page_len": 4, "max_draft": 0, "max_batch_tokens": 24, **options}
    engine.options = replace(engine.options, **own, overlap=overlap)
    echo = Echo(own["num_pages"], own["page_len"])
    engine.runner = echo  # type: ignore[assignment]
    engine.forget()
    return echo


def requests(engine: Engine, seed: int, num: int = 10) -> list[Request]:
    """Of every kind in turn, and one in three with a stop string."""
    dice, kinds = random.Random(seed), list(KINDS.values())
    shared = [dice.choice(LETTERS) for _ in range(20)]
    made = []
    for place in range(num):
        prompt = [dice.choice(LETTERS) for _ in range(dice.choice([1, 2, 9, 21]))]
        stop = (engine.tokenizer.decode(dice.choices(LETTERS, k=3)),) if place % 3 == 0 else ()
        made.append(
            request(
                [*shared, *prompt] if dice.random() < 0.4 else prompt,
                max_new_tokens=dice.randint(7, 24),
                seed=dice.randrange(100),
                stop=stop,
                **kinds[place % len(kinds)],
            )
        )
    return made


def said(events: Sequence[Event]) -> list[object]:
    """What a client is told, but for times, and for how often a prompt was read."""
    told: list[object] = [event for event in events if isinstance(event, (Step, Failed))]
    return told + [
        (event.reason, event.stop, event.seed, event.prompt_len, event.num_generated)
        for event in events
        if isinstance(event, Finished)
    ]


def test_everyone_is_told_the_same_with_and_without_overlap(engine: Engine) -> None:
    asked = requests(engine, 1, num=20)
    begin(engine, "off")
    plain = run(engine, asked)
    assert any(isinstance(events[-1], Failed) for events in plain.values())
    steps = engine.stats.num_steps
    echo = begin(engine, "on")
    told = run(engine, asked)
    for name, events in plain.items():
        assert said(told[name]) == said(events), name
        kinds = [[type(event) for event in own] for own in (told[name], events)]
        assert kinds[0] == kinds[1]
    assert echo.ahead > steps / 2
    engine.cache.check([])
    assert engine.cache.num_used == 0


ANSWERS: dict[int, dict[str, list[Event]]] = {}


def answers(engine: Engine, seed: int) -> dict[str, list[Event]]:
    """What is said to `requests(seed)` without overlap."""
    if seed not in ANSWERS:
        begin(engine, "off")
        ANSWERS[seed] = run(engine, requests(engine, seed))
    return ANSWERS[seed]


Action = tuple[str, int]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
    ),
    min_size=8,
    max_size=40,
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    ACTIONS,
    st.sampled_from([18, 24, 200]),
    st.sampled_from([2, 16]),
    st.sampled_from([0, 3]),
    st.integers(0, 3),
)
def test_no_schedule_of_arrivals_and_departures_changes_an_answer_or_loses_a_page(
    engine: Engine,
    actions: list[Action],
    num_pages: int,
    max_sequences: int,
    max_draft: int,
    seed: int,
) -> None:
    options = {"max_sequences": max_sequences, "max_draft": max_draft, "draft_sequences": 2}
    asked = requests(engine, seed)
    plain = answers(engine, seed)
    begin(engine, "on", num_pages=num_pages, **options)
    told: dict[str, list[Event]] = {}
    alive: list[str] = []
    cancelled = set()

    def step() -> None:
        for name, event in engine.step():
            told[name].append(event)
            if isinstance(event, (Finished, Failed)):
                alive.remove(name)
        engine.scheduler.check()

    for what, number in actions:
        if what == "add":
            name = f"{len(told)} {number}"
            engine.add(name, asked[number])
            told[name] = []
            alive.append(name)
        elif what == "cancel" and alive:
            name = alive.pop(number % len(alive))
            cancelled.add(name)
            engine.cancel(name)
        else:
            for _ in range(number):
                step()
    for _ in range(2000):
        if not engine.busy:
            break
        step()
    assert not alive
    for name, events in told.items():
        expected = said(plain[name.split()[1]])
        found = said(events)
        assert found == (expected[: len(found)] if name in cancelled else expected)
    engine.cache.check([])
    assert engine.cache.num_used == 0


def test_step_ahead_that_finds_no_memory_costs_nobody_anything(engine: Engine) -> None:
    asked = requests(engine, 2)
    begin(engine, "off")
    plain = run(engine, asked)
    for at in (1, 5):
        echo = begin(engine, "on")
        echo.fails_at = at
        told = run(engine, asked)
        assert echo.ahead > at
        assert {name: said(events) for name, events in told.items()} == {
            name: said(events) for name, events in plain.items()
        }


def test_tokens_that_took_a_second_look_are_not_gone_on_from(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where little is certain a short ranking is not enough, and the first choice not the last."""
    monkeypatch.setattr("longwing.engine.sampling_state._NUM_RANKED", 2)
    asked = [request([61, place], temperature=1.0, top_p=0.95, seed=place) for place in range(3)]
    begin(engine, "off")
    plain = run(engine, asked)
    echo = begin(engine, "on")
    told = run(engine, asked)
    assert [ids(events) for events in told.values()] == [ids(events) for events in plain.values()]
    assert echo.ahead > 10


def test_newcomer_is_read_in_the_step_after_the_one_under_way(engine: Engine) -> None:
    begin(engine, "on").has_bad_rows = False
    engine.add("first", request([60]))
    for _ in range(3):
        engine.step()
    engine.add("second", request([61, 62, 63]))
    assert [name for name, _ in engine.step()] == ["first"]
    assert {name for name, _ in engine.step()} == {"first", "second"}


@pytest.mark.parametrize(
    "short",
    [{"max_new_tokens": 9}, {"min_new_tokens": 5, "stop_token_ids": frozenset(LETTERS)}],
    ids=["known", "not known"],
)
def test_place_that_becomes_free_is_taken_although_steps_go_ahead(
    engine: Engine, short: dict[str, Any]
) -> None:
    """Two may run. One goes on throughout; the others are tried in vain until another ends."""
    echo = begin(engine, "on", max_sequences=2)
    echo.has_bad_rows = False
    asked = [request([61, at], **short) for at in range(4)]
    told = run(engine, [request([60], max_new_tokens=60), *asked])
    assert sum(len(ids(events)) for events in told.values()) > 60 + 4 * 5
    assert engine.stats.num_steps <= 60 + 3
    assert echo.ahead >= 30


def test_nothing_is_launched_for_who_is_known_to_end(engine: Engine) -> None:
    echo = begin(engine, "on")
    echo.has_bad_rows = False
    run(engine, [request([60], max_new_tokens=10)])
    assert engine.stats.num_steps == 10
    assert echo.ahead == 8  # all but the prompt's step, and the first after it


def test_overlap_costs_no_draft(engine: Engine) -> None:
    counts = []
    for overlap in ("off", "on"):
        echo = begin(engine, overlap, max_draft=4, draft_sequences=1)
        echo.has_bad_rows = False
        for seed in range(6):
            run(engine, [request([60, 61, 62], max_new_tokens=60, temperature=1.0, seed=seed)])
        stats = engine.stats
        counts.append((stats.num_drafted, stats.num_accepted, stats.num_steps))
    assert counts[0] == counts[1]
    assert counts[0][0] > 30
    assert echo.ahead > 50


def test_tokens_that_a_grammar_rules_are_never_gone_ahead_of(engine: Engine) -> None:
    echo = begin(engine, "on")
    echo.has_bad_rows = False
    engine.add("0", request([60], max_new_tokens=10))
    (sequence,) = engine.scheduler.waiting
    sequence.can_draft = False
    while engine.busy:
        engine.step()
    assert echo.ahead == 0


@pytest.mark.parametrize("kind", KINDS)
def test_choosing_asks_the_device_nothing_before_it_is_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two choices, the second on the first's tokens, as two steps launched one after the other."""
    params = request([1], **KINDS[kind]).params
    logits_SV = torch.randn(3, 2000, generator=torch.Generator().manual_seed(4))
    states = [SamplingState(params, [5, 6], eos_token_ids=[9]) for _ in logits_SV]
    with monkeypatch.context() as forbidding:
        for name in (
            "item",
            "tolist",
            "cpu",
            "numpy",
            "nonzero",
            "__bool__",
            "__int__",
            "__float__",
        ):
            forbidding.setattr(torch.Tensor, name, _refuse)
        first = Choosing(logits_SV, states)
        later = [
            state.after(first.ids_S[row : row + 1], first.vocab_len)
            for row, state in enumerate(states)
        ]
        second = Choosing(logits_SV.flip(0), later)
    for state, choice in zip(states, first.read(), strict=True):
        assert choice is not None
        state.accept(choice[0])
    assert second.read() == Choosing(logits_SV.flip(0), states).read()


def _refuse(*args: object) -> None:
    raise AssertionError("the host asked the device")


def test_real_model_says_the_same_with_and_without_overlap(tiny_folder: Folder) -> None:
    folder = tiny_folder("falcon-7b")
    told = []
    for overlap in ("off", "on"):
        engine = engine_of(folder, overlap=overlap)
        told.append(run(engine, requests(engine, 5, num=len(KINDS))))
    assert [said(events) for events in told[0].values()] == [
        said(events) for events in told[1].values()
    ]
    assert all(text(events) for events in told[1].values())


def test_long_ranking_is_looked_for_once_and_then_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longwing.engine.sampling_state._NUM_RANKED", 2)
    params = request([1], temperature=1.0, top_p=0.95, seed=3).params
    logits_SV = torch.randn(1, 200, generator=torch.Generator().manual_seed(6))
    state = SamplingState(params)
    found = []
    for _ in range(3):
        choosing = Choosing(logits_SV, [state.after(torch.tensor([7]), 200)])
        found.append((choosing.read(), choosing.stands))
    assert [stands for _, stands in found] == [False, True, True]
    assert found[0][0] == found[1][0] == found[2][0]
