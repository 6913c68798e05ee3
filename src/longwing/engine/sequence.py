"""`Sequence`, a text as it is read and written, and `Work`, what it does in one step. No torch."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from longwing.engine.cache import CacheKey
from longwing.engine.lookup import PromptLookup
from longwing.errors import EngineError


class State(enum.Enum):
    """Where a sequence is in its life."""

    NEW = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A text as it is read and written. Only the scheduler changes it; equal only to itself.

    `drafting.py` and `shared_reading.py` are the scheduler's, and keep here what they know of it.

    Args:
        id: for messages.
        prompt_ids: the prompt, at least one token.
        max_len: tokens of prompt and answer at most.
        key: what must be equal, besides the tokens, to share pages.
        can_share: whether pages may be taken from the prefix cache and left there; not if every
            prompt token must be computed (for its log-probability).
        can_draft: whether tokens may be guessed ahead.

    Attributes:
        tokens: the prompt and what was accepted since.
        prompt_len: how many of them are the prompt.
        pages: the page table. A new list after a preemption and when finished.
        num_computed: tokens, from the first, whose keys and values lie in the pages.
        cached_len: prompt tokens found in the prefix cache at the first start.
        num_preemptions: how often it lost its pages.
    """

    def __init__(
        self,
        *,
        id: str,
        prompt_ids: Iterable[int],
        max_len: int,
        key: CacheKey,
        can_share: bool = True,
        can_draft: bool = True,
    ) -> None:
        self.id = id
        self.tokens = list(prompt_ids)
        self.prompt_len = len(self.tokens)
        self.max_len = max_len
        self.key = key
        self.can_share = can_share
        self.can_draft = can_draft
        self.pages: list[int] = []
        self.num_computed = 0
        self.cached_len = 0
        self.num_preemptions = 0
        self._state = State.NEW
        self._age = 0  # its number in the order of arrival
        self._has_started = False
        self._num_published = 0  # full pages offered to the prefix cache in this life
        self._num_overtaken = 0
        self._needs_free = 0  # when last refused, so many pages had to be free
        self._read_in = -1  # the last step in which it read, or was let in
        self._reader: Sequence | None = None  # another, seen reading the beginning they share…
        self._common_len = 0  # …of which so many tokens are known to be equal
        self._lookup: PromptLookup | None = None

    def __repr__(self) -> str:
        return f"<Sequence {self.id}: {self.num_computed} of {len(self.tokens)} tokens computed>"

    @property
    def num_left(self) -> int:
        """Known tokens to be computed yet; 1 while decoding."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence does in one step.

    Attributes:
        sequence: whose work it is.
        start: position of the first token; the context before it lies in the sequence's pages.
        token_ids: what to run at positions start, start + 1…; drafts at the end.
        num_drafts: how many of them are drafts.
        wants_token: whether its last known token is among them, so that the logits of the last
            1 + num_drafts are wanted.
    """

    sequence: Sequence
    start: int
    token_ids: list[int]
    num_drafts: int
    wants_token: bool

    @property
    def is_plain(self) -> bool:
        """Whether it is plain decoding, of a text whose prompt has been read."""
        is_read = self.start >= self.sequence.prompt_len
        return is_read and self.wants_token and len(self.token_ids) == 1

    def check(self, accepted: list[int]) -> None:
        """Refuse tokens that cannot have come of it.

        Args:
            accepted: the tokens that became text.

        Raises:
            EngineError: they cannot, or it is not the sequence's latest work.
        """
        sequence = self.sequence
        if sequence._state is not State.RUNNING or sequence.num_computed != self.start:
            raise EngineError(f"{sequence!r} has no work at {self.start} to commit")
        least, most = (1, 1 + self.num_drafts) if self.wants_token else (0, 0)
        if not least <= len(accepted) <= most:
            raise EngineError(
                f"sequence {sequence.id} gained {len(accepted)} tokens from a step that gives "
                f"from {least} to {most}"
            )
        drafts = self.token_ids[len(self.token_ids) - self.num_drafts :]
        if accepted[:-1] != drafts[: max(len(accepted) - 1, 0)]:
            raise EngineError(f"sequence {sequence.id} accepted tokens that were not drafted")
