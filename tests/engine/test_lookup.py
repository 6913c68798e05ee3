"""Prompt lookup finds what a plain search finds, and costs nothing where nothing repeats."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longwing.engine.lookup import PromptLookup
from longwing.errors import ConfigError

FEW_TOKENS = st.lists(st.integers(0, 2), max_size=30)  # few, so that n-grams come again


def searched(tokens, limit, min_ngram, max_ngram):
    """The same draft by looking at every position."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) >= n and tokens[end - n : end] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for position in range(end, end + limit):  # reads what it has just written
                    text.append(text[position])
                return text[len(tokens) :]
    return []


@settings(max_examples=300, derandomize=True, deadline=None)
@given(FEW_TOKENS, st.lists(st.integers(1, 7)), st.integers(1, 3), st.integers(0, 2))
def test_drafts_are_those_of_a_plain_search_however_the_text_arrives(tokens, cuts, low, more):
    lookup = PromptLookup(max_draft=6, min_ngram=low, max_ngram=low + more)
    for _ in range(2):
        lookup.judge(6, 6)
    rest = list(tokens)
    for cut in cuts:
        lookup.extend(rest[:cut])
        del rest[:cut]
        seen = tokens[: len(tokens) - len(rest)]
        assert len(lookup) == len(seen)
        assert lookup.draft(6) == searched(seen, 6, low, low + more)


def test_the_longest_ngram_wins_and_of_equal_ones_the_latest():
    lookup = PromptLookup(min_ngram=2, max_ngram=3)
    lookup.extend([1, 2, 3, 70, 8, 2, 3, 80, 2, 3, 90, 1, 2, 3])
    assert lookup.draft(1) == [70]
    lookup.extend([5, 2, 3])
    assert lookup.draft(1) == [5]


def test_a_period_is_continued_past_the_end_of_the_text():
    lookup = PromptLookup(max_draft=8)
    lookup.extend([4, 5, 6, 4, 5, 6])
    lookup.judge(4, 4)
    assert lookup.draft(8) == [4, 5, 6, 4, 5, 6, 4, 5]


def test_a_draft_is_no_longer_than_the_limit():
    lookup = PromptLookup(max_draft=8)
    lookup.extend([1, 2] * 10)
    lookup.judge(8, 8)
    assert [len(lookup.draft(limit)) for limit in (-1, 0, 1, 3, 8, 100)] == [0, 0, 1, 3, 8, 8]


def test_nothing_is_drafted_from_nothing():
    lookup = PromptLookup()
    assert lookup.draft(8) == []
    lookup.extend([])
    lookup.extend([1])
    assert lookup.draft(8) == []
    lookup.judge(0, 0)
    assert len(lookup) == 1


def test_the_length_follows_what_is_accepted():
    lookup = PromptLookup(max_draft=8)
    lookup.extend([1, 2] * 10)
    lengths = [len(lookup.draft(8))]
    for num_accepted in (2, 4, 8, 3, 4, 0, 0):
        lookup.judge(lengths[-1], num_accepted)
        lengths.append(len(lookup.draft(8)))
    assert lengths == [2, 4, 8, 8, 4, 8, 4, 2]


def test_failing_drafts_pause_for_longer_each_time_and_are_tried_again():
    lookup = PromptLookup()
    lookup.extend([1, 2] * 10)
    tried_at = []
    for position in range(300):
        draft = lookup.draft(8)
        if draft:
            tried_at.append(position)
            lookup.judge(len(draft), 0)
        lookup.extend([1 + position % 2])
    gaps = [b - a for a, b in itertools.pairwise(tried_at)]
    assert gaps == [1, 4, 8, 16, 32, 64, 64, 64]


def simulated(text, prompt_len):
    """Passes and drafts that it takes to write the rest of a text."""
    lookup = PromptLookup()
    lookup.extend(text[:prompt_len])
    done, num_passes, num_wasted = prompt_len, 0, 0
    while done < len(text):
        draft = lookup.draft(8)
        num_right = 0
        while num_right < min(len(draft), len(text) - done - 1) and (
            draft[num_right] == text[done + num_right]
        ):
            num_right += 1
        lookup.judge(len(draft), num_right)
        lookup.extend(text[done : done + num_right + 1])
        done += num_right + 1
        num_passes += 1
        num_wasted += len(draft) - num_right
    return num_passes, num_wasted


def test_a_quotation_is_written_in_a_fifth_of_the_passes():
    rng = random.Random(1)
    prompt = [rng.randrange(5000) for _ in range(2000)]
    answer = prompt[300:700]
    num_passes, num_wasted = simulated(prompt + answer, len(prompt))
    assert num_passes < len(answer) / 5
    assert num_wasted < 20


def test_text_that_looks_familiar_but_goes_on_otherwise_costs_one_token_in_twenty():
    rng = random.Random(2)
    text = [rng.randrange(40) for _ in range(4000)]  # every pair has been seen, no continuation is
    num_passes, num_wasted = simulated(text, 2000)
    assert num_passes > 1850
    assert num_wasted < 2000 / 20


@pytest.mark.parametrize(
    "options", [{"max_draft": 0}, {"min_ngram": 0}, {"min_ngram": 3, "max_ngram": 2}]
)
def test_senseless_numbers_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1"):
        PromptLookup(**options)
