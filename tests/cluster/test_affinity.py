"""Where a prompt should go: to who has read it, within bounds."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from longwing.cluster.affinity import (
    BLOCK_LEN,
    Preference,
    PrefixMap,
    block_names,
    document_key,
    ranked,
)

REPLICAS = ["a", "b", "c"]


def document(seed: int, length: int = 4000) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(65_024) for _ in range(length)]


@given(
    st.lists(st.integers(0, 65_023), min_size=1, max_size=400),
    st.lists(st.integers(0, 65_023), min_size=1, max_size=400),
)
def test_blocks_have_equal_names_exactly_where_prefixes_are_equal(
    first: list[int], second: list[int]
) -> None:
    pairs = zip(block_names(first), block_names(second), strict=False)
    for place, (one, other) in enumerate(pairs):
        end = (place + 1) * BLOCK_LEN
        assert (one == other) == (first[:end] == second[:end])


def test_prompt_goes_to_who_read_its_document() -> None:
    prefixes = PrefixMap()
    prefixes.learn(block_names([*document(1), 1, 2, 3]), "b")
    prefixes.learn(block_names(document(2)), "c")
    asked = block_names([*document(1), 9, 9, 9, 9])
    assert prefixes.reader(asked) == "b"
    assert ranked(REPLICAS, Preference(reader="b", key=document_key(asked)))[0] == "b"
    assert prefixes.reader(block_names(document(3))) is None
    prefixes.forget("b")
    assert prefixes.reader(asked) is None
    assert prefixes.reader(block_names(document(2))) == "c"


def test_common_system_prompt_does_not_draw_all_requests_to_one_replica() -> None:
    system = document(0, 500)
    prefixes = PrefixMap()
    prefixes.learn(block_names([*system, *document(1)]), "a")
    assert prefixes.reader(block_names([*system, *document(2)])) is None
    assert prefixes.reader(block_names([*system, *document(1)[:500]])) == "a"


def test_reader_that_is_too_busy_is_passed_over() -> None:
    wish = Preference(reader="a", key=b"k", loads={"a": 9, "b": 1, "c": 1})
    assert ranked(REPLICAS, wish)[-1] == "a"
    assert ranked(REPLICAS, Preference(reader="a", key=b"k", loads={"a": 3, "b": 1}))[0] == "a"


def test_replica_that_failed_a_request_comes_last() -> None:
    assert ranked(REPLICAS, Preference(reader="a", key=b"k", avoid=frozenset("a")))[-1] == "a"


def test_fronts_that_know_nothing_of_each_other_choose_alike_and_spread() -> None:
    keys = [document_key(block_names(document(seed, 1500))) for seed in range(300)]
    chosen = [ranked(REPLICAS, Preference(key=key))[0] for key in keys]
    assert chosen == [ranked(reversed(REPLICAS), Preference(key=key))[0] for key in keys]
    assert min(Counter(chosen).values()) > 70


def test_replica_more_moves_only_its_share_of_documents() -> None:
    keys = [document_key(block_names(document(seed, 1500))) for seed in range(300)]
    before = [ranked(REPLICAS, Preference(key=key))[0] for key in keys]
    after = [ranked([*REPLICAS, "d"], Preference(key=key))[0] for key in keys]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"d"}
    assert 40 < len(moved) < 120


def test_map_forgets_ends_before_beginnings() -> None:
    prefixes = PrefixMap(max_blocks=20)
    names = block_names(document(1, BLOCK_LEN * 30))
    prefixes.learn(names, "a")
    assert len(prefixes) == 20
    assert prefixes.reader(names[:20]) == "a"


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50)), st.binary(max_size=8))
def test_every_replica_is_ranked_once(loads: dict[str, int], key: bytes) -> None:
    wish = Preference(reader="a", key=key, loads=loads)
    assert sorted(ranked("abcd", wish)) == list("abcd")
