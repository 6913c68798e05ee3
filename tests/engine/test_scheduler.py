"""Any schedule computes every token once, over the right context, and every sequence ends.

`Simulation` is the judge: it stands in for model and runner, with a store that remembers for every
slot of every page which text its key and value were computed from.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longwing.engine.cache import CacheKey, PageCache
from longwing.engine.options import SchedulerOptions
from longwing.engine.scheduler import Scheduler
from longwing.engine.sequence import Sequence
from longwing.errors import (
    CapacityError,
    EngineError,
    OverloadedError,
    RequestError,
)

KEY = CacheKey("", 0)


class Simulation:
    """Runs a scheduler's works on made-up text, and checks each against the rules."""

    def __init__(self, num_pages=64, page_len=4, *, seed=0, cache=None, vocab_size=3, **options):
        self.cache = PageCache(num_pages, page_len, **(cache or {}))
        self.options = SchedulerOptions(
            **{"max_batch_tokens": 32, "max_draft": 8, "draft_sequences": 4, **options}
        )
        self.scheduler = Scheduler(self.cache, self.options)
        self.rng = random.Random(seed)
        self.vocab_size = vocab_size
        self.slots = {}  # (page, slot): fingerprint of the text up to and including its token
        self.prints = {}  # sequence: the fingerprints that its slots should have
        self.lives = {}  # sequence: (which life, tokens computed in it so far)
        self.unfinished = set()
        self.num_added = 0

    def add(self, prompt_ids, num_new=8, key=KEY, **settings):
        sequence = Sequence(
            id=f"s{self.num_added}",
            prompt_ids=prompt_ids,
            max_len=len(prompt_ids) + num_new,
            key=key,
            **settings,
        )
        self.scheduler.add(sequence)
        self.num_added += 1
        self.unfinished.add(sequence)
        return sequence

    def step(self, cancel=()):
        """One step; `cancel` are finished between schedule and commit. Returns the works."""
        works = self.scheduler.schedule()
        self.check_tables()
        assert sum(len(work.token_ids) for work in works) <= self.options.max_batch_tokens
        assert max(Counter(work.sequence for work in works).values(), default=0) <= 1
        for work in works:
            self.run(work)
        for sequence in cancel:
            self.finish(sequence)
        for work in works:
            self.scheduler.commit(work, self.answer(work))
            if len(work.sequence.tokens) == work.sequence.max_len:
                self.finish(work.sequence)
        self.check_tables()
        return works

    def finish(self, sequence):
        self.scheduler.finish(sequence)
        self.unfinished.discard(sequence)
        assert sequence.pages == []

    def run(self, work):
        """What the runner does: write each token's slot, read the context through the table."""
        sequence, page_len = work.sequence, self.cache.page_len
        life, done = self.lives.get(sequence, (-1, 0))
        if life != sequence.num_preemptions:  # begins anew, perhaps behind cached pages
            assert work.start % page_len == 0
            if life == -1:
                assert work.start == sequence.cached_len
        else:
            assert work.start == done, "every position once a life"
        num_known = len(work.token_ids) - work.num_drafts
        stop = work.start + num_known
        self.lives[sequence] = (sequence.num_preemptions, stop)
        assert num_known >= 1
        assert work.token_ids[:num_known] == sequence.tokens[work.start : stop]
        assert work.wants_token == (stop == len(sequence.tokens))
        assert work.wants_token or not work.num_drafts
        assert work.num_drafts <= self.options.max_draft
        assert stop + work.num_drafts < sequence.max_len
        context = self.fingerprints(sequence)[: work.start]
        for position, expected in enumerate(context):
            place = (sequence.pages[position // page_len], position % page_len)
            assert self.slots[place] == expected, "the context is another text's"
        text = hash(sequence.key) if not context else context[-1]
        for position, token in enumerate(work.token_ids, start=work.start):
            page = sequence.pages[position // page_len]
            assert self.num_tables[page] == 1, "wrote to a page that another reads"
            text = hash((text, token))
            self.slots[page, position % page_len] = text

    def answer(self, work):
        """What became text: some of the drafts, at random, and one token more."""
        if not work.wants_token:
            return []
        num_accepted = self.rng.randint(0, work.num_drafts)
        drafts = work.token_ids[len(work.token_ids) - work.num_drafts :][:num_accepted]
        if work.sequence in self.unfinished:
            life, done = self.lives[work.sequence]
            self.lives[work.sequence] = (life, done + num_accepted)
        return [*drafts, self.rng.randrange(self.vocab_size)]

    def fingerprints(self, sequence):
        prints = self.prints.setdefault(sequence, [])
        text = prints[-1] if prints else hash(sequence.key)
        for token in sequence.tokens[len(prints) :]:
            text = hash((text, token))
            prints.append(text)
        return prints

    def check_tables(self):
        """References balance, and a page is in two tables only as the same part of a text."""
        running, page_len = self.scheduler.running, self.cache.page_len
        self.scheduler.check()
        assert len(running) <= self.options.max_sequences
        assert set(running) | set(self.scheduler.waiting) == self.unfinished
        assert all(not sequence.pages for sequence in self.scheduler.waiting)
        assert [s._age for s in running] == sorted(s._age for s in running)
        self.num_tables = Counter()
        users = {}
        for sequence in running:
            self.num_tables.update(sequence.pages)
            # Not a page more than its tokens, the next one, and drafts may need.
            assert len(sequence.pages) <= self.cache.pages_for(sequence.max_len)
            for index, page in enumerate(sequence.pages):
                other = users.setdefault(page, (index, sequence))
                if other[1] is not sequence:
                    end = (index + 1) * page_len - 1
                    assert other[0] == index
                    assert end < min(sequence.num_computed, other[1].num_computed)
                    assert self.fingerprints(sequence)[end] == self.fingerprints(other[1])[end]

    def run_out(self, limit=5000):
        """Steps until nothing is left; how many it were."""
        for number in range(limit):
            if not self.unfinished:
                return number
            assert self.step(), "work is left, and nothing is done"
        raise AssertionError(f"{len(self.unfinished)} sequences starve")


def prompt(length, seed=0):
    """A prompt unlike that of any other seed."""
    rng = random.Random(seed)
    return [rng.randrange(100_000) for _ in range(length)]


def lens(works):
    return {work.sequence: len(work.token_ids) for work in works}


# Anything at all.

RANDOM_OPTIONS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "num_pages": st.integers(3, 24),
        "page_len": st.integers(1, 5),
        "max_batch_tokens": st.integers(1, 24),
        "max_beside_tokens": st.one_of(st.none(), st.integers(1, 24)),
        "max_sequences": st.integers(1, 8),
        "max_waiting": st.integers(1, 12),
        "max_draft": st.integers(0, 5),
        "draft_sequences": st.integers(0, 5),
        "cache": st.fixed_dictionaries(
            {
                "sharing": st.sampled_from([True, True, False]),
                "max_share": st.sampled_from([0.3, 1]),
            }
        ),
    }
)


def any_steps(options, num_steps):
    """Random arrivals, of few texts so that they share beginnings, and random ends."""
    simulation = Simulation(vocab_size=2, **options)
    rng = random.Random(options["seed"])
    num_slots = simulation.cache.num_pages * simulation.cache.page_len
    for _ in range(num_steps):
        while rng.random() < 0.25:
            prompt_len = rng.randint(1, rng.choice([min(4, num_slots - 1), num_slots - 1]))
            tokens = [0] * prompt_len
            for _ in range(rng.choice([0, 0, 1, 3])):
                tokens[rng.randrange(prompt_len)] = 1
            try:
                for _ in range(rng.choice([1, 1, 1, 3])):
                    simulation.add(
                        tokens,
                        rng.randint(1, min(12, num_slots - prompt_len)),
                        CacheKey(rng.choice(["", "", "b"]), 0),
                        can_share=rng.random() < 0.9,
                        can_draft=rng.random() < 0.8,
                    )
            except OverloadedError:
                assert len(simulation.scheduler.waiting) >= options["max_waiting"]
        by_age = sorted(simulation.unfinished, key=lambda sequence: sequence._age)
        cancel = [sequence for sequence in by_age if rng.random() < 0.03]
        if rng.random() < 0.5:
            for sequence in cancel:
                simulation.finish(sequence)
        had_work = bool(simulation.unfinished)
        assert bool(simulation.step(cancel)) == had_work
    simulation.run_out()
    simulation.cache.check([])
    assert simulation.cache.num_used == 0
    return simulation.scheduler.stats


@settings(max_examples=80, derandomize=True, deadline=None)
@given(RANDOM_OPTIONS)
def test_any_hundred_random_steps_keep_every_rule_and_end(options):
    any_steps(options, 100)


def test_random_steps_go_through_all_there_is():
    """Or the test before would prove little."""
    tight = {"num_pages": 14, "page_len": 2, "max_batch_tokens": 12, "max_sequences": 6}
    stats = any_steps({**tight, "seed": 1, "max_waiting": 9, "draft_sequences": 3}, 1500)
    assert stats.num_steps > 1000
    assert stats.num_preempted > 50
    assert stats.num_cached_tokens > 500
    assert stats.num_accepted > 100
    assert stats.num_drafted > stats.num_accepted
    assert stats.num_prompt_tokens > 2000
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


# Decodes and prompts.


def test_a_long_prompt_stalls_neither_decodes_nor_short_prompts_behind_it():
    simulation = Simulation(2000, 16, max_batch_tokens=128)
    talking = [simulation.add(prompt(20, seed), 400) for seed in range(4)]
    while len(simulation.step()) < 4 or talking[0].num_left > 1:
        pass
    long = simulation.add(prompt(24_000, 50), 4)
    simulation.step()
    short = simulation.add(prompt(40, 51), 4)
    tokens_before = [len(sequence.tokens) for sequence in talking]
    works = lens(simulation.step())
    assert works[short] == 40, "read at once"
    assert works[long] == 128 - 4 - 40, "and nothing is left unused"
    for _ in range(9):
        assert lens(simulation.step())[long] >= 128 // 2 - 4
    assert all(
        len(sequence.tokens) >= before + 10
        for sequence, before in zip(talking, tokens_before, strict=True)
    )
    assert short not in simulation.unfinished


def test_the_oldest_prompt_gets_half_and_the_one_with_least_left_the_other_half():
    simulation = Simulation(200, 4, max_batch_tokens=20)
    long, middle, short = (simulation.add(prompt(length, length), 4) for length in (200, 100, 30))
    assert lens(simulation.step()) == {long: 10, short: 10}
    for _ in range(2):
        simulation.step()
    assert short.num_left == 1
    works = lens(simulation.step())
    assert works[middle] >= 9
    assert works[long] >= 8


def test_a_stream_of_short_prompts_does_not_stop_a_long_one():
    simulation = Simulation(400, 4, max_batch_tokens=16)
    long = simulation.add(prompt(400), 1)
    for seed in range(1, 80):
        if long not in simulation.unfinished:
            return
        simulation.add(prompt(14, seed), 1)
        simulation.step()
    raise AssertionError("the long prompt starves")


def test_each_at_work_gets_a_token_even_if_a_step_has_few():
    simulation = Simulation(max_batch_tokens=3, max_sequences=8)
    for seed in range(6):
        simulation.add(prompt(3, seed), 5)
    while simulation.unfinished:
        simulation.step()
        assert len(simulation.scheduler.running) <= 3


# Pages.


def test_it_starts_only_if_pages_for_the_whole_prompt_and_a_token_can_be_had():
    simulation = Simulation(8, 4, max_batch_tokens=64)
    first = simulation.add(prompt(15), 1)  # 4 pages
    second = simulation.add(prompt(12, 1), 1)  # 3 pages for the prompt, a fourth for its token
    simulation.step()
    assert simulation.scheduler.running == ()
    assert not simulation.unfinished & {first}
    simulation.run_out()
    assert second.num_preemptions == 0


def test_a_page_is_left_for_the_next_token_of_those_at_work():
    simulation = Simulation(8, 4)
    simulation.add(prompt(11), 10)
    waiting = simulation.add(prompt(19, 1), 2)
    simulation.step()
    assert simulation.cache.num_free == 5, "as many as it needs, but not one more"
    assert simulation.scheduler.waiting == (waiting,)


def test_the_newest_is_preempted_and_the_oldest_goes_on():
    simulation = Simulation(8, 4, draft_sequences=0)
    old, new = simulation.add(prompt(11), 20), simulation.add(prompt(11, 1), 20)
    while not simulation.scheduler.stats.num_preempted:
        simulation.step()
    assert simulation.scheduler.running == (old,)
    assert simulation.scheduler.waiting == (new,)
    assert (old.num_preemptions, new.num_preemptions) == (0, 1)
    assert len(new.tokens) > 11, "its text is kept"
    while old in simulation.unfinished:
        before = len(old.tokens)
        simulation.step()
        assert len(old.tokens) > before
    simulation.run_out()
    assert len(new.tokens) == 31


def test_one_preempted_goes_before_all_who_wait_and_finds_its_pages_again():
    simulation = Simulation(9, 4, draft_sequences=0)
    old, new = simulation.add(prompt(11), 14), simulation.add(prompt(11, 1), 20)
    while not new.num_preemptions:
        simulation.step()
    later = simulation.add(prompt(30, 2), 1)
    assert simulation.scheduler.waiting == (new, later)
    while new not in simulation.scheduler.running:
        works = simulation.step()
    [start] = [work.start for work in works if work.sequence is new]
    assert start > 0
    assert new.cached_len == 0, "that is about its first start"
    assert later in simulation.scheduler.waiting or old not in simulation.unfinished
    simulation.run_out()


def test_while_a_large_one_waits_for_pages_a_few_smaller_ones_may_pass_and_no_larger():
    simulation = Simulation(20, 4, max_sequences=4)
    simulation.add(prompt(20), 40)
    simulation.step()
    large = simulation.add(prompt(64, 1), 1)
    larger = simulation.add(prompt(70, 2), 1)
    seeds = iter(range(3, 1000))
    passed = set()
    while large in simulation.scheduler.waiting:
        simulation.add(prompt(4, next(seeds)), 3)
        simulation.step()
        if large in simulation.scheduler.waiting:
            passed |= set(simulation.scheduler.running)
    assert len(passed) == 1 + 8
    assert larger not in passed
    simulation.run_out()


def test_a_large_one_gets_its_turn_under_a_stream_of_small_ones():
    simulation = Simulation(16, 4, max_sequences=6, draft_sequences=0)
    large = simulation.add(prompt(60), 2)
    for seed in range(1, 300):
        if large not in simulation.unfinished:
            return
        if len(simulation.scheduler.waiting) < 6:
            simulation.add(prompt(4, seed), 6)
        simulation.step()
    raise AssertionError("the large one starves")


def test_a_prompt_and_the_answer_to_it_lie_in_a_row_even_in_a_full_cache():
    simulation = Simulation(64, 4, max_batch_tokens=64, draft_sequences=0)
    for seed in range(20):
        simulation.add(prompt(30, seed), 6)
        simulation.run_out()
    assert simulation.cache.num_cached > 50
    sequence = simulation.add(prompt(50, 99), 30)
    while sequence in simulation.unfinished:
        pages = sequence.pages
        simulation.step()
        assert not pages or pages == list(range(pages[0], pages[0] + len(pages)))


def test_chunks_are_small_only_while_somebody_waits_for_his_next_token():
    simulation = Simulation(100, 4, max_batch_tokens=40, max_beside_tokens=6, max_draft=0)
    short = simulation.add(prompt(4), 3)
    long = simulation.add(prompt(150, 1), 2)
    chunks = []
    while long in simulation.unfinished:
        decodes = short in simulation.unfinished and short.num_left == 1
        works = simulation.step()
        chunks += [(decodes, len(work.token_ids)) for work in works if work.sequence is long]
    assert chunks[0] == (False, 36)  # beside the short prompt, which is no waiting token
    assert chunks[1:4] == [(True, 6), (True, 6), (False, 40)]
    assert sum(chunk for _, chunk in chunks) == 150 + 1


# Prefixes.


def test_a_prompt_asked_again_is_read_from_the_cache_and_so_is_its_answer():
    simulation = Simulation(max_batch_tokens=64)
    first = simulation.add(prompt(22), 8)
    simulation.run_out()
    again = simulation.add([*first.tokens, 5, 5], 8)
    [work] = simulation.step()
    # Tokens 0…28 were computed; the last was never run. Seven pages of four.
    assert again.cached_len == work.start == 28
    assert simulation.scheduler.stats.num_cached_tokens == 28
    assert simulation.scheduler.stats.num_prompt_tokens == 22 + 32


def test_who_may_not_share_neither_finds_nor_leaves_anything():
    simulation = Simulation(max_batch_tokens=64)
    simulation.add(prompt(22), 8, can_share=False)
    simulation.run_out()
    assert simulation.cache.num_cached == 0
    simulation.add(prompt(22), 8)
    simulation.run_out()
    alone = simulation.add(prompt(22), 8, can_share=False)
    assert simulation.step()[0].start == 0
    assert alone.cached_len == 0


@pytest.mark.parametrize("num_tokens", [8, 32, 100])
def test_equal_prompts_sent_together_are_read_once(num_tokens):
    simulation = Simulation(200, 4, max_batch_tokens=num_tokens)
    samples = [simulation.add(prompt(41), 5) for _ in range(5)]
    num_read = 0
    while simulation.unfinished:
        num_read += sum(
            len(work.token_ids)
            for work in simulation.step()
            if work.start < work.sequence.prompt_len
        )
    assert num_read == 41 + 4 * 1
    assert [sample.cached_len for sample in samples] == [0, 40, 40, 40, 40]


def test_one_that_shares_only_the_beginning_waits_only_for_that():
    simulation = Simulation(200, 4, max_batch_tokens=16)
    begin = prompt(16)
    long = simulation.add(begin + prompt(100, 1), 5)
    other = simulation.add(begin + prompt(20, 2), 5)
    assert lens(simulation.step()) == {long: 16}
    assert lens(simulation.step()) == {long: 8, other: 8}
    assert other.cached_len == 16


@pytest.mark.parametrize("difference", [0, 3, 7, 8])
def test_nobody_waits_for_one_that_reads_another_text(difference):
    simulation = Simulation(200, 4, max_batch_tokens=16)
    tokens = prompt(60)
    simulation.add(tokens, 5)
    simulation.step()
    tokens[difference] += 1
    other = simulation.add(tokens, 5)
    simulation.add(tokens[:30], 5, CacheKey("else", 0))
    simulation.step()
    assert simulation.scheduler.waiting == ()
    assert other.cached_len == difference // 4 * 4


@pytest.mark.parametrize("moment", ["while it reads", "in mid-step"])
def test_who_waits_for_another_to_read_goes_on_if_that_one_is_cancelled(moment):
    simulation = Simulation(200, 4, max_batch_tokens=8)
    leader, follower = (simulation.add(prompt(40), 5) for _ in range(2))
    simulation.step()
    simulation.step()
    assert simulation.scheduler.waiting == (follower,)
    if moment == "while it reads":
        simulation.finish(leader)
        [work] = simulation.step()
        assert (work.sequence, work.start) == (follower, 16)
    else:
        simulation.step(cancel=[leader])
        [work] = simulation.step()
        assert (work.sequence, work.start) == (follower, 16)
    simulation.run_out()


def test_who_waits_for_another_to_read_is_not_held_up_by_one_that_was_preempted():
    simulation = Simulation(24, 4, max_batch_tokens=6, draft_sequences=0)
    talking = simulation.add(prompt(3, 1), 60)
    simulation.step()
    leader, follower = (simulation.add(prompt(70), 5) for _ in range(2))
    while not leader.num_preemptions:
        simulation.step()
        assert talking in simulation.unfinished
    assert simulation.run_out() < 200
    assert len(follower.tokens) == 75


def test_a_short_one_does_not_wait_for_a_long_reader_that_itself_waits():
    simulation = Simulation(400, 4, max_batch_tokens=8)
    begin = prompt(32)
    simulation.add(prompt(300, 1), 2)
    reader = simulation.add(begin + prompt(100, 2), 2)
    simulation.step()
    simulation.step()
    # Two prompts with less left take what the oldest leaves.
    shorter = [simulation.add(prompt(60, seed), 2) for seed in (3, 4)]
    simulation.step()
    simulation.step()
    assert reader.num_computed < 32
    short = simulation.add([*begin, 7], 2)
    simulation.step()
    assert short in simulation.scheduler.running
    while short in simulation.unfinished:
        simulation.step()
    assert any(sequence in simulation.unfinished for sequence in [reader, *shorter])
    simulation.run_out()


def test_equal_prompts_do_wait_for_a_reader_that_waits_for_others():
    simulation = Simulation(400, 4, max_batch_tokens=8)
    simulation.add(prompt(300, 1), 2)
    leader = simulation.add(prompt(60), 2)
    simulation.step()
    simulation.add(prompt(40, 3), 2)
    for _ in range(3):
        simulation.step()
    assert leader.num_computed < 16
    follower = simulation.add(prompt(60), 2)
    simulation.run_out()
    assert follower.cached_len == 56


# Drafts.


def test_drafts_are_tried_while_few_run():
    simulation = Simulation(200, 4, draft_sequences=2, max_batch_tokens=64, vocab_size=1)
    sequences = [simulation.add([seed, *[0] * 12], 60) for seed in range(2)]
    simulation.step()
    works = simulation.step()
    assert [work.num_drafts for work in works] == [2, 2]
    assert works[0].token_ids == [0, 0, 0]
    simulation.add([9] * 8, 60)
    assert [work.num_drafts for work in simulation.step()] == [0, 0, 0]
    simulation.finish(sequences[0])
    assert sum(work.num_drafts for work in simulation.step()) > 0


@pytest.mark.parametrize("off", [{"max_draft": 0}, {"draft_sequences": 0}, {"max_batch_tokens": 1}])
def test_drafts_can_be_off(off):
    simulation = Simulation(vocab_size=1, **off)
    simulation.add([0] * 12, 40)
    simulation.run_out()
    assert simulation.scheduler.stats.num_drafted == 0


def test_the_last_token_is_not_drafted_and_the_one_before_may_be():
    simulation = Simulation(vocab_size=1, max_batch_tokens=64)
    simulation.add([0] * 12, 3)
    simulation.step()
    assert [work.num_drafts for work in simulation.step()] == [1]


def test_a_sequence_that_may_not_be_drafted_is_not():
    simulation = Simulation(vocab_size=1)
    simulation.add([0] * 12, 40, can_draft=False)
    simulation.run_out()
    assert simulation.scheduler.stats.num_drafted == 0


def test_drafts_leave_half_of_a_step_to_prompts():
    simulation = Simulation(200, 4, max_batch_tokens=9, max_draft=8, vocab_size=1)
    simulation.add([0] * 30, 100)
    for _ in range(8):
        simulation.step()
    reading = simulation.add(prompt(100, 3), 4)
    while reading.num_left > 1:
        assert lens(simulation.step())[reading] >= 1
    assert simulation.scheduler.stats.num_drafted > 0


def test_a_draft_preempts_nobody():
    simulation = Simulation(8, 4, vocab_size=1)
    talking = [simulation.add([seed, *[0] * 8], 6) for seed in range(2)]
    filler = simulation.add(prompt(6, 5), 1)
    while talking[0] in simulation.unfinished:
        simulation.step()
    assert simulation.scheduler.stats.num_drafted > 0
    assert [sequence.num_preemptions for sequence in [*talking, filler]] == [0, 0, 0]


# The edges.


def test_commit_of_a_finished_sequence_changes_nothing():
    simulation = Simulation()
    sequence = simulation.add(prompt(10), 5)
    [work] = simulation.scheduler.schedule()
    simulation.scheduler.finish(sequence)
    simulation.scheduler.finish(sequence)
    simulation.scheduler.commit(work, [1])
    assert len(sequence.tokens) == 10
    assert simulation.scheduler.stats.num_generated_tokens == 0
    simulation.cache.check([])


def test_a_step_that_failed_is_given_again():
    simulation = Simulation(max_batch_tokens=8, vocab_size=1)
    simulation.add([0] * 10, 9)
    while simulation.unfinished:
        simulation.scheduler.schedule()
        simulation.check_tables()
        simulation.step()
    assert simulation.scheduler.stats.num_drafted > 0


def test_a_commit_that_cannot_be_is_refused():
    simulation = Simulation(max_batch_tokens=8)
    scheduler = simulation.scheduler
    simulation.add(prompt(10), 5)
    [chunk] = scheduler.schedule()
    with pytest.raises(EngineError, match="gained 1 tokens from a step that gives from 0 to 0"):
        scheduler.commit(chunk, [1])
    scheduler.commit(chunk, [])
    with pytest.raises(EngineError, match="has no work at 0"):
        scheduler.commit(chunk, [])
    [last] = scheduler.schedule()
    with pytest.raises(EngineError, match="gained 0 tokens from a step that gives from 1 to 1"):
        scheduler.commit(last, [])
    with pytest.raises(EngineError, match="gained 2 tokens"):
        scheduler.commit(last, [1, 2])
    drafted = replace(last, token_ids=[*last.token_ids, 7, 8], num_drafts=2)
    with pytest.raises(EngineError, match="were not drafted"):
        scheduler.commit(drafted, [7, 9, 1])
    scheduler.commit(last, [1])


def test_who_has_all_its_tokens_gets_no_more_work():
    simulation = Simulation()
    sequence = simulation.add(prompt(10), 1)
    [work] = simulation.scheduler.schedule()
    simulation.scheduler.commit(work, [1])
    assert simulation.scheduler.schedule() == []
    assert simulation.scheduler.running == (sequence,)


def test_a_full_queue_refuses():
    simulation = Simulation(max_waiting=2)
    for seed in range(2):
        simulation.add(prompt(5, seed))
    with pytest.raises(OverloadedError, match="2 sequences wait and at most 2 may"):
        simulation.add(prompt(5, 2))
    simulation.step()
    simulation.add(prompt(5, 3))


def test_what_could_never_fit_is_refused_and_what_just_fits_is_not():
    simulation = Simulation(8, 4)
    with pytest.raises(CapacityError, match="33 tokens need 9 pages of 4, and there are 8"):
        simulation.add(prompt(20), 13)
    simulation.add(prompt(20), 12)
    simulation.run_out()


@pytest.mark.parametrize(("prompt_ids", "max_len"), [([], 4), ([1, 2], 2), ([1, 2], 1)])
def test_an_empty_prompt_and_an_empty_answer_are_refused(prompt_ids, max_len):
    scheduler = Simulation().scheduler
    with pytest.raises(RequestError, match="room for one more"):
        scheduler.add(Sequence(id="s", prompt_ids=prompt_ids, max_len=max_len, key=KEY))


def test_a_sequence_is_added_once():
    simulation = Simulation()
    sequence = simulation.add(prompt(5))
    with pytest.raises(EngineError, match="added or finished before"):
        simulation.scheduler.add(sequence)


@pytest.mark.parametrize(
    "option",
    [{"max_batch_tokens": 0}, {"max_sequences": 0}, {"max_draft": -1}, {"max_waiting": 1.5}],
)
def test_senseless_limits_are_refused(option):
    with pytest.raises(RequestError, match=f"{next(iter(option))} must be from .*, is"):
        SchedulerOptions(**option)


def test_with_nothing_to_do_there_is_no_work():
    simulation = Simulation()
    assert simulation.scheduler.schedule() == []
    assert simulation.scheduler.stats.num_steps == 0
