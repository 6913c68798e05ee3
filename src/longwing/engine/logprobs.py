"""Log-probabilities: how likely the model held a token, and which were the likeliest in its place.

They are those of the model, of raw logits. The device adds up whole numbers (`weights`), so a sum
has one result in any order; Python takes the logarithms, so that they are the same on every device.
Nothing here asks the device anything: `measured` gives it work, `reports` reads what came of it.

Shapes: V vocabulary, R rows, C the likeliest that are told of.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TokenLogprob = tuple[int, float]  # token id, natural logarithm of its probability

WEIGHT_BITS = 42  # the likeliest token weighs 2**42: up to 2**21 tokens sum to less than 2**63


def weights(z_RV: Tensor) -> Tensor:
    """exp(z), for z <= 0, in whole multiples of 2**-42, rounded down; the scaling is exact."""
    return (z_RV.exp() * 2.0**WEIGHT_BITS).long()


def measured(
    logits_RV: Tensor, max_R: Tensor, id_R: Tensor, nums_top: Sequence[int]
) -> tuple[Tensor, ...]:
    """What `reports` needs to know, on the device.

    Args:
        logits_RV: float32, raw.
        max_R: the highest of each row.
        id_R: the token of each row that is asked about.
        nums_top: how many of each row's likeliest are wanted.
    """
    total_R = weights(logits_RV - max_R[:, None]).sum(dim=-1)
    own_R = logits_RV.gather(1, id_R[:, None])[:, 0]
    top_RC = _highest(logits_RV, min(max(nums_top, default=0), logits_RV.shape[1]))
    return own_R, max_R, total_R, top_RC, logits_RV.gather(1, top_RC)


def reports(
    numbers: Sequence[Tensor], nums_top: Sequence[int], usable: Sequence[bool]
) -> list[tuple[float | None, list[TokenLogprob]]]:
    """For each row the log-probability of its token, and its likeliest tokens.

    Args:
        numbers: `measured`, on the host.
        nums_top: as there.
        usable: whether a row is a distribution at all; nothing is told of one that is not.
    """
    told: list[tuple[float | None, list[TokenLogprob]]] = []
    rows = zip(*(tensor.tolist() for tensor in numbers), nums_top, usable, strict=True)
    for own, highest, total, ids, logits, num, is_usable in rows:
        if not is_usable:
            told.append((None, []))
            continue
        log_total = math.log(total / 2**WEIGHT_BITS)
        top = [
            (token_id, logit - highest - log_total)
            for token_id, logit in zip(ids[:num], logits[:num], strict=True)
            if logit > -math.inf
        ]
        told.append((own - highest - log_total, top))
    return told


def _highest(logits_RV: Tensor, num: int) -> Tensor:
    """(R, num) ids of each row's highest, highest first, of equals the lowest id first.

    topk chooses freely among equals, so it is given whole numbers of which no two are: above the
    logit's bits, turned so that they count upwards as it does, and below what the id leaves.
    """
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # + 0.0 makes of -0.0 the 0.0 it equals
    rising_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)
    left_V = 0x7FFFFFFF - torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return ((rising_RV.long() << 32) | left_V).topk(num, dim=-1).indices
