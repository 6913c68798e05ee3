"""`Transcript`: an answer as it grows, from token ids to text, and the reason why it ends.

Every path that generates, plain or batched, keeps one, so that all end in the same place and show
the same text.
"""

from collections.abc import Set
from dataclasses import dataclass

from longwing.engine.request import FinishReason, SamplingParams
from longwing.engine.stop import StopStrings
from longwing.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one token added.

    Attributes:
        piece: the token's own text; a special token's name.
        special: whether it is a special token, which is no part of the text.
        text: what can be shown now; stop strings are held back while they may still be coming.
    """

    piece: str
    special: bool
    text: str


class Transcript:
    """One answer.

    Args:
        tokenizer: the model's.
        params: stop strings and tokens, and whether end tokens count.
        end_ids: tokens that end an answer.
        max_new: tokens it may have.
        include_stop: whether the stop string that ends the text is part of it.

    Attributes:
        ids: every token, the end token included.
        finish_reason: why it ended; None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        end_ids: Set[int],
        max_new: int,
        include_stop: bool = False,
    ) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._texts: list[str] = []
        self._tokenizer = tokenizer
        self._pieces = tokenizer.stream(begun=True)
        self._stop = StopStrings(params.stop, include_stop=include_stop)
        self._max_new = max_new
        self._stop_ids = params.stop_token_ids
        self._end_ids = frozenset() if params.ignore_eos else frozenset(end_ids)

    @property
    def text(self) -> str:
        """The answer so far, as far as it can be shown."""
        return "".join(self._texts)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop.matched

    def push(self, token_id: int) -> Piece:
        """Add a token."""
        self.ids.append(token_id)
        self.finish_reason = self._ends_at(token_id)
        is_end = self.finish_reason in (FinishReason.EOS_TOKEN, FinishReason.STOP_SEQUENCE)
        special = token_id in self._tokenizer.special_ids
        piece = "" if is_end else self._pieces.push(token_id)
        text, stopped = self._stop.push(piece)
        if self.finish_reason is not None and not stopped:
            rest = self._pieces.flush()
            piece += rest
            last, stopped = self._stop.push(rest)
            text += last + ("" if stopped else self._stop.flush())
        if stopped:
            self.finish_reason = FinishReason.STOP_SEQUENCE
        self._texts.append(text)
        if special or (is_end and not piece):
            piece = self._name(token_id)
        return Piece(piece=piece, special=special, text=text)

    def _ends_at(self, token_id: int) -> FinishReason | None:
        """Why this token ends the answer, if it does. An end token is not part of the text."""
        if token_id in self._stop_ids:
            return FinishReason.STOP_SEQUENCE
        if token_id in self._end_ids:
            return FinishReason.EOS_TOKEN
        return FinishReason.LENGTH if len(self.ids) == self._max_new else None

    def _name(self, token_id: int) -> str:
        """The token as its vocabulary spells it; a padded vocabulary has ids without a name."""
        return self._tokenizer.token(token_id) if token_id < self._tokenizer.vocab_size else ""
