"""Logits to tokens: penalties, filters, one random number, log-probabilities. A row, a sequence.

Shapes: `V` vocabulary, `S` sequences of the batch, `R` the rows a step is about, `C` candidates.

Settings act in this order, each on what the one before left: the grammar; repetition penalty;
frequency and presence penalty; no ending before min_new_tokens, unless the grammar allows nothing
else; temperature; top_k; top_p; min_p; typical_p. That is transformers' order, and TGI's as far as
TGI has them. A filter looks at probabilities alone, so tokens of equal probability stay or go
together, and no tie depends on a sort. Greedy takes the highest penalised logit, of equals the
lowest id.

The one idea: **a probability is held as a whole number**. A sum of floats depends on its order, and
the order on batch size, alignment and device; on CUDA a cumulative sum differs from run to run. So
exp(z - max z) is rounded down to a multiple of 2**-42 and kept as an int64 weight. Totals,
cumulative sums and draws are then exact in any order, every other step acts on single elements or
picks a maximum, and a row gives the same bits alone, in any batch and after a restart (tested on
the CPU). The price: a token less than 2**-42 (2e-13) times as likely as the likeliest is never
drawn. That the logits do not depend on the batch either is the model's part.

Randomness has no state: `uniform(seed, step)` is a hash, so neither preemption nor neighbours can
move it. One such number through the inverse of the cumulative distribution gives one token, for a
hash and an int64 scan over V (0.04 ms for V = 65,024 on a CPU); Gumbel-max would need V random
numbers. It also makes speculation exact: sample after each drafted token with that position's own
number, and keep the draft for as long as it agrees. The text is the one plain decoding gives.

Nothing asks the device anything until `Choosing.read`, so a step can be launched on tokens that the
host does not know yet; `SamplingState.after` is what is then known of a sequence.
"""

import copy
import hashlib
import math
import secrets
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.engine.logprobs import WEIGHT_BITS, TokenLogprob, measured, reports, weights
from longwing.engine.request import SamplingParams
from longwing.engine.transfers import Answer, placed, take
from longwing.errors import LogitsError, RequestError

Choice = tuple[int, float | None, list[TokenLogprob]]
"""A token, its log-probability if it is wanted, and the likeliest in its place."""

_DRAW_BITS = 60  # while drawing, probability 1 is 2**60: exact for float32 above 2**-36
_COLDEST = 1e-30  # float32 would make 0 of much less; the distribution is one point long before
_NUM_RANKED = 1024  # first try at how many tokens hold a share; moves no result
_ROWS_AT_ONCE = 32  # bounds memory, at some 40 bytes a row and token; moves no result


@dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """One token for each row, in the order of the rows.

    Log-probabilities are those of the model: log-softmax of the raw logits, before grammar,
    penalties, temperature and filters, as OpenAI-style servers report them. (TGI reports them
    after.)

    Attributes:
        ids: the tokens.
        logprobs: the tokens' own; None for rows with params.logprobs None.
        top_logprobs: the params.logprobs likeliest, likeliest first, of equals the lowest id
            first. Not always with the sampled token among them.
    """

    ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[list[TokenLogprob]]


class SamplingState:
    """What sampling knows of one sequence. It belongs to the sequence and survives preemption.

    Tell it with `accept` each token that becomes text; nothing else changes it.

    Args:
        params: the request's settings.
        prompt_ids: the prompt, for the repetition penalty.
        eos_token_ids: tokens that end the text, ruled out until params.min_new_tokens are there.

    Attributes:
        seed: params.seed, or one chosen at random: report it, and the text can be had again.
        num_generated: tokens accepted so far, so the index of the next one.
        allowed_V: (V,) bool, on any device: the tokens that may come next; None allows all. Whoever
            follows a grammar sets it before each token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        *,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.num_generated = 0
        self.allowed_V: Tensor | None = None
        self._ending_ids = sorted({*eos_token_ids, *params.stop_token_ids})
        self._prompt_ids = list(prompt_ids) if params.has_penalties else []
        self._uncounted_ids: list[int] = []  # accepted, but not yet in _count_V
        self._in_prompt_V: Tensor | None = None
        self._count_V: Tensor | None = None
        self._num_ranked = [_NUM_RANKED]  # one for all copies

    def accept(self, token_id: int) -> None:
        """The token became text: count it, and go on to the next random number."""
        self.num_generated += 1
        if self.params.has_penalties:
            self._uncounted_ids.append(token_id)

    def ahead(self, draft_ids: Sequence[int]) -> "SamplingState":
        """The state as it would be after these tokens, to judge a draft; this one stays."""
        later = copy.copy(self)
        later._uncounted_ids = list(self._uncounted_ids)
        for token_id in draft_ids:
            later.accept(token_id)
        return later

    def after(self, id_1: Tensor, vocab_len: int) -> "SamplingState":
        """The state as it will be after a token that only the device knows; this one stays.

        Args:
            id_1: (1,) int64, the token.
            vocab_len: V of the logits that it came of.
        """
        later = copy.copy(self)
        later.num_generated += 1
        if self.params.has_penalties:
            later._in_prompt_V, count_V = self.history(vocab_len, id_1.device)
            later._count_V = count_V.index_add(0, id_1, torch.ones_like(id_1))
            later._uncounted_ids = []
        return later

    @property
    def forbidden_ids(self) -> list[int]:
        """Tokens that may not come next."""
        return self._ending_ids if self.num_generated < self.params.min_new_tokens else []

    @property
    def num_ranked(self) -> int:
        """Tokens to be ranked for it at first: as many as it took so far. Moves no result."""
        return self._num_ranked[0]

    def needed(self, num_ranked: int) -> None:
        """So many were needed, for it or a neighbour."""
        if self.params.top_p < 1 or self.params.typical_p < 1:
            self._num_ranked[0] = max(self.num_ranked, num_ranked)

    def history(self, vocab_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each token: is it in the prompt, (V,) bool; how often in the answer, (V,) int64.

        Kept on the device, for one vocabulary and one device, and never changed in place.
        """
        if self._in_prompt_V is None or self._count_V is None:
            self._count_V = torch.zeros(vocab_len, dtype=torch.int64, device=device)
            self._in_prompt_V = _counted(self._count_V, self._prompt_ids) > 0
        if self._uncounted_ids:
            self._count_V = _counted(self._count_V, self._uncounted_ids)
            self._uncounted_ids = []
        return self._in_prompt_V, self._count_V


def uniform(seed: int, step: int) -> float:
    """A multiple of 2**-53 in [0, 1): a pure function of the seed and the token's index.

    BLAKE2b, because it needs no constants of ours, and neighbouring seeds and steps give unrelated
    numbers. About a microsecond. Both arguments are 64-bit, unsigned.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed, step), digest_size=8, person=b"longwing")
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


def sample(logits_SV: Tensor, states: Sequence[SamplingState]) -> SampledTokens:
    """Choose the next token of each sequence. Accepts nothing: the same call gives the same again.

    Greedy rows without penalties or log-probabilities share one maximum over the batch.

    Args:
        logits_SV: (S, V), any float type and device; -inf marks tokens that cannot come.
        states: one for each row.

    Raises:
        RequestError: there is not one state a row.
        LogitsError: a row's logits hold nan or +inf, or rule out every token. It names the rows;
            the others can be sampled without them.
    """
    choices = Choosing(logits_SV, states).read()
    _check_usable([choice is not None for choice in choices])
    usable = [choice for choice in choices if choice is not None]
    return SampledTokens(
        ids=[token_id for token_id, _, _ in usable],
        logprobs=[logprob for _, logprob, _ in usable],
        top_logprobs=[top for _, _, top in usable],
    )


class Choosing:
    """The next token of each sequence, being chosen on the device.

    Args:
        logits_SV: as for `sample`.
        states: likewise; they must not have changed when this is read.

    Attributes:
        ids_S: (S,) int64 on the device, each below V: the tokens, as far as is known until `read`.
        stands: whether `read` gave these, row by row as far as it gave any. That is not so where
            far more tokens had to be ranked than is usual, and `ids_S` has changed.

    Raises:
        RequestError: there is not one state a row.
    """

    def __init__(self, logits_SV: Tensor, states: Sequence[SamplingState]) -> None:
        if logits_SV.ndim != 2 or logits_SV.shape[0] != len(states):
            raise RequestError(
                f"logits for {len(states)} sequences have shape {tuple(logits_SV.shape)}; "
                f"one row for each is needed"
            )
        self._logits_SV = logits_SV.detach().float()
        self._states = states
        self._reporting = _batches(
            [i for i, s in enumerate(states) if s.params.logprobs is not None]
        )
        self.stands = True
        self._num_ranked = max((state.num_ranked for state in states), default=_NUM_RANKED)
        self._begin()

    @property
    def vocab_len(self) -> int:
        """V."""
        return self._logits_SV.shape[1]

    def read(self) -> list[Choice | None]:
        """Wait for the tokens; None for the rows whose logits allow none."""
        while True:
            first, *numbers = self._answer.read()
            ids, usable, enough = first.tolist()
            if all(enough):
                break
            self.stands = False
            self._num_ranked *= 16
            for state in self._states:
                state.needed(self._num_ranked)
            self._begin()
        choices: list[Choice | None] = [
            (token_id, None, []) if is_usable else None
            for token_id, is_usable in zip(ids, usable, strict=True)
        ]
        each = len(numbers) // max(len(self._reporting), 1)
        for place, rows in enumerate(self._reporting):
            own = numbers[place * each : (place + 1) * each]
            told = reports(own, self._nums_top(rows), [usable[row] for row in rows])
            for row, (logprob, top) in zip(rows, told, strict=True):
                choices[row] = (ids[row], logprob, top) if usable[row] else None
        return choices

    def _begin(self) -> None:
        """Give the device all the work, and have it send what `read` reads."""
        logits_SV, states = self._logits_SV, self._states
        ranking = _Ranking(self._num_ranked)
        max_S, id_S = logits_SV.max(dim=-1)  # of equals the first, on every device
        usable_S = max_S.isfinite()  # nan, too, is a maximum
        for rows in _batches([i for i, state in enumerate(states) if _needs_more_than_max(state)]):
            own = [states[row] for row in rows]
            id_R, usable_R = _choose(take(logits_SV, rows), own, ranking)
            id_S = _put(id_S, rows, id_R)
            usable_S = _put(usable_S, rows, usable_R)
        self.ids_S = id_S
        answer = [torch.stack((id_S, usable_S.long(), ranking.enough(id_S)))]
        for rows in self._reporting:
            max_R, id_R = take(max_S, rows), take(id_S, rows)
            answer += measured(take(logits_SV, rows), max_R, id_R, self._nums_top(rows))
        self._answer = Answer(answer)

    def _nums_top(self, rows: Sequence[int]) -> list[int]:
        return [self._states[row].params.logprobs or 0 for row in rows]


def prompt_logprobs(
    logits_RV: Tensor, id_R: Sequence[int], num_top: int
) -> list[tuple[float, list[TokenLogprob]]]:
    """How likely given tokens were: for each row its token's log-probability, and the likeliest.

    Args:
        logits_RV: (R, V) logits, any float type.
        id_R: the token that did come after each row.
        num_top: how many of the likeliest tokens to tell; 0 for none.

    Raises:
        LogitsError: a row's logits hold nan or +inf.
    """
    logits_RV = logits_RV.detach().float()
    max_R = logits_RV.amax(dim=-1)
    _check_usable(max_R.isfinite().tolist())
    ids = placed(id_R, torch.int64, logits_RV.device)
    nums_top = [num_top] * len(id_R)
    numbers = [tensor.cpu() for tensor in measured(logits_RV, max_R, ids, nums_top)]
    told = reports(numbers, nums_top, [True] * len(id_R))
    return [(own, top) for own, top in told if own is not None]


def probabilities(logits_V: Tensor, state: SamplingState) -> Tensor:
    """The distribution `sample` draws from, after all penalties and filters: (V,) float32, sum 1.

    For a greedy sequence all of it lies on one token. Raises as `sample` does.
    """
    logits_1V = adjusted(logits_V.detach().float()[None], [state])
    max_1, id_1 = logits_1V.max(dim=-1)
    _check_usable(max_1.isfinite().tolist())
    if state.params.is_greedy:
        return torch.zeros_like(logits_1V[0]).scatter(0, id_1, 1.0)
    return _distribution(logits_1V, [state.params], _Ranking(len(logits_V)))[0]


def draw(probs_V: Tensor, u: float) -> int:
    """The token at u of the way through the distribution, tokens lying in the order of their ids.

    Args:
        probs_V: (V,) floats in [0, 1], not all zero; the sum need not be 1 (nor may it exceed 7).
        u: in [0, 1), from `uniform`.
    """
    u_1 = torch.tensor([u], dtype=torch.float64, device=probs_V.device)
    return int(_draw(probs_V[None], u_1))


def adjusted(logits_RV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Float32 logits (R, V) after penalties, with -inf for forbidden tokens; never in place.

    Raises:
        RequestError: an `allowed_V` is not of the logits' width.
    """
    if any(state.allowed_V is not None for state in states):
        logits_RV = logits_RV.masked_fill(~_allowed(states, logits_RV), -math.inf)
    rows = [row for row, state in enumerate(states) if state.params.has_penalties]
    if rows:
        own = [states[row] for row in rows]
        logits_RV = _put(logits_RV, rows, _penalised(take(logits_RV, rows), own))
    for row, state in enumerate(states):
        if forbidden := [i for i in state.forbidden_ids if i < logits_RV.shape[1]]:
            forbidden_I = placed(forbidden, torch.int64, logits_RV.device)
            rest_V = logits_RV[row].index_fill(0, forbidden_I, -math.inf)
            if state.allowed_V is None or bool((rest_V > -math.inf).any()):
                logits_RV = logits_RV.clone()
                logits_RV[row] = rest_V
    return logits_RV


def _allowed(states: Sequence[SamplingState], logits_RV: Tensor) -> Tensor:
    """(R, V) bool: what the rows' grammars allow."""
    vocab_len = logits_RV.shape[1]
    everything_V = torch.ones(vocab_len, dtype=torch.bool)
    masks = [everything_V if state.allowed_V is None else state.allowed_V for state in states]
    for mask_V in masks:
        if mask_V.shape != (vocab_len,):
            raise RequestError(
                f"allowed_V has shape {tuple(mask_V.shape)}, the logits have {vocab_len} tokens"
            )
    return torch.stack([mask_V.to(logits_RV.device) for mask_V in masks])


def _penalised(logits_RV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Repetition, then frequency and presence penalty, each with a neutral value where it is off.

    The repetition penalty (Keskar et al., arXiv:1909.05858; as in transformers it multiplies
    negative logits) counts prompt and answer. The others count the answer alone, as OpenAI defines
    them: logit - count * frequency_penalty - (count > 0) * presence_penalty.
    """
    params = [state.params for state in states]
    repetition_R1 = _column([p.repetition_penalty for p in params], logits_RV.device)
    frequency_R1 = _column([p.frequency_penalty for p in params], logits_RV.device)
    presence_R1 = _column([p.presence_penalty for p in params], logits_RV.device)
    histories = [state.history(logits_RV.shape[1], logits_RV.device) for state in states]
    in_prompt_RV = torch.stack([in_prompt_V for in_prompt_V, _ in histories])
    count_RV = torch.stack([count_V for _, count_V in histories])
    repeated_RV = torch.where(logits_RV < 0, logits_RV * repetition_R1, logits_RV / repetition_R1)
    logits_RV = torch.where(in_prompt_RV | (count_RV > 0), repeated_RV, logits_RV)
    return logits_RV - count_RV.float() * frequency_R1 - (count_RV > 0).float() * presence_R1


def _choose(
    logits_RV: Tensor, states: Sequence[SamplingState], ranking: "_Ranking"
) -> tuple[Tensor, Tensor]:
    """Ids (R,) of rows that need more than the batch's maximum, and whether they are usable."""
    logits_RV = adjusted(logits_RV, states)
    max_R, id_R = logits_RV.max(dim=-1)
    if rows := [row for row, state in enumerate(states) if not state.params.is_greedy]:
        params = [states[row].params for row in rows]
        probs_RV = _distribution(take(logits_RV, rows), params, ranking)
        numbers = [uniform(states[row].seed, states[row].num_generated) for row in rows]
        drawn_R = _draw(probs_RV, placed(numbers, torch.float64, id_R.device))
        id_R = _put(id_R, rows, drawn_R)
    return id_R, max_R.isfinite()


def _distribution(
    logits_RV: Tensor, params: Sequence[SamplingParams], ranking: "_Ranking"
) -> Tensor:
    """Temperature and filters: (R, V) float32, every row of sum 1. None of the rows is greedy."""
    temperature_R1 = _column([max(p.temperature, _COLDEST) for p in params], logits_RV.device)
    z_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R1
    weights_RV = weights(z_RV)
    for limit_of, off, keep in _FILTERS:
        # Only rows that ask for a filter go through it; the others are not even copied.
        rows = [row for row, p in enumerate(params) if limit_of(p) != off]
        if rows:
            limits = [limit_of(params[row]) for row in rows]
            limit = _Limit(limits, _column(limits, logits_RV.device, torch.float64), ranking)
            kept_RV = keep(take(weights_RV, rows), take(z_RV, rows), limit)
            weights_RV = _put(weights_RV, rows, kept_RV)
    total_R1 = weights_RV.sum(dim=-1, keepdim=True)
    return (weights_RV.double() / total_R1.double()).float()


class _Ranking:
    """How many tokens are ranked to find a border, and whether that was enough.

    A short list does as a rule, and costs a fraction of a full sort. Whether it did is not asked
    here, since the host would wait for the answer: who reads the results reads it with them.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self._notes: list[Tensor] = []

    def note(self, enough: Tensor) -> None:
        """Take down, as a bool on the device, whether a list was long enough."""
        self._notes.append(enough)

    def enough(self, like: Tensor) -> Tensor:
        """Whether all lists were, for each element of `like` the same."""
        if not self._notes:
            return torch.ones_like(like)
        return torch.stack(self._notes).all().long().expand_as(like)


@dataclass(frozen=True)
class _Limit:
    """A filter's setting for each row, here and as an (R, 1) column on the device."""

    values: Sequence[float]
    column_R1: Tensor
    ranking: _Ranking


# The filters take weights (R, V), z (R, V) and their limits; they return weights, 0 for the tokens
# that go. Every one of them leaves at least one token.


def _keep_top_k(weights_RV: Tensor, z_RV: Tensor, k: _Limit) -> Tensor:
    """The k likeliest tokens, and those tied with the last of them."""
    vocab_len = weights_RV.shape[1]
    k_R1 = k.column_R1.long().clamp(max=vocab_len)
    largest_RC = weights_RV.topk(min(int(max(k.values)), vocab_len), dim=-1).values
    return weights_RV.masked_fill(weights_RV < largest_RC.gather(1, k_R1 - 1), 0)


def _keep_top_p(weights_RV: Tensor, z_RV: Tensor, share: _Limit) -> Tensor:
    """The likeliest tokens, until they hold the share (Holtzman et al., arXiv:1904.09751)."""
    border_R1 = _border(weights_RV, weights_RV, share.column_R1, share.ranking)
    return weights_RV.masked_fill(weights_RV < border_R1, 0)


def _keep_min_p(weights_RV: Tensor, z_RV: Tensor, fraction: _Limit) -> Tensor:
    """Tokens at least this fraction as likely as the top one (Nguyen et al., arXiv:2407.01082)."""
    return weights_RV.masked_fill(
        weights_RV < fraction.column_R1 * weights_RV.amax(dim=-1, keepdim=True), 0
    )


def _keep_typical(weights_RV: Tensor, z_RV: Tensor, share: _Limit) -> Tensor:
    """Tokens of average surprise, until they hold the share (Meister et al., arXiv:2202.00666).

    The paper ranks by |-log p - entropy|. As log p = z - log Z and entropy = log Z - mean z, log Z
    cancels and the rank is |z - mean z|. The mean, too, is a sum of whole numbers: -z exp(z) < 1.
    """
    kept_RV = weights_RV > 0
    z_RV = torch.where(kept_RV, z_RV, 0.0)
    moment_R1 = (z_RV * z_RV.exp() * 2.0**WEIGHT_BITS).long().sum(dim=-1, keepdim=True)
    mean_R1 = moment_R1.double() / weights_RV.sum(dim=-1, keepdim=True).double()
    nearness_RV = -torch.where(kept_RV, (z_RV - mean_R1.float()).abs(), math.inf)
    border_R1 = _border(nearness_RV, weights_RV, share.column_R1, share.ranking)
    return weights_RV.masked_fill(nearness_RV < border_R1, 0)


def _border(
    score_RV: Tensor, weights_RV: Tensor, share_R1: Tensor, ranking: _Ranking | None = None
) -> Tensor:
    """The score (R, 1) at which tokens, taken from the highest score down, first hold the share.

    Where topk puts equal scores does not matter: the share is reached at that score in any order.
    Without a ranking all tokens are ranked.
    """
    needed_R1 = share_R1 * weights_RV.sum(dim=-1, keepdim=True)
    vocab_len = score_RV.shape[1]
    num = vocab_len if ranking is None else min(ranking.num, vocab_len)
    best = score_RV.topk(num, dim=-1)
    sums_RC = weights_RV.gather(1, best.indices).cumsum(dim=-1)
    if ranking is not None and num < vocab_len:
        ranking.note((sums_RC[:, -1:] >= needed_R1).all())
    last_R1 = (sums_RC < needed_R1).sum(dim=-1, keepdim=True).clamp(max=num - 1)
    return best.values.gather(1, last_R1)


def _draw(probs_RV: Tensor, u_R: Tensor) -> Tensor:
    """Ids (R,): the first at which the cumulative weight exceeds u times the total.

    A token of weight 0 is never the first to exceed anything. In a row of nan, which has none, any
    token is named, but one that there is: a step may be under way with it before that is found out.
    """
    sums_RV = (probs_RV.double() * 2.0**_DRAW_BITS).long().cumsum(dim=-1)
    # Below the total even when rounded, since u is at most 1 - 2**-53: some token does exceed it.
    target_R = (u_R * sums_RV[:, -1].double()).long()
    found_R = torch.searchsorted(sums_RV, target_R[:, None], right=True)[:, 0]
    return found_R.clamp(max=probs_RV.shape[1] - 1)


def _needs_more_than_max(state: SamplingState) -> bool:
    params = state.params
    return (
        not params.is_greedy
        or params.has_penalties
        or state.allowed_V is not None
        or bool(state.forbidden_ids)
    )


def _check_usable(usable: Sequence[object]) -> None:
    """Raise unless all rows are usable, that is, the maximum of their logits is finite."""
    if not all(usable):
        bad = [row for row, is_usable in enumerate(usable) if not is_usable]
        raise LogitsError(
            f"no token can be chosen for row {', '.join(map(str, bad))} of the batch: its logits "
            "hold nan or +inf, or every token is ruled out; the model overflowed (try --dtype "
            "bfloat16 or float32) or its weights are damaged (longwing verify)",
            bad,
        )


def _counted(count_V: Tensor, ids: Sequence[int]) -> Tensor:
    """Counts with those of some tokens added, (V,) int64, and never in place.

    Ids without a logit are left out: an embedding may be longer than the output.
    """
    known = [token_id for token_id in ids if token_id < len(count_V)]
    known_I = placed(known, torch.int64, count_V.device)
    return count_V.index_add(0, known_I, torch.ones_like(known_I))


def _column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(R, 1)."""
    return placed(values, dtype, device)[:, None]


def _put(x_R: Tensor, rows: Sequence[int], new_R: Tensor) -> Tensor:
    """The tensor with some rows replaced; the new one itself if they are all."""
    if len(rows) == len(x_R):
        return new_R
    return x_R.index_copy(0, placed(rows, torch.int64, x_R.device), new_R)


def _batches(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]


# In the order in which they act: the setting, the value that means off, the filter.
_FILTERS: tuple[
    tuple[Callable[[SamplingParams], float], float, Callable[[Tensor, Tensor, _Limit], Tensor]], ...
] = (
    (lambda params: params.top_k, 0, _keep_top_k),
    (lambda params: params.top_p, 1, _keep_top_p),
    (lambda params: params.min_p, 0, _keep_min_p),
    (lambda params: params.typical_p, 1, _keep_typical),
)
