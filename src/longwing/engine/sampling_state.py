"""`SamplingState`: what sampling knows of one sequence from token to token.

The settings, the seed and the tokens so far: in numbers on the host, and, for a sequence with
penalties, in counts on the device. What is made of them is `penalties.py` and `sampler.py`.

Shape key: V vocabulary, I some ids.

The one idea: a state says what is known *before* a token, and deriving another never changes it.
`ahead` is the state behind drafts, to judge them; `after` the state behind a token that lies on the
device and that the host does not know yet, so that a step can be launched on it.
"""

import copy
import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from longwing.engine.request import SamplingParams
from longwing.engine.transfers import placed

_NUM_RANKED = 1024  # first try at how many tokens hold a share; moves no result


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


def _counted(count_V: Tensor, ids: Sequence[int]) -> Tensor:
    """Counts with those of some tokens added, (V,) int64, and never in place.

    Ids without a logit are left out: an embedding may be longer than the output.
    """
    known = [token_id for token_id in ids if token_id < len(count_V)]
    known_I = placed(known, torch.int64, count_V.device)
    return count_V.index_add(0, known_I, torch.ones_like(known_I))
