"""What can be asked of a server, and what it answers.

Settings are keyword arguments, typed here once for both clients; one that is None is not sent, and
the server's own default holds. `Answer`, `StreamToken` and `TextToken` belong to TGI's routes,
`Completion` and `ChatDelta` to OpenAI's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

MAX_NEW_TOKENS = 256
"""Unless the caller says otherwise; a server's own default may be 20 tokens, or all that fit."""


class GenerateSettings(TypedDict, total=False):
    """What TGI's routes take besides the prompt; see `longwing.SamplingParams` for most meanings.

    `truncate` reads that many last tokens of the prompt alone. `grammar` is
    {"type": "json", "value": schema} or {"type": "regex", "value": expression}. `best_of` generates
    so many and returns the likeliest; it and `decoder_input_details` (the prompt's tokens) are not
    for streams. `adapter` is the name of an adapter that is served beside the model; it goes as
    `adapter_id`, TGI's word for it.
    """

    max_new_tokens: int | None
    temperature: float | None
    do_sample: bool | None
    top_k: int | None
    top_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: Sequence[str] | None
    truncate: int | None
    grammar: Mapping[str, Any] | None
    best_of: int | None
    top_n_tokens: int | None
    return_full_text: bool | None
    decoder_input_details: bool | None
    details: bool | None
    adapter_id: str | None
    adapter: str | None


class CompletionSettings(TypedDict, total=False):
    """What OpenAI's routes take. `extra` is merged into the body: fields of one server alone.

    `adapter` is the name of an adapter that is served beside the model; it goes as `model`.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[str, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    n: int | None
    user: str | None
    adapter: str | None
    extra: Mapping[str, Any] | None


class TextSettings(CompletionSettings, total=False):
    """`echo` begins the text with the prompt; `logprobs` is how many likeliest tokens to report."""

    echo: bool | None
    logprobs: int | None


class ChatSettings(CompletionSettings, total=False):
    """What a chat takes besides; all as in OpenAI's API."""

    logprobs: bool | None
    top_logprobs: int | None
    response_format: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token.

    Attributes:
        id: its number in the vocabulary.
        text: what it adds to the text; empty while a character is incomplete.
        logprob: natural logarithm of its probability; None for the first of a prompt.
        special: whether it is no part of the text.
    """

    id: int
    text: str
    logprob: float | None = None
    special: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A generated text.

    Attributes:
        text: the text.
        finish_reason: "length", "eos_token" or "stop_sequence"; "" without details.
        num_generated: tokens generated; 0 without details.
        seed: what sampling used, if it did.
        tokens: the tokens; empty without details, and in streams, which give them one by one.
        top_tokens: for each token the likeliest in its place, if asked for.
        prompt_tokens: the prompt's tokens, if asked for.
        prompt_len: tokens in the prompt, if the server says so; else 0.
        others: further answers, if best_of was asked for.
    """

    text: str
    finish_reason: str = ""
    num_generated: int = 0
    seed: int | None = None
    tokens: tuple[Token, ...] = ()
    top_tokens: tuple[tuple[Token, ...], ...] = ()
    prompt_tokens: tuple[Token, ...] = ()
    prompt_len: int = 0
    others: tuple["Answer", ...] = ()


@dataclass(frozen=True, kw_only=True)
class StreamToken:
    """One token of a stream.

    Attributes:
        token: the token.
        top: the likeliest in its place, if asked for.
        answer: with the last token, the whole answer.
    """

    token: Token
    top: tuple[Token, ...] = ()
    answer: Answer | None = None

    @property
    def text(self) -> str:
        """What it adds to the text: nothing, if it is special."""
        return "" if self.token.special else self.token.text


@dataclass(frozen=True, kw_only=True)
class TextToken:
    """A token of a text and the characters it covers, from `start` to before `stop`.

    A token that covers none, such as one that a template puts in, may have no places.
    """

    id: int
    text: str
    start: int | None
    stop: int | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of a completion's texts.

    Attributes:
        text: the text, or a chat message's content.
        finish_reason: "stop", "length", "tool_calls".
        tool_calls: functions that the model wants called, as the API writes them.
        logprobs: as the API writes them, if asked for.
    """

    text: str
    finish_reason: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a chat or a completion.

    Attributes:
        choices: one for each of `n`, and of several prompts.
        prompt_len: tokens in the prompt.
        num_generated: tokens generated.
        model: what the server calls its model.
        raw: all that it said.
    """

    choices: tuple[Choice, ...]
    prompt_len: int
    num_generated: int
    model: str
    raw: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class ChatDelta:
    """What a chunk of a chat's stream adds.

    Attributes:
        text: new text; may be empty.
        index: which of the `n` answers it belongs to.
        finish_reason: with an answer's last chunk, why it ended.
        tool_calls: parts of calls, as the API writes them.
        prompt_len: tokens in the prompt; in the very last chunk alone, if the server says so.
        num_generated: tokens generated, likewise.
    """

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    prompt_len: int = 0
    num_generated: int = 0
