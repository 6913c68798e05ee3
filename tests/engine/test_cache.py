"""Pages are never lost nor given to two, and a prefix is found exactly if it is the same text."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from longwing.engine.cache import CacheKey, PageCache
from longwing.errors import ConfigError, EngineError

PAGE_LEN = 4
KEY = CacheKey("tenant", 0)


def held_text(cache, tokens, key=KEY):
    """The pages of a text that was just computed: matched, allocated, published."""
    pages = cache.match(key, tokens)
    num_matched = len(pages)
    while len(pages) < cache.pages_for(len(tokens)):
        pages.append(cache.allocate(pages[-1] if pages else None))
    assert None not in pages
    cache.publish(key, tokens, pages, num_matched, len(tokens) // PAGE_LEN)
    return pages


def remember(cache, tokens, key=KEY):
    """Let a text pass through, so that its full pages are cached. How many it found."""
    found = cache.match(key, tokens)
    cache.release(found)
    cache.release(held_text(cache, tokens, key))
    return len(found)


def find(cache, tokens, key=KEY):
    pages = cache.match(key, tokens)
    cache.release(pages)
    return len(pages)


# What is found.


def test_the_longest_prefix_in_whole_pages_is_found():
    cache = PageCache(20, PAGE_LEN)
    text = list(range(18))
    pages = held_text(cache, text)
    assert cache.match(KEY, [*text[:14], 99, 98, 97, 96]) == pages[:3]
    assert cache.match(KEY, [99, *text]) == []
    assert cache.match(KEY, [*text[:3], 99, *text[4:]]) == []


@pytest.mark.parametrize(("length", "num_found"), [(4, 0), (5, 1), (8, 1), (9, 2), (12, 2)])
def test_a_token_is_always_left_to_compute(length, num_found):
    cache = PageCache(20, PAGE_LEN)
    remember(cache, list(range(12)))
    assert find(cache, list(range(length))) == num_found


@pytest.mark.parametrize(
    "other",
    [CacheKey("else", 0), CacheKey("tenant", 1), CacheKey("tenant", 0, "lora"), CacheKey("", 0)],
)
def test_nothing_is_shared_across_salts_rope_rungs_and_adapters(other):
    cache = PageCache(20, PAGE_LEN)
    remember(cache, list(range(12)))
    assert find(cache, list(range(12)), other) == 0
    assert find(cache, list(range(12))) == 2


def test_texts_whose_hashes_collide_are_told_apart():
    """hash(-1) == hash(-2), and so it is for tuples of them."""
    assert hash((-1,) * PAGE_LEN) == hash((-2,) * PAGE_LEN)
    cache = PageCache(20, PAGE_LEN)
    remember(cache, [-1] * 9)
    assert find(cache, [-2] * 9) == 0
    assert find(cache, [-1] * 9) == 2


def test_equal_pages_behind_different_beginnings_are_different():
    cache = PageCache(20, PAGE_LEN)
    remember(cache, [1] * 4 + [5] * 4 + [0])
    assert find(cache, [2] * 4 + [5] * 4 + [0]) == 0
    assert find(cache, [5] * 4 + [0]) == 0


def test_a_page_that_is_published_twice_stays_with_the_first():
    cache = PageCache(20, PAGE_LEN)
    text = list(range(13))
    tables = [[cache.allocate() for _ in range(4)] for _ in range(2)]
    for start in range(3):
        for table in tables:
            cache.publish(KEY, text, table, start, start + 1)
    assert cache.match(KEY, text) == tables[0][:3]
    cache.check([*tables, tables[0][:3]])
    cache.release(tables[1])
    assert cache.num_cached == 0  # nobody could have found them


def test_without_sharing_nothing_is_found_or_kept():
    cache = PageCache(20, PAGE_LEN, sharing=False)
    assert remember(cache, list(range(12))) == 0
    assert find(cache, list(range(12))) == 0
    assert cache.num_cached == 0


# What is evicted.


def test_a_page_in_use_is_never_evicted_and_running_out_is_told():
    cache = PageCache(3, PAGE_LEN)
    pages = held_text(cache, list(range(12)))
    assert cache.allocate() is None
    assert (cache.num_used, cache.num_free, cache.num_cached) == (3, 0, 0)
    cache.release(pages)
    assert (cache.num_used, cache.num_free, cache.num_cached) == (0, 3, 3)
    assert cache.allocate() is not None


def test_the_least_recently_used_text_goes_first_and_its_last_page_before_its_first():
    cache = PageCache(6, PAGE_LEN)
    old, new = [1] * 13, [2] * 13
    remember(cache, old[:12])
    remember(cache, new[:12])
    assert find(cache, old) == 3  # and is thereby the most recently used
    lengths = []
    for _ in range(6):
        cache.allocate()
        lengths.append((find(cache, new[:13]), find(cache, old[:13])))
    assert lengths == [(2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]


def test_a_shared_beginning_outlives_its_continuations():
    cache = PageCache(6, PAGE_LEN)
    begin = [7] * 8
    tables = [held_text(cache, begin + [tail] * 4) for tail in (1, 2)]
    for table in tables:
        cache.release(table)
    for _ in range(4):
        cache.allocate()
    assert [find(cache, [*begin, *[tail] * 5]) for tail in (1, 2)] == [2, 2]


def test_a_tenant_who_floods_the_cache_evicts_himself():
    cache = PageCache(20, PAGE_LEN, max_share=0.5)
    victim, flood = CacheKey("victim", 0), CacheKey("flood", 0)
    text = [0] * 20
    remember(cache, text, victim)
    for number in range(100):
        remember(cache, [number] * 20, flood)
        assert cache.num_cached <= 5 + 10
    assert find(cache, [*text, 0], victim) == 5
    assert find(cache, [99] * 21, flood) == 5
    assert find(cache, [97] * 21, flood) == 0


def test_a_share_of_nothing_keeps_nothing_and_no_trace_of_a_salt_stays():
    cache = PageCache(20, PAGE_LEN, max_share=0.0)
    remember(cache, list(range(12)))
    assert cache.num_cached == 0
    cache = PageCache(4, PAGE_LEN)
    for number in range(50):
        remember(cache, [1] * 8, CacheKey(f"salt {number}", 0))
    assert len(cache._roots) == 2
    assert len(cache._queue_of_salt) == 2


# Where pages lie.


def grown(cache, lengths, room):
    """Sequences that grow by turns, as decoding does."""
    tables = [[] for _ in lengths]
    for _ in range(max(lengths)):
        for table, length in zip(tables, lengths, strict=True):
            if len(table) < length:
                table.append(cache.allocate(table[-1] if table else None, room=room - len(table)))
    return tables


def is_in_row(pages):
    return pages == list(range(pages[0], pages[0] + len(pages)))


@pytest.mark.parametrize("room", [10, 60])
def test_sequences_that_grow_side_by_side_lie_each_in_a_row(room):
    cache = PageCache(80, PAGE_LEN)
    assert all(is_in_row(table) for table in grown(cache, [10, 8, 9, 10], room))


def test_a_small_sequence_leaves_a_row_for_a_large_one():
    cache = PageCache(100, PAGE_LEN)
    small = grown(cache, [3, 3, 3], room=10)
    large = grown(cache, [65], room=65)
    assert all(is_in_row(table) for table in small + large)


def test_room_kept_for_one_that_went_on_elsewhere_is_given_to_others():
    cache = PageCache(40, PAGE_LEN)
    first = cache.allocate(room=20)
    in_between = cache.allocate(first)
    assert cache.allocate(first, room=19) != first + 1
    cache.release([in_between])
    assert cache.allocate() == in_between


def test_a_gap_that_fits_is_filled_before_the_large_run_is_cut():
    cache = PageCache(100, PAGE_LEN)
    first, second = grown(cache, [6], room=6)[0], grown(cache, [6], room=6)[0]
    cache.release(first)
    assert grown(cache, [6], room=6) == [first]
    assert is_in_row(second)


def test_pages_evicted_together_are_a_row_again():
    cache = PageCache(10, PAGE_LEN)
    remember(cache, list(range(40)))
    assert cache.num_cached == 10
    cache.clear(4)
    assert cache.num_cached == 6
    assert is_in_row(grown(cache, [4], room=4)[0])


def test_making_a_row_evicts_at_most_twice_what_is_needed():
    cache = PageCache(20, PAGE_LEN)
    tables = [remember_apart(cache, number) for number in range(10)]
    cache.clear(5)
    assert len(cache._free) == 10
    cache.clear(5)
    assert len(cache._free) == 10
    cache.release([page for table in tables for page in table])
    cache.clear(99)
    assert cache.num_cached == 0


def remember_apart(cache, number):
    """Two pages: the first will merely be cached, the second stays held. Returns the second."""
    [page] = held_text(cache, [number] * 4)
    held = cache.allocate(page)
    cache.release([page])
    return [held]


# Bookkeeping.


def test_giving_back_twice_is_an_error():
    cache = PageCache(4, PAGE_LEN)
    page = cache.allocate()
    cache.release([page])
    with pytest.raises(EngineError, match="more often than taken"):
        cache.release([page])


def test_publishing_what_is_not_full_not_held_or_known_by_another_text_is_an_error():
    cache = PageCache(4, PAGE_LEN)
    page = cache.allocate()
    with pytest.raises(EngineError, match="cannot be published"):
        cache.publish(KEY, [1, 2, 3], [page], 0, 1)
    cache.publish(KEY, [1, 2, 3, 4], [page], 0, 1)
    cache.publish(KEY, [1, 2, 3, 4], [page], 0, 1)  # again is no harm
    with pytest.raises(EngineError, match="cannot be published"):
        cache.publish(KEY, [5, 6, 7, 8], [page], 0, 1)


def test_check_finds_a_page_lost_and_a_page_given_to_two():
    cache = PageCache(4, PAGE_LEN)
    pages = held_text(cache, list(range(8)))
    cache.check([pages])
    with pytest.raises(EngineError, match="2 of 4 pages are miscounted; page"):
        cache.check([])
    with pytest.raises(EngineError, match="in 2 page tables and has 1 references"):
        cache.check([pages, pages[:1]])


@pytest.mark.parametrize("damage", ["queue", "salts", "order", "tree", "free"])
def test_check_finds_damage_inside(damage):
    cache = PageCache(6, PAGE_LEN)
    remember(cache, list(range(8)))
    held = held_text(cache, [9] * 8)
    cache.check([held])
    last, first = cache._queue
    if damage == "queue":
        del cache._queue[last]
    elif damage == "salts":
        del cache._queue_of_salt["tenant"][last]
    elif damage == "order":
        cache._queue.move_to_end(last)
    elif damage == "tree":
        cache._node_of[first].children.clear()
    elif damage == "free":
        cache._node_of[cache._free.take(1)] = cache._node_of[last]
        cache._free.give(next(iter(set(range(6)) - cache._free.pages() - {last, first, *held})))
    with pytest.raises(EngineError):
        cache.check([held])


@pytest.mark.parametrize(
    ("args", "options"),
    [((0, 4), {}), ((4, 0), {}), ((4, 4), {"max_share": 1.5}), ((4, 4), {"max_share": -0.1})],
)
def test_senseless_sizes_are_refused(args, options):
    with pytest.raises(ConfigError):
        PageCache(*args, **options)


class AnySteps(RuleBasedStateMachine):
    """Texts over two tokens come and go; a plain list of texts says what may be found."""

    @initialize(
        num_pages=st.integers(1, 12), share=st.sampled_from([0.0, 0.3, 1.0]), sharing=st.booleans()
    )
    def begin(self, num_pages, share, sharing):
        self.cache = PageCache(num_pages, 2, sharing=sharing, max_share=share)
        self.num_kept = int(share * num_pages)
        self.held = []  # (key, text, page table)
        self.written = {}  # page: (key, text up to its end)

    @rule(
        salt=st.sampled_from("ab"),
        text=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        room=st.integers(1, 9),
        row=st.integers(0, 4),
    )
    def start(self, salt, text, room, row):
        key = CacheKey(salt, 0)
        pages = self.cache.match(key, text)
        num_matched = len(pages)
        assert num_matched * 2 < len(text)
        for index, page in enumerate(pages):
            assert self.written[page] == (key, text[: 2 * index + 2])
        self.cache.clear(row)
        while len(pages) < self.cache.pages_for(len(text)):
            page = self.cache.allocate(pages[-1] if pages else None, room=room)
            if page is None:
                assert self.cache.num_free == 0
                break
            assert all(page not in table for _, _, table in self.held)
            pages.append(page)
            self.written[page] = (key, text[: 2 * len(pages)])
        text = text[: 2 * len(pages)]
        self.cache.publish(key, text, pages, num_matched, len(text) // 2)
        self.held.append((key, text, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        _, _, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache.release(pages)

    @invariant()
    def counts_balance(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        cache.check(pages for _, _, pages in self.held)
        assert cache.num_used == len({page for _, _, pages in self.held for page in pages})
        assert cache.num_used + cache.num_free == cache.num_pages
        assert all(len(queue) <= self.num_kept for queue in cache._queue_of_salt.values())


TestAnySteps = AnySteps.TestCase
TestAnySteps.settings = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None
)


def test_free_runs_are_what_a_set_of_pages_says():
    rng = random.Random(3)
    cache = PageCache(50, PAGE_LEN)
    held = []
    for _ in range(3000):
        if held and rng.random() < 0.49:
            cache.release([held.pop(rng.randrange(len(held)))])
        else:
            page = cache.allocate(rng.choice(held) if held else None, room=rng.randrange(1, 20))
            assert (page is None) == (len(held) == 50)
            held += [page] if page is not None else []
        free = cache._free
        assert free.pages() == set(range(50)) - set(held)
        # Neighbouring runs are always one.
        assert not set(free._stop_of) & set(free._start_of)
        assert {start for runs in free._by_size for start in runs} == set(free._stop_of)
