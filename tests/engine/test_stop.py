"""StopStrings on pieces of a text gives what a search in the whole gives, as early as it can."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longwing.engine.stop import StopStrings
from longwing.errors import SamplingError

FEW_LETTERS = st.text(alphabet="ab", max_size=30)  # few, so that prefixes and overlaps abound
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=5)
CUTS = st.lists(st.integers(0, 30), max_size=8)


def pieces_of(text, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def whole_text_search(text, stops, include_stop):
    """The text up to the stop that ends first, of those the longest; and that stop."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include_stop else end - len(stop)], stop


def run(watch, pieces):
    emitted = ""
    for piece in pieces:
        text, stopped = watch.push(piece)
        emitted += text
        assert stopped == (watch.matched is not None)
    return emitted + watch.flush()


@settings(max_examples=500, derandomize=True, deadline=None)
@given(text=FEW_LETTERS, stops=STOPS, cuts=CUTS, include_stop=st.booleans())
def test_any_pieces_give_what_a_search_in_the_whole_text_gives(text, stops, cuts, include_stop):
    watch = StopStrings(stops, include_stop=include_stop)
    emitted = run(watch, pieces_of(text, cuts))
    assert (emitted, watch.matched) == whole_text_search(text, stops, include_stop)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(text=FEW_LETTERS, stops=STOPS)
def test_only_what_could_still_become_a_stop_string_is_held_back(text, stops):
    watch, seen, emitted = StopStrings(stops), "", ""
    for char in text:
        piece, stopped = watch.push(char)
        seen, emitted = seen + char, emitted + piece
        if stopped:
            return
        could_grow = max(
            (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0
        )
        assert emitted == seen[: len(seen) - could_grow]


def test_a_stop_string_over_three_pieces_is_found_and_not_shown():
    watch = StopStrings(["\nUser:"])
    assert watch.push("Yes.\n") == ("Yes.", False)
    assert watch.push("Use") == ("", False)
    assert watch.push("r: and more") == ("", True)
    assert watch.matched == "\nUser:"


def test_a_false_start_is_let_out_when_it_is_known_to_be_one():
    watch = StopStrings(["###"])
    assert watch.push("a#") == ("a", False)
    assert watch.push("#b") == ("##b", False)


def test_a_stop_string_inside_a_token_is_found():
    assert StopStrings(["Pari"]).push(" Paris") == (" ", True)


def test_of_two_stops_the_one_that_ends_first_wins_though_the_other_began_first():
    watch = StopStrings(["abcd", "bc"])
    assert watch.push("xabcd") == ("xa", True)
    assert watch.matched == "bc"


def test_of_two_stops_that_end_together_the_longer_wins():
    watch = StopStrings(["c", "abc"])
    assert watch.push("xab") == ("x", False)
    assert watch.push("c") == ("", True)
    assert watch.matched == "abc"


def test_the_stop_string_is_shown_where_asked():
    watch = StopStrings(["###"], include_stop=True)
    assert watch.push("a##") == ("a", False)
    assert watch.push("#b") == ("###", True)


def test_after_a_stop_nothing_more_comes():
    watch = StopStrings(["."])
    watch.push("a.b")
    assert watch.push("c") == ("", True)
    assert watch.flush() == ""


def test_flush_gives_the_held_text_once():
    watch = StopStrings(["stop"])
    watch.push("st")
    assert watch.flush() == "st"
    assert watch.flush() == ""
    assert watch.push("op") == ("op", False)


def test_without_stop_strings_all_text_passes_at_once():
    assert StopStrings(()).push("any text") == ("any text", False)


def test_any_character_can_be_part_of_a_stop_string():
    watch = StopStrings(["\0\ud800😀"])
    assert watch.push("a\0\ud800") == ("a", False)
    assert watch.push("😀") == ("", True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(SamplingError, match="empty stop string"):
        StopStrings(["a", ""])


def test_even_the_worst_text_costs_at_most_one_fallback_a_character():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    watch = StopStrings(["a" * 255 + "b", "a" * 100 + "c"])
    watch._automaton.fallback = Counted(watch._automaton.fallback)
    text = ("a" * 255 + "x" + "a" * 120) * 20  # a naive search compares each letter 255 times
    for start in range(0, len(text), 7):
        watch.push(text[start : start + 7])
    assert 0 < Counted.reads <= len(text)
