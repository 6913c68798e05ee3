"""Logits before any choice: what a grammar, the penalties and min_new_tokens make of them.

They act in the order of `sampler.py`: the grammar's mask; repetition penalty; frequency and
presence penalty; no ending before min_new_tokens, unless the grammar allows nothing else. Rows
that ask for none of these pass as they are, and no tensor is changed in place.

Shape key: V vocabulary, R rows, I some ids; R1 is a column, a setting of each row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longwing.engine.sampling_state import SamplingState
from longwing.engine.transfers import column, placed, put, take
from longwing.errors import RequestError


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
        logits_RV = put(logits_RV, rows, _penalised(take(logits_RV, rows), own))
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
    repetition_R1 = column([p.repetition_penalty for p in params], logits_RV.device)
    frequency_R1 = column([p.frequency_penalty for p in params], logits_RV.device)
    presence_R1 = column([p.presence_penalty for p in params], logits_RV.device)
    histories = [state.history(logits_RV.shape[1], logits_RV.device) for state in states]
    in_prompt_RV = torch.stack([in_prompt_V for in_prompt_V, _ in histories])
    count_RV = torch.stack([count_V for _, count_V in histories])
    repeated_RV = torch.where(logits_RV < 0, logits_RV * repetition_R1, logits_RV / repetition_R1)
    logits_RV = torch.where(in_prompt_RV | (count_RV > 0), repeated_RV, logits_RV)
    return logits_RV - count_RV.float() * frequency_R1 - (count_RV > 0).float() * presence_R1
