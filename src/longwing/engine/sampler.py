"""Logits to tokens: the choice, its random number, its log-probability. A row, a sequence.

Settings act in this order, each on what the one before left: the grammar; repetition penalty;
frequency and presence penalty; no ending before min_new_tokens, unless the grammar allows nothing
else (`penalties.py`); temperature; top_k; top_p; min_p; typical_p (`distribution.py`). That is
transformers' order, and TGI's as far as TGI has them. Greedy takes the highest penalised logit, of
equals the lowest id. What is known of a sequence from token to token is `sampling_state.py`.

Shapes: `V` vocabulary, `S` sequences of the batch, `R` the rows a step is about.

The one idea: randomness has no state. `uniform(seed, step)` is a hash, so neither preemption nor
neighbours can move it. One such number through the inverse of the cumulative distribution gives one
token, for a hash and an int64 scan over V (0.04 ms for V = 65,024 on a CPU); Gumbel-max would need
V random numbers. It also makes speculation exact: sample after each drafted token with that
position's own number, and keep the draft for as long as it agrees. The text is the one plain
decoding gives.

Nothing asks the device anything until `Choosing.read`, so a step can be launched on tokens that the
host does not know yet; `SamplingState.after` is what is then known of a sequence.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.engine.distribution import Ranking, distributions, draw_rows
from longwing.engine.logprobs import TokenLogprob, measured, reports
from longwing.engine.penalties import adjusted
from longwing.engine.sampling_state import SamplingState
from longwing.engine.transfers import Answer, placed, put, take
from longwing.errors import LogitsError, RequestError
from longwing.kernels import likeliest

Choice = tuple[int, float | None, list[TokenLogprob]]
"""A token, its log-probability if it is wanted, and the likeliest in its place."""

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
        self._logits_SV = logits_SV.detach()
        self._states = states
        self._reporting = _batches(
            [i for i, s in enumerate(states) if s.params.logprobs is not None]
        )
        self.stands = True
        self._num_ranked = max((state.num_ranked for state in states), default=1)
        self._begin()

    @property
    def vocab_len(self) -> int:
        """V."""
        return self._logits_SV.shape[1]

    def read(self) -> list[Choice | None]:
        """Wait for the tokens; None for the rows whose logits allow none."""
        while True:
            chosen_S2, *numbers = self._answer.read()
            if not self._asks_enough or numbers.pop(0).item():
                break
            self.stands = False
            self._num_ranked *= 16
            for state in self._states:
                state.needed(self._num_ranked)
            self._begin()
        ids, usable = chosen_S2.T.tolist()
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
        ranking = Ranking(self._num_ranked)
        max_S, chosen_S2 = likeliest(logits_SV)
        for rows in _batches([i for i, state in enumerate(states) if _needs_more_than_max(state)]):
            own = [states[row] for row in rows]
            chosen_R2 = _choose(take(logits_SV, rows).float(), own, ranking)
            chosen_S2 = put(chosen_S2, rows, chosen_R2)
        self.ids_S = chosen_S2[:, 0]
        answer = [chosen_S2]
        enough = ranking.enough
        self._asks_enough = enough is not None
        if enough is not None:
            answer.append(enough)
        for rows in self._reporting:
            max_R, id_R = take(max_S, rows), take(self.ids_S, rows)
            logits_RV = take(logits_SV, rows).float()
            answer += measured(logits_RV, max_R, id_R, self._nums_top(rows))
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
    return distributions(logits_1V, [state.params], Ranking(len(logits_V)))[0]


def _choose(logits_RV: Tensor, states: Sequence[SamplingState], ranking: Ranking) -> Tensor:
    """`Likeliest.chosen_S2` of rows that need more than the batch's maximum."""
    logits_RV = adjusted(logits_RV, states)
    chosen_R2 = likeliest(logits_RV).chosen_S2
    if rows := [row for row, state in enumerate(states) if not state.params.is_greedy]:
        params = [states[row].params for row in rows]
        probs_RV = distributions(take(logits_RV, rows), params, ranking)
        numbers = [uniform(states[row].seed, states[row].num_generated) for row in rows]
        drawn_R = draw_rows(probs_RV, placed(numbers, torch.float64, chosen_R2.device))
        usable_R = take(chosen_R2[:, 1], rows)
        chosen_R2 = put(chosen_R2, rows, torch.stack((drawn_R, usable_R), dim=1))
    return chosen_R2


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


def _batches(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
