"""Log-probabilities in OpenAI's two shapes, each entry beside the text that it is about.

A token's text may come later than the token: half a character waits for the other half, and a stop
string that may be coming holds everything back. An entry goes out once its token's text begins to,
and what a stop string takes away it takes from both; the end token has no text, and no entry. So a
stream's entries, put together, are those of the whole answer, and stand for its text.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longwing.engine.events import PromptToken, Step, TopLogprobs
from longwing.engine.request import FinishReason
from longwing.errors import RequestError
from longwing.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI does the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A token's log-probability, and those of the likeliest tokens in its place.

    Attributes:
        id: the token.
        logprob: its own; None for the first token of a prompt.
        top: the likeliest, likeliest first.
        offset: where its text begins, in characters from the beginning of the answer's text.
    """

    id: int
    logprob: float | None
    top: TopLogprobs
    offset: int


class ScoreQueue:
    """The entries of one answer, each until its text is out.

    Args:
        offset: characters of the answer's text before the first token (an echoed prompt).
    """

    def __init__(self, offset: int = 0) -> None:
        self._written = offset  # characters of the tokens so far
        self._shown = offset  # characters that went out
        self._waiting: deque[tuple[Score, bool]] = deque()

    def push(self, step: Step) -> list[Score]:
        """Take a token; returns the entries whose text goes out with `step.text`."""
        score = Score(id=step.id, logprob=step.logprob, top=step.top, offset=self._written)
        width = 0 if step.special else len(step.piece)
        self._waiting.append((score, width > 0))
        self._written += width
        self._shown += len(step.text)
        ready = []
        while self._waiting and self._is_shown(*self._waiting[0]):
            ready.append(self._waiting.popleft()[0])
        return ready

    def finish(self, reason: FinishReason) -> list[Score]:
        """The entries that remain when the answer has ended."""
        if reason is FinishReason.STOP_SEQUENCE:
            self._waiting.clear()
        elif reason is FinishReason.EOS_TOKEN and self._waiting:
            self._waiting.pop()
        rest = [score for score, _ in self._waiting]
        self._waiting.clear()
        return rest

    def _is_shown(self, score: Score, has_text: bool) -> bool:
        """An entry without text waits for the next one: it may be the end token's."""
        if has_text:
            return score.offset < self._shown
        return score.offset <= self._shown and len(self._waiting) > 1


def prompt_scores(tokenizer: Tokenizer, tokens: Sequence[PromptToken], text: str) -> list[Score]:
    """A prompt's entries.

    Args:
        tokenizer: the model's.
        tokens: the prompt.
        text: what is shown of it: without the bos that the tokenizer put before it.
    """
    pieces = tokenizer.stream(skip_special=False)
    scores = []
    offset = 0
    for token in tokens:
        scores.append(Score(id=token.id, logprob=token.logprob, top=token.top, offset=offset))
        width = len(pieces.push(token.id))
        if token.id == tokenizer.bos_id and not text.startswith(tokenizer.token(token.id), offset):
            width, pieces = 0, tokenizer.stream(skip_special=False)
        offset = min(offset + width, len(text))
    return scores


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token's name: its text; of part of a character `bytes:\xe2\x80`, as OpenAI has it.

    The same for a token wherever it stands, so that names can be compared.
    """
    spelt = _bytes(tokenizer, token_id)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def chat_logprobs(tokenizer: Tokenizer, scores: Iterable[Score], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat, with the `top` likeliest tokens."""
    return {
        "content": [
            {
                **_named(tokenizer, score.id, score.logprob),
                "top_logprobs": [_named(tokenizer, *one) for one in score.top[:top]],
            }
            for score in scores
        ],
        "refusal": None,
    }


def completion_logprobs(tokenizer: Tokenizer, scores: Sequence[Score]) -> dict[str, Any]:
    """`choices[].logprobs` of a completion; the token itself is always among the top ones."""
    return {
        "tokens": [token_text(tokenizer, score.id) for score in scores],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": [_top(tokenizer, score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _top(tokenizer: Tokenizer, score: Score) -> dict[str, float | None] | None:
    if score.logprob is None:
        return None
    named: dict[str, float | None] = {}
    for token_id, logprob in (*score.top, (score.id, score.logprob)):
        # Two tokens can have the same text; the likelier one comes first, and stays.
        named.setdefault(token_text(tokenizer, token_id), _finite(logprob))
    return named


def _named(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(_bytes(tokenizer, token_id)),
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """A token's bytes; a model with a padded vocabulary has ids that no text belongs to."""
    try:
        return tokenizer.token_bytes(token_id)
    except RequestError:
        return "\ufffd".encode()
