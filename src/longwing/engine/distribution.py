"""The distribution a token is drawn from: temperature, filters, and the draw.

A filter looks at probabilities alone, so tokens of equal probability stay or go together, and no
tie depends on a sort. Which of several filters acts first says the table at the foot.

Shape key: V vocabulary, R rows, C candidates; R1 is a column, a number of each row.

The one idea: **a probability is held as a whole number**. A sum of floats depends on its order, and
the order on batch size, alignment and device; on CUDA a cumulative sum differs from run to run. So
exp(z - max z) is rounded down to a multiple of 2**-42 and kept as an int64 weight
(`logprobs.weights`). Totals, cumulative sums and draws are then exact in any order, every other
step acts on single elements or picks a maximum, and a row gives the same bits alone, in any batch
and after a restart (tested on the CPU). The price: a token less than 2**-42 (2e-13) times as likely
as the likeliest is never drawn. That the logits do not depend on the batch either is the model's
part.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.engine.logprobs import WEIGHT_BITS, weights
from longwing.engine.request import SamplingParams
from longwing.engine.transfers import column, put, take

_DRAW_BITS = 60  # while drawing, probability 1 is 2**60: exact for float32 above 2**-36
_COLDEST = 1e-30  # float32 would make 0 of much less; the distribution is one point long before


class Ranking:
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

    @property
    def enough(self) -> Tensor | None:
        """Whether all lists were: one bool on the device; None if there are none."""
        return torch.stack(self._notes).all() if self._notes else None


def distributions(logits_RV: Tensor, params: Sequence[SamplingParams], ranking: Ranking) -> Tensor:
    """Temperature and filters: (R, V) float32, every row of sum 1. None of the rows is greedy."""
    temperature_R1 = column([max(p.temperature, _COLDEST) for p in params], logits_RV.device)
    z_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R1
    weights_RV = weights(z_RV)
    for limit_of, off, keep in _FILTERS:
        # Only rows that ask for a filter go through it; the others are not even copied.
        rows = [row for row, p in enumerate(params) if limit_of(p) != off]
        if rows:
            limits = [limit_of(params[row]) for row in rows]
            limit = _Limit(limits, column(limits, logits_RV.device, torch.float64), ranking)
            kept_RV = keep(take(weights_RV, rows), take(z_RV, rows), limit)
            weights_RV = put(weights_RV, rows, kept_RV)
    total_R1 = weights_RV.sum(dim=-1, keepdim=True)
    return (weights_RV.double() / total_R1.double()).float()


def draw(probs_V: Tensor, u: float) -> int:
    """The token at u of the way through the distribution, tokens lying in the order of their ids.

    Args:
        probs_V: (V,) floats in [0, 1], not all zero; the sum need not be 1 (nor may it exceed 7).
        u: in [0, 1), from `uniform`.
    """
    u_1 = torch.tensor([u], dtype=torch.float64, device=probs_V.device)
    return int(draw_rows(probs_V[None], u_1))


def draw_rows(probs_RV: Tensor, u_R: Tensor) -> Tensor:
    """Ids (R,): the first at which the cumulative weight exceeds u times the total.

    A token of weight 0 is never the first to exceed anything. In a row of nan, which has none, any
    token is named, but one that there is: a step may be under way with it before that is found out.
    """
    sums_RV = (probs_RV.double() * 2.0**_DRAW_BITS).long().cumsum(dim=-1)
    # Below the total even when rounded, since u is at most 1 - 2**-53: some token does exceed it.
    target_R = (u_R * sums_RV[:, -1].double()).long()
    found_R = torch.searchsorted(sums_RV, target_R[:, None], right=True)[:, 0]
    return found_R.clamp(max=probs_RV.shape[1] - 1)


@dataclass(frozen=True)
class _Limit:
    """A filter's setting for each row, here and as an (R, 1) column on the device."""

    values: Sequence[float]
    column_R1: Tensor
    ranking: Ranking


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
    score_RV: Tensor, weights_RV: Tensor, share_R1: Tensor, ranking: Ranking | None = None
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


# In the order in which they act: the setting, the value that means off, the filter.
_FILTERS: tuple[
    tuple[Callable[[SamplingParams], float], float, Callable[[Tensor, Tensor, _Limit], Tensor]], ...
] = (
    (lambda params: params.top_k, 0, _keep_top_k),
    (lambda params: params.top_p, 1, _keep_top_p),
    (lambda params: params.min_p, 0, _keep_min_p),
    (lambda params: params.typical_p, 1, _keep_typical),
)
