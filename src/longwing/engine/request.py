"""What a caller may ask of a generation, and how a generation ends. No torch.

`SamplingParams` is every setting of one answer; `sampler.py` gives them their meaning, `stop.py`
watches for the stop strings, and `FinishReason` says why the text ended. `Request` is a prompt with
its settings, as it goes to the engine; what comes back is in `events.py`. A field's bounds and help
stand in its metadata, once: `__post_init__` refuses by them, and command-line options can be made
from them. To add a setting, add a field.

The defaults ask for the model's own most likely text: greedy, nothing penalised, nothing cut, so
that a run can be repeated. A dialect with other defaults (OpenAI: temperature 1) writes them in
when it reads a request.
"""

import enum
import reprlib
from dataclasses import Field, dataclass, field, fields
from typing import Any

from longwing.errors import GrammarError, RequestError, SamplingError

MAX_TOKENS = 2**31 - 1  # no context is longer; keeps every count inside 32 bits
MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20  # as OpenAI; more would let one request ask for a copy of the vocabulary
MAX_STOP_STRINGS = 32
MAX_STOP_LEN = 256  # characters
MAX_STOP_TOKEN_IDS = 256

_shown = reprlib.repr  # shortened: refused values come from outside, and a message stays a message


class FinishReason(enum.StrEnum):
    """Why a text ended. Values as TGI writes them; `cancelled` is ours, for a caller who left."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"
    CANCELLED = "cancelled"


def _number(
    default: float, low: float, high: float, help_text: str, *, above_low: bool = False
) -> Any:
    """A field holding a number in [low, high], or in (low, high]."""
    return field(
        default=default,
        metadata={"help": help_text, "low": low, "high": high, "above_low": above_low},
    )


def _whole(default: int | None, low: int, high: int, help_text: str) -> Any:
    """A field holding a whole number in [low, high]; None only if that is its default."""
    return field(
        default=default, metadata={"help": help_text, "low": low, "high": high, "whole": True}
    )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The settings of one request, checked when made; change them with `dataclasses.replace`.

    At temperature 0 nothing is drawn, so the filters and the seed change nothing (`without_effect`
    names those that were set, for a warning); penalties do.

    Raises:
        SamplingError: a value is not of its type, not finite or out of its bounds, or
            min_new_tokens exceeds max_new_tokens.
    """

    max_new_tokens: int | None = _whole(
        None,
        1,
        MAX_TOKENS,
        "most tokens to generate; unset: 256, or what the context leaves",
    )
    min_new_tokens: int = _whole(
        0, 0, MAX_TOKENS, "no end-of-text or stop token before this many tokens"
    )
    temperature: float = _number(
        0.0, 0, 100, "0: always the likeliest token; 1: the model's distribution; more: flatter"
    )
    top_k: int = _whole(0, 0, MAX_TOKENS, "sample among the k likeliest tokens; 0: off")
    top_p: float = _number(
        1.0,
        0,
        1,
        "sample among the likeliest tokens that together hold this probability; 1: off",
        above_low=True,
    )
    min_p: float = _number(
        0.0, 0, 1, "sample among tokens at least this fraction as likely as the likeliest; 0: off"
    )
    typical_p: float = _number(
        1.0,
        0,
        1,
        "sample among the most typical tokens that together hold this probability; 1: off",
        above_low=True,
    )
    repetition_penalty: float = _number(
        1.0,
        0.01,
        100,
        "divide (if negative: multiply) the logits of tokens in prompt or answer by this; 1: off",
    )
    frequency_penalty: float = _number(
        0.0, -2, 2, "subtract this from a token's logit for each time the answer has it; 0: off"
    )
    presence_penalty: float = _number(
        0.0, -2, 2, "subtract this from a token's logit once the answer has it; 0: off"
    )
    stop: tuple[str, ...] = field(
        default=(), metadata={"help": "end before the first of these texts"}
    )
    stop_token_ids: frozenset[int] = field(
        default=frozenset(), metadata={"help": "end at any of these token ids"}
    )
    seed: int | None = _whole(None, 0, MAX_SEED, "same seed, same text; unset: a new one each time")
    ignore_eos: bool = field(
        default=False, metadata={"help": "go on past the model's end-of-text token"}
    )
    logprobs: int | None = _whole(
        None,
        0,
        MAX_LOGPROBS,
        "report each token's log-probability, and those of this many likeliest; unset: neither",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            if "low" in setting.metadata:
                _check_number(setting, getattr(self, setting.name))
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos must be True or False, is {_shown(self.ignore_eos)}")
        _check_stop(self.stop)
        _check_stop_token_ids(self.stop_token_ids)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise SamplingError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens, which is "
                f"{self.max_new_tokens}"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest one, so that nothing is drawn."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Names of settings that were made but change nothing, because temperature is 0."""
        drawing = {"top_k", "top_p", "min_p", "typical_p", "seed"} if self.is_greedy else set()
        return tuple(
            setting.name
            for setting in fields(self)
            if setting.name in drawing and getattr(self, setting.name) != setting.default
        )


GRAMMAR_KINDS = ("json_schema", "json_object", "regex", "lark")
"""What a `Grammar` may be written in; `json_object` is any JSON object and has no source."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an answer's text must conform to. Its limits are held where it is compiled.

    Attributes:
        kind: one of GRAMMAR_KINDS.
        source: the schema as JSON text, the regular expression, or the Lark grammar.
    """

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise GrammarError(
                f"grammar kind {_shown(self.kind)} is not one of {', '.join(GRAMMAR_KINDS)}"
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and what is wanted of it.

    Attributes:
        prompt_ids: the prompt, at least one token.
        params: settings of the answer; max_new_tokens must be set.
        grammar: what the text must conform to, if anything.
        salt: whose prompt this is: sequences share cached pages only under the same salt.
        adapter: the name of the adapter to answer with; "" is the model itself.
        include_stop: whether the stop string that ends the text is part of it (TGI: yes).
        prompt_logprobs: report the log-probability of each prompt token, and this many of the
            likeliest in its place; None reports nothing.

    Raises:
        RequestError: the prompt is empty, or a field is out of its bounds.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    grammar: Grammar | None = None
    salt: str = ""
    adapter: str = ""
    include_stop: bool = False
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("the prompt is empty; give at least one token")
        if self.params.max_new_tokens is None:
            raise RequestError("max_new_tokens is not set; say how long the answer may be")
        if not isinstance(self.adapter, str):
            raise RequestError(f"adapter must be a name, is {_shown(self.adapter)}")
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs is {self.prompt_logprobs}; from 0 to {MAX_LOGPROBS} can be had"
            )


def _check_number(setting: Field[Any], value: object) -> None:
    low, high = setting.metadata["low"], setting.metadata["high"]
    if value is None and setting.default is None:
        return
    is_whole = setting.metadata.get("whole", False)
    if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
        kind = "a whole number" if is_whole else "a number"
        raise SamplingError(f"{setting.name} must be {kind}, is {_shown(value)}")
    above_low = setting.metadata.get("above_low", False)
    # nan fails every comparison, and the bounds are finite: nothing else need be asked of a float.
    if not low <= value <= high or (above_low and value == low):
        least = f"above {low}" if above_low else f"at least {low}"
        raise SamplingError(
            f"{setting.name} must be {least} and at most {high}, is {_shown(value)}"
        )


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) for text in stop):
        raise SamplingError(f"stop must be a tuple of strings, is {_shown(stop)}")
    if len(stop) > MAX_STOP_STRINGS:
        raise SamplingError(f"stop has {len(stop)} strings, the limit is {MAX_STOP_STRINGS}")
    for text in stop:
        if not text:
            raise SamplingError("stop holds an empty string, which would end every text at once")
        if len(text) > MAX_STOP_LEN:
            raise SamplingError(
                f"stop holds a string of {len(text)} characters, the limit is {MAX_STOP_LEN}"
            )


def _check_stop_token_ids(ids: object) -> None:
    if not isinstance(ids, frozenset) or not all(type(token_id) is int for token_id in ids):
        raise SamplingError(f"stop_token_ids must be a frozenset of ints, is {_shown(ids)}")
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise SamplingError(f"stop_token_ids has {len(ids)}, the limit is {MAX_STOP_TOKEN_IDS}")
    for token_id in sorted(ids):
        if not 0 <= token_id <= MAX_TOKENS:
            raise SamplingError(
                f"stop_token_ids must be at least 0 and at most {MAX_TOKENS}, "
                f"one is {_shown(token_id)}"
            )
