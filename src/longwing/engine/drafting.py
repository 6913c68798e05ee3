"""`Drafting`: who brings drafts into a step, and what came of them. Knows numbers only. No torch.

Where few are at work a step reads the model's weights for few tokens, and some more cost little;
where many are, each token costs its own time, and nothing is guessed. What is guessed says the
sequence's own `PromptLookup` (`lookup.py`), which is made here when it is first asked for. How many
tokens and pages there are for drafts is the scheduler's word.

The one idea: a step never waits for an index. It grows by a bounded number of tokens each time that
it is asked, and says nothing until it has caught up with the text.
"""

from longwing.engine.lookup import PromptLookup
from longwing.engine.sequence import Sequence, Work

_INDEX_STEP = 1024
"""Tokens a sequence's lookup index may grow in a step: about a millisecond."""


class Drafting:
    """The drafts of all sequences.

    Args:
        max_draft: most tokens in a draft; 0 for none at all.
        max_sequences: at work, for there to be drafts.

    Attributes:
        num_drafted: tokens drafted since the start.
        num_accepted: how many of them became text.
    """

    def __init__(self, max_draft: int, max_sequences: int) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._max_draft = max_draft
        self._max_sequences = max_sequences

    def pays(self, num_running: int) -> bool:
        """Whether so few are at work that drafts are worth their tokens."""
        return num_running <= self._max_sequences

    def draft(self, sequence: Sequence, limit: int) -> list[int]:
        """What may follow, at most `limit` tokens, as far as the sequence may grow."""
        num_tokens = len(sequence.tokens)
        # The last token of a text is never drafted: one more than the drafts is accepted.
        limit = min(limit, self._max_draft, sequence.max_len - num_tokens - 1)
        lookup = self.index(sequence) if limit > 0 else None
        if lookup is None or len(lookup) < num_tokens:
            return []
        return lookup.draft(limit)

    def may_come(self, sequence: Sequence) -> bool:
        """Whether there could be a draft after its next token, whatever that token will be."""
        lookup = self.index(sequence)
        if lookup is None or len(lookup) < len(sequence.tokens):
            return False
        return lookup.may_draft_next()

    def index(self, sequence: Sequence) -> PromptLookup | None:
        """The sequence's lookup, some way further; None if it does not want one."""
        if not self._max_draft or not sequence.can_draft:
            return None
        if sequence._lookup is None:
            sequence._lookup = PromptLookup(max_draft=self._max_draft)
        done = len(sequence._lookup)
        sequence._lookup.extend(sequence.tokens[done : done + _INDEX_STEP])
        return sequence._lookup

    def judge(self, work: Work, num_accepted: int) -> None:
        """Learn what came of a work's drafts: how many of them became text."""
        lookup = work.sequence._lookup
        if work.num_drafts and lookup is not None:
            lookup.judge(work.num_drafts, num_accepted)
            self.num_drafted += work.num_drafts
            self.num_accepted += num_accepted
