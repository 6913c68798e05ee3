"""Prompt-lookup drafts: guess the next tokens from where the text last went the same way. No torch.

An answer about a document repeats pieces of it, and code repeats itself. So the last few tokens are
looked up in the text so far, and what followed them there is the draft (Saxena, "Prompt Lookup
Decoding", 2023). The model reads draft and last token in one pass and keeps what it would have said
itself; which that is, the sampler decides.

The one idea: an index from every n-gram to where it last ended. When a token arrives, what the
index says of the n-gram that it completes, just before it is overwritten, is the latest earlier
occurrence: nothing is ever searched.

A wrong draft costs a pass over useless tokens, so the length follows success: it doubles while
drafts are accepted whole, falls with what is rejected, and after failing altogether drafting pauses
for longer each time.
"""

from collections.abc import Iterable
from itertools import count

from longwing.errors import ConfigError

_FIRST_PAUSE, _LONGEST_PAUSE = 4, 64
"""Tokens without a draft after drafts of one token failed; doubled from failure to failure."""


class PromptLookup:
    """The drafts of one sequence. Memory: about 0.5 kB a token with the default n-grams.

    Args:
        max_draft: most tokens in a draft.
        min_ngram: fewest last tokens that must have occurred before.
        max_ngram: most last tokens compared; the longest n-gram with an occurrence wins.

    Raises:
        ConfigError: a number is below 1, or min_ngram above max_ngram.
    """

    def __init__(self, *, max_draft: int = 8, min_ngram: int = 2, max_ngram: int = 4) -> None:
        if max_draft < 1 or not 1 <= min_ngram <= max_ngram:
            raise ConfigError(
                f"prompt lookup with drafts of {max_draft} tokens and n-grams from {min_ngram} to "
                f"{max_ngram}; all must be at least 1, and the n-grams in this order"
            )
        self._max_draft = max_draft
        self._tokens: list[int] = []
        # For each n, longest first: the end of the latest occurrence of every n-gram, and that of
        # the occurrence before of the one that ends the text.
        self._latest: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(max_ngram, min_ngram - 1, -1)
        }
        self._earlier: dict[int, int | None] = dict.fromkeys(self._latest)
        # Short at first: two tokens are enough to find out whether drafts are any good here.
        self._draft_len = min(2, max_draft)
        self._followed: set[int] = set()  # tokens that another came after
        self._pause = _FIRST_PAUSE
        self._resume_at = 0

    def __len__(self) -> int:
        """Tokens in the index."""
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens to the text. Time: constant a token."""
        old_len = len(self._tokens)
        self._tokens.extend(token_ids)
        if len(self._tokens) == old_len:
            return
        self._followed.update(self._tokens[max(old_len - 1, 0) : -1])
        for n, latest in self._latest.items():
            first = max(old_len + 1 - n, 0)  # where the first n-gram starts that has a new token
            window = self._tokens[first:]
            ngrams = list(zip(*(window[offset:] for offset in range(n)), strict=False))
            if not ngrams:
                continue
            suffix = ngrams.pop()
            latest.update(zip(ngrams, count(first + n), strict=False))
            self._earlier[n] = latest.get(suffix)
            latest[suffix] = len(self._tokens)

    def draft(self, limit: int) -> list[int]:
        """What may come next, at most `limit` tokens; [] if nothing is known or drafts fail lately.

        It is the continuation of the latest earlier occurrence of the longest n-gram that ends the
        text. Where that reaches the end of the text it goes on with its own beginning: a text
        that repeats with some period is continued with that period.
        """
        draft_len = min(limit, self._draft_len)
        if draft_len < 1 or len(self._tokens) < self._resume_at:
            return []
        end = next((end for end in self._earlier.values() if end is not None), None)
        if end is None:
            return []
        period = len(self._tokens) - end
        return [self._tokens[end + i % period] for i in range(draft_len)]

    def may_draft_next(self) -> bool:
        """Whether there could be a draft after one more token, whatever that will be."""
        if len(self._tokens) + 1 < self._resume_at:
            return False
        return 1 in self._latest or self._tokens[-1] in self._followed

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from a draft: how many tokens it had, and how many of them became text."""
        if num_drafted < 1:
            return
        if num_accepted > 0:
            self._pause = _FIRST_PAUSE
        if num_accepted >= num_drafted:
            # A draft cut short by the caller's limit says nothing against longer ones.
            self._draft_len = min(max(self._draft_len, 2 * num_drafted), self._max_draft)
        elif num_accepted > 0:
            self._draft_len = num_accepted + 1
        elif self._draft_len > 1:
            self._draft_len //= 2
        else:
            self._resume_at = len(self._tokens) + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
