"""What the engine says about a request while it works on it. No torch.

A request's events come in this order: `Reading`, once a chunk of its prompt; `PromptRead` if
prompt log-probabilities were asked for; `Step`, once a token; and at the end one `Finished` or one
`Failed`, always, whatever happens. `to_wire` and `from_wire` carry them between processes.
"""

from dataclasses import dataclass
from typing import Any

from longwing.engine.request import FinishReason

TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, natural logarithm of its probability), likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The prompt is being read: `done` of `total` tokens, of which `cached` needed no work."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptToken:
    """A prompt token as the model saw it coming; the first one has no log-probability."""

    id: int
    logprob: float | None
    top: TopLogprobs = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRead:
    """The whole prompt's log-probabilities, in order."""

    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One generated token.

    Attributes:
        id: the token.
        piece: its own text: what it adds to the text so far, before stop strings are looked at;
            empty while a character is incomplete. A special token's piece is its name.
        special: whether it is a special token, which is no part of the text.
        text: what can be shown now; it lags behind the pieces while a stop string may be coming.
            The texts of all steps, joined, are the answer.
        logprob: if asked for.
        top: the likeliest tokens in its place, if asked for.
    """

    id: int
    piece: str
    special: bool
    text: str
    logprob: float | None = None
    top: TopLogprobs = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: why it ended.
        stop: the stop string that ended it, if one did.
        seed: what sampling used.
        prompt_len: tokens in the prompt.
        cached_len: how many of them were found in the prefix cache.
        num_generated: tokens generated, the end token included.
        queue_s: seconds it waited before its first chunk.
        prefill_s: seconds from there to its first token.
        decode_s: seconds from there to its last.
    """

    reason: FinishReason
    seed: int
    prompt_len: int
    cached_len: int
    num_generated: int
    queue_s: float
    prefill_s: float
    decode_s: float
    stop: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The answer cannot be finished.

    Attributes:
        kind: "request" (the request is at fault: `message` may be shown), "generation" (it was
            ours, or the model's) or "engine" (the engine is gone).
        message: a sentence for the client; no paths, no traceback.
    """

    kind: str
    message: str


Event = Reading | PromptRead | Step | Finished | Failed
"""Anything the engine says about one request."""


def to_wire(event: Event) -> dict[str, Any]:
    """The event as plain data, for JSON."""
    wire = {name: getattr(event, name) for name in type(event).__slots__}
    if isinstance(event, PromptRead):
        wire["tokens"] = [[token.id, token.logprob, token.top] for token in event.tokens]
    return {"event": type(event).__name__, **wire}


def from_wire(wire: dict[str, Any]) -> Event:
    """Undo `to_wire`."""
    values = dict(wire)
    kind = _KINDS[values.pop("event")]
    if kind is PromptRead:
        return PromptRead(
            tokens=tuple(
                PromptToken(id=token_id, logprob=logprob, top=_top(top))
                for token_id, logprob, top in values["tokens"]
            )
        )
    if kind is Finished:
        values["reason"] = FinishReason(values["reason"])
    if kind is Step:
        values["top"] = _top(values["top"])
    event: Event = kind(**values)
    return event


def _top(pairs: list[list[Any]]) -> TopLogprobs:
    return tuple((token_id, logprob) for token_id, logprob in pairs)


_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Reading, PromptRead, Step, Finished, Failed)
}
