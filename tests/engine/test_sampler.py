"""The sampler against transformers, against definitions, and against itself in other company."""

import math
import random

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from longwing.engine import sampler, sampling_state
from longwing.engine.distribution import _border, draw
from longwing.engine.request import SamplingParams
from longwing.engine.sampler import probabilities, sample, uniform
from longwing.engine.sampling_state import SamplingState
from longwing.errors import LogitsError, RequestError

VOCAB_LEN = 1003  # odd, so that rows of a batch are not aligned alike


def random_logits(num_rows, seed, vocab_len=VOCAB_LEN, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_len, generator=generator) * spread


def state_with(*, prompt_ids=(), answer_ids=(), eos_token_ids=(), **settings):
    state = SamplingState(SamplingParams(**settings), prompt_ids, eos_token_ids=eos_token_ids)
    for token_id in answer_ids:
        state.accept(token_id)
    return state


def distribution(logits_V, **settings):
    return probabilities(torch.as_tensor(logits_V), state_with(**{"temperature": 1.0} | settings))


def kept(probs_V):
    return set(probs_V.nonzero()[:, 0].tolist())


# Against transformers


def by_transformers(logits_V, ids, params):
    """The distribution of transformers' own processors, in generate()'s order."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.temperature != 1:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        chain.append(TypicalLogitsWarper(params.typical_p))
    return chain(torch.tensor([ids], dtype=torch.long), logits_V[None].clone()).softmax(-1)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"typical_p": 0.2},
        {"typical_p": 0.95},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"temperature": 0.7, "top_k": 100, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
        {"temperature": 1.5, "top_p": 0.95, "typical_p": 0.2, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(settings):
    prompt_ids, answer_ids = [3, 5, 5, 900], [7, 3, 1002]
    state = state_with(
        prompt_ids=prompt_ids, answer_ids=answer_ids, **{"temperature": 1.0} | settings
    )
    for spread, logits_V in enumerate(random_logits(6, seed=1), start=1):
        theirs_V = by_transformers(logits_V * spread / 3, prompt_ids + answer_ids, state.params)
        ours_V = probabilities(logits_V * spread / 3, state)
        torch.testing.assert_close(ours_V, theirs_V, rtol=0, atol=1e-6)
        # A token below 2**-42 of the likeliest is gone here and next to nothing there.
        visible_V = theirs_V > theirs_V.max() * 2**-41
        assert kept(ours_V.where(visible_V, 0)) == kept(theirs_V.where(visible_V, 0))


def test_repetition_penalty_with_ids_beyond_the_output_is_that_of_transformers():
    logits_V = random_logits(1, seed=2)[0]
    state = state_with(prompt_ids=[4, VOCAB_LEN, 10**6], temperature=1.0, repetition_penalty=1.5)
    theirs_V = by_transformers(logits_V, [4, VOCAB_LEN], state.params)
    torch.testing.assert_close(probabilities(logits_V, state), theirs_V, rtol=0, atol=1e-6)


# Against definitions


def test_frequency_and_presence_penalties_are_openais_formula_on_the_answer_alone():
    logits_V = random_logits(1, seed=3, vocab_len=50)[0]
    state = state_with(
        prompt_ids=[1, 2, 2], answer_ids=[2, 4, 4, 4], temperature=1.0,
        frequency_penalty=0.5, presence_penalty=-0.25,
    )  # fmt: skip
    expected_V = logits_V.clone()
    expected_V[2] -= 1 * 0.5 - 0.25
    expected_V[4] -= 3 * 0.5 - 0.25
    torch.testing.assert_close(probabilities(logits_V, state), expected_V.softmax(-1))


def test_greedy_is_the_highest_logit_after_penalties():
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    assert sample(logits, [state_with(prompt_ids=[0])]).ids == [0]
    assert sample(logits, [state_with(prompt_ids=[0], repetition_penalty=1.1)]).ids == [1]
    assert sample(logits, [state_with(answer_ids=[0], presence_penalty=0.2)]).ids == [1]
    assert sample(logits, [state_with(prompt_ids=[0], presence_penalty=0.2)]).ids == [0]


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.zeros(2, VOCAB_LEN)
    logits[:, [17, 5, 900]] = 1.0
    assert sample(logits, [state_with(), state_with(repetition_penalty=2.0)]).ids == [5, 5]


def test_penalties_count_tokens_accepted_between_samples():
    state = state_with(frequency_penalty=2.0)
    chosen = []
    for _ in range(5):
        chosen += sample(torch.tensor([[5.0, 4.0, 0.5]]), [state]).ids
        state.accept(chosen[-1])
    assert chosen == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_ending_before_min_new_tokens(temperature):
    logits = torch.tensor([[9.0, 60.0, 50.0, 8.0]])
    state = state_with(
        min_new_tokens=2, eos_token_ids={1, 99}, stop_token_ids=frozenset({2}),
        temperature=temperature, top_k=1,
    )  # fmt: skip
    ids = []
    for _ in range(3):
        ids += sample(logits, [state]).ids
        state.accept(ids[-1])
    assert ids == [0, 0, 1]


def test_tokens_of_equal_probability_stay_or_go_together():
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 2.0, -9.0])
    assert kept(distribution(logits_V, top_k=2)) == {1, 3, 5}
    assert kept(distribution(logits_V, top_k=4)) == {1, 2, 3, 4, 5}
    assert kept(distribution(logits_V, top_p=0.01)) == {1, 3, 5}
    assert kept(distribution(logits_V, typical_p=0.01)) in ({1, 3, 5}, {2, 4})


@pytest.mark.parametrize(
    "settings", [{"top_k": 9}, {"top_p": 0.5}, {"typical_p": 0.4}, {"min_p": 0.3}]
)
def test_renaming_tokens_renames_the_distribution_and_nothing_else(settings):
    logits_V = random_logits(1, seed=4)[0].round()  # whole numbers: ties everywhere
    order_V = torch.randperm(VOCAB_LEN, generator=torch.Generator().manual_seed(5))
    assert torch.equal(
        distribution(logits_V[order_V], **settings), distribution(logits_V, **settings)[order_V]
    )


def test_a_share_that_is_exactly_held_asks_for_no_further_token():
    scores, weights = torch.tensor([[1.0, 3.0, 2.0]] * 3), torch.tensor([[1, 2, 1]] * 3)
    shares = torch.tensor([[0.5], [0.500001], [0.75]], dtype=torch.float64)
    assert _border(scores, weights, shares).tolist() == [[3.0], [2.0], [2.0]]


@pytest.mark.parametrize(
    "settings", [{"top_p": 5e-324}, {"typical_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1}]
)
def test_the_strictest_filter_leaves_one_token(settings):
    assert len(kept(distribution(random_logits(1, seed=6)[0], **settings))) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
def test_the_coldest_temperatures_are_greedy_and_stay_finite(temperature):
    logits = random_logits(20, seed=7)
    states = [state_with(temperature=temperature) for _ in logits]
    assert sample(logits, states).ids == logits.argmax(-1).tolist()
    assert distribution([2.0, 1.0, 2.0], temperature=temperature).tolist() == [0.5, 0.0, 0.5]


def test_the_largest_finite_logits_are_sampled():
    logits_V = torch.tensor([3.4e38, 3.4e38, -3.4e38, -math.inf])
    assert distribution(logits_V, typical_p=0.5, top_p=0.9).tolist() == [0.5, 0.5, 0, 0]


def test_a_token_with_logit_minus_infinity_is_never_taken():
    logits_V = torch.full((5,), -math.inf)
    logits_V[3] = -7.0
    for settings in ({}, {"top_k": 4}, {"top_p": 0.9}, {"typical_p": 0.9}, {"min_p": 0.1}):
        assert distribution(logits_V, **settings).tolist() == [0, 0, 0, 1, 0]


def test_greedy_probabilities_are_one_point():
    state = state_with(answer_ids=[2], presence_penalty=2.0)
    assert probabilities(torch.tensor([0.0, 1.0, 2.5]), state).tolist() == [0.0, 1.0, 0.0]


# Log-probabilities


def test_logprobs_are_those_of_the_model_before_penalties_and_filters():
    logits = random_logits(3, seed=8)
    states = [
        state_with(logprobs=5, answer_ids=[1], presence_penalty=2.0),
        state_with(logprobs=0, temperature=0.5, top_k=3, seed=1),
        state_with(temperature=0.5, seed=1),
    ]
    sampled = sample(logits, states)
    model = logits.double().log_softmax(-1)
    assert sampled.logprobs[0] == pytest.approx(model[0, sampled.ids[0]].item(), abs=1e-6)
    assert sampled.logprobs[1] == pytest.approx(model[1, sampled.ids[1]].item(), abs=1e-6)
    assert sampled.logprobs[2] is None
    best = model[0].topk(5)
    assert [token_id for token_id, _ in sampled.top_logprobs[0]] == best.indices.tolist()
    assert [lp for _, lp in sampled.top_logprobs[0]] == pytest.approx(
        best.values.tolist(), abs=1e-6
    )
    assert sampled.top_logprobs[1:] == [[], []]


def test_a_greedy_tokens_logprob_is_the_very_number_on_top_of_the_list():
    sampled = sample(random_logits(9, seed=9), [state_with(logprobs=1) for _ in range(9)])
    for token_id, logprob, top in zip(*vars(sampled).values(), strict=True):
        assert top == [(token_id, logprob)]


def test_top_logprobs_put_the_lowest_id_first_of_equals_and_leave_out_the_impossible():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, -math.inf]])
    ids = [
        [i for i, _ in sample(logits, [state_with(logprobs=n)]).top_logprobs[0]] for n in (1, 3, 20)
    ]
    assert ids == [[1], [1, 3, 0], [1, 3, 0, 2, 4]]


def test_a_certain_token_has_logprob_zero():
    logits = torch.tensor([[-math.inf, 4.0]])
    assert sample(logits, [state_with(logprobs=0)]).logprobs == [0.0]


# The same in any company


def random_settings(rng):
    """Any mixture of settings, with a seed."""
    choices = {
        "temperature": [0.0, 0.7, 1.0, 1.7],
        "top_k": [0, 0, 1, 50],
        "top_p": [1.0, 1.0, 0.3, 0.95],
        "min_p": [0.0, 0.0, 0.05],
        "typical_p": [1.0, 1.0, 0.2, 0.9],
        "repetition_penalty": [1.0, 1.0, 1.2],
        "frequency_penalty": [0.0, 0.0, 0.4],
        "logprobs": [None, 0, 3, 20],
        "min_new_tokens": [0, 0, 5],
    }
    return {name: rng.choice(values) for name, values in choices.items()} | {
        "seed": rng.getrandbits(64),
        "prompt_ids": [rng.randrange(VOCAB_LEN) for _ in range(20)],
        "answer_ids": [rng.randrange(VOCAB_LEN) for _ in range(rng.randrange(10))],
        "eos_token_ids": [0],
    }


def rows_of(sampled):
    return list(zip(sampled.ids, sampled.logprobs, sampled.top_logprobs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_alone_and_in_any_batch_gives_the_same_bits(seed, dtype):
    rng = random.Random(seed)
    logits = random_logits(40, seed=seed).to(dtype)
    settings = [random_settings(rng) for _ in logits]
    alone = [
        rows_of(sample(row_V[None], [state_with(**s)]))[0]
        for row_V, s in zip(logits, settings, strict=True)
    ]
    for size in (2, 3, 7, 40):
        rows = rng.sample(range(40), size)
        together = sample(logits[rows], [state_with(**settings[row]) for row in rows])
        assert rows_of(together) == [alone[row] for row in rows]


def test_how_many_rows_and_candidates_are_taken_at_once_moves_no_result(monkeypatch):
    rng = random.Random(10)
    logits = random_logits(40, seed=10)
    settings = [random_settings(rng) for _ in logits]
    expected = rows_of(sample(logits, [state_with(**own) for own in settings]))
    monkeypatch.setattr(sampler, "_ROWS_AT_ONCE", 3)
    monkeypatch.setattr(sampling_state, "_NUM_RANKED", 2)  # a state takes it when it is made
    assert rows_of(sample(logits, [state_with(**own) for own in settings])) == expected


def test_sampling_changes_nothing_until_a_token_is_accepted():
    logits = random_logits(1, seed=11)
    state = state_with(temperature=1.0, seed=3, frequency_penalty=0.5)
    first = sample(logits, [state])
    assert sample(logits, [state]) == first
    assert first.ids == [draw(probabilities(logits[0], state), uniform(3, 0))]


def test_a_sequence_rebuilt_after_preemption_goes_on_as_before():
    settings = {"temperature": 1.2, "seed": 5, "repetition_penalty": 1.3, "prompt_ids": [1, 2]}
    logits = random_logits(8, seed=12)
    state, ids = state_with(**settings), []
    for row_V in logits:
        rebuilt = state_with(answer_ids=ids, **settings)
        assert sample(row_V[None], [rebuilt]) == sample(row_V[None], [state])
        ids += sample(row_V[None], [state]).ids
        state.accept(ids[-1])


def test_a_draft_judged_at_once_gives_the_tokens_of_plain_decoding():
    logits = random_logits(6, seed=13, vocab_len=30)
    state = state_with(temperature=1.0, seed=7, frequency_penalty=1.0, prompt_ids=[1])
    plain, walker = [], state.ahead([])
    for row_V in logits:
        plain += sample(row_V[None], [walker]).ids
        walker.accept(plain[-1])
    judged = sample(logits, [state.ahead(plain[:num]) for num in range(len(logits))])
    assert judged.ids == plain
    assert state.num_generated == 0


# Randomness


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


def test_uniform_is_the_same_function_in_every_release():
    # Pinned on purpose: another function would change every text that was ever given a seed.
    assert uniform(0, 0) == 0.6504757377072067
    assert uniform(2**64 - 1, 12345) == 0.16130907183708565


@pytest.mark.parametrize("numbers", ["steps of one seed", "first steps of many seeds"])
def test_uniform_is_uniform_over_steps_and_over_neighbouring_seeds(numbers):
    counts = [0] * 50
    for i in range(20_000):
        u = uniform(1, i) if numbers == "steps of one seed" else uniform(i, 0)
        assert 0 <= u < 1
        counts[int(u * 50)] += 1
    assert chi_square(counts, [400] * 50) < 85.4  # the 0.999 quantile for 49 degrees of freedom


def test_draws_follow_the_probabilities():
    probs_V = distribution(random_logits(1, seed=14, vocab_len=12, spread=1.0)[0])
    counts = [0] * 12
    for step in range(10_000):
        counts[draw(probs_V, uniform(15, step))] += 1
    assert chi_square(counts, (probs_V * 10_000).tolist()) < 31.3  # 0.999, 11 degrees of freedom


def test_sampled_tokens_follow_the_filtered_distribution():
    logits_V = random_logits(1, seed=16, vocab_len=40, spread=1.5)[0]
    settings = {"temperature": 0.9, "top_k": 8}
    expected_V = distribution(logits_V, **settings)
    states = [state_with(seed=seed, **settings) for seed in range(5000)]
    ids = sample(logits_V.expand(5000, -1), states).ids
    counts_V = torch.bincount(torch.tensor(ids), minlength=40)
    assert kept(counts_V) == kept(expected_V)
    among_V = expected_V > 0
    statistic = chi_square(counts_V[among_V].tolist(), (expected_V[among_V] * 5000).tolist())
    assert statistic < 24.3  # the 0.999 quantile for 7 degrees of freedom


def test_a_draw_never_falls_on_a_token_without_probability():
    probs_V = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    below_one = math.nextafter(1.0, 0.0)
    assert [draw(probs_V, u) for u in (0.0, 0.2499, 0.25, below_one)] == [1, 1, 3, 3]
    assert draw(probs_V / 4, below_one) == 3  # shares of what there is, whatever its sum
    for logits_V in random_logits(200, seed=20, vocab_len=37):
        assert draw(distribution(logits_V), below_one) == 36


def test_without_a_seed_one_is_chosen_and_having_it_the_text_comes_again():
    logits = random_logits(30, seed=17)
    first, second = state_with(temperature=1.0), state_with(temperature=1.0)
    assert first.seed != second.seed
    again = state_with(temperature=1.0, seed=first.seed)
    for row_V in logits:
        ids = sample(row_V[None].expand(2, -1), [first, again]).ids
        assert ids[0] == ids[1]
        first.accept(ids[0])
        again.accept(ids[1])


# Logits that are no distribution


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}])
def test_unusable_logits_are_refused_and_the_row_named(bad, settings):
    logits = random_logits(4, seed=18)
    logits[2, 100] = bad
    states = [state_with(**settings) for _ in logits]
    with pytest.raises(LogitsError, match="for row 2 of the batch"):
        sample(logits, states)
    with pytest.raises(LogitsError, match="nan or \\+inf"):
        probabilities(logits[2], states[2])


def test_a_row_in_which_everything_is_ruled_out_is_refused_and_named():
    logits = torch.zeros(3, 2)
    logits[1] = -math.inf
    with pytest.raises(LogitsError, match="for row 1 of the batch"):
        sample(logits, [state_with() for _ in logits])
    nothing_left = state_with(min_new_tokens=1, eos_token_ids=[0, 1])
    with pytest.raises(LogitsError, match=r"for row 2 of the batch: .* every token is ruled out"):
        sample(torch.zeros(3, 2), [state_with(), state_with(), nothing_left])


def test_states_and_rows_must_agree_in_number():
    with pytest.raises(RequestError, match=r"2 sequences have shape \(3, 4\)"):
        sample(torch.zeros(3, 4), [state_with(), state_with()])


def test_logits_are_left_as_they_were():
    logits = random_logits(3, seed=19)
    before = logits.clone()
    settings = {"prompt_ids": [1], "repetition_penalty": 2.0, "min_new_tokens": 1}
    sample(logits, [state_with(eos_token_ids=[3], temperature=t, **settings) for t in (0, 1, 2)])
    probabilities(logits[0], state_with(eos_token_ids=[3], min_new_tokens=1))
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens():
    assert sample(torch.zeros(0, 5), []).ids == []


# A grammar's mask


def masked(allowed_ids, vocab_len=VOCAB_LEN, **settings):
    state = state_with(**settings)
    state.allowed_V = torch.zeros(vocab_len, dtype=torch.bool)
    state.allowed_V[allowed_ids] = True
    return state


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"presence_penalty": 1}])
def test_only_allowed_tokens_are_chosen(settings):
    logits_SV = random_logits(3, seed=5)
    states = [masked([7, 900], **settings), state_with(**settings), masked([41], **settings)]
    ids = sample(logits_SV, states).ids
    assert ids[0] in (7, 900)
    assert ids[1:] == [sample(logits_SV[1:2], [state_with(**settings)]).ids[0], 41]


def test_filters_see_the_allowed_tokens_alone():
    logits_V = torch.full((VOCAB_LEN,), 10.0)
    logits_V[3], logits_V[4] = 1.0, 0.0
    state = masked([3, 4], temperature=1.0, top_k=1)
    assert kept(probabilities(logits_V, state)) == {3}


def test_reported_logprobs_are_those_of_the_model_not_of_the_grammar():
    logits_SV = random_logits(1, seed=6)
    tokens = sample(logits_SV, [masked([7], logprobs=1)])
    reference_V = logits_SV[0].double().log_softmax(-1)
    assert tokens.logprobs[0] == pytest.approx(float(reference_V[7]), abs=1e-5)
    assert tokens.top_logprobs[0][0][0] == int(reference_V.argmax())


def test_too_early_end_is_chosen_where_the_grammar_allows_nothing_else():
    settings = {"min_new_tokens": 5, "eos_token_ids": [9]}
    logits_SV = random_logits(1, seed=7)
    assert sample(logits_SV, [masked([9], **settings)]).ids == [9]
    assert sample(logits_SV, [masked([9, 12], **settings)]).ids == [12]


def test_mask_that_allows_nothing_or_is_of_another_width_is_refused():
    logits_SV = random_logits(1, seed=8)
    with pytest.raises(LogitsError, match="ruled out"):
        sample(logits_SV, [masked([])])
    with pytest.raises(RequestError, match="allowed_V has shape"):
        sample(logits_SV, [masked([1], vocab_len=VOCAB_LEN + 1)])
