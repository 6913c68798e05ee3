"""The bodies of the OpenAI routes: their fields, types and bounds.

Bounds are those of `SamplingParams`, so that the document at /openapi.json, the check here and the
engine agree. Types are strict: `true` is no number and `"1"` no integer. null is the same as a
field left out, as the OpenAI SDK has it. What becomes of fields that are not declared here is
`openai_refusals.py`.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from longwing.engine.request import (
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_LEN,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS,
    SamplingParams,
)

MAX_CHOICES = 128
"""`n` at most, as OpenAI; how many can be served at once is the engine's to say."""
MAX_TOOLS = 128
MAX_MESSAGES = 2**14
MAX_NAME = 64  # characters of a function's name, as OpenAI
NAME_PATTERN = r"^[A-Za-z0-9_.-]+$"

_BOUNDS = {
    setting.name: setting.metadata
    for setting in fields(SamplingParams)
    if "low" in setting.metadata
}


def _bounds(name: str) -> Any:
    """The bounds and the help that `SamplingParams` gives a setting."""
    known = _BOUNDS[name]
    low = "gt" if known.get("above_low") else "ge"
    limits: dict[str, Any] = {low: known["low"], "le": known["high"]}
    if not known.get("whole"):
        limits["allow_inf_nan"] = False
    return Field(strict=True, description=known["help"], **limits)


Count = Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKENS)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LEN)]

# In long lists, fail_fast: the first wrong item is enough to know.
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


class Part(BaseModel):
    """A part of a body that has its own fields; unknown ones are ignored."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Part):
    """What a stream reports beside its text."""

    include_usage: bool | None = Field(None, description="end with a chunk that holds the usage")
    continuous_usage_stats: bool | None = Field(None, description="usage in every chunk")


class StructuredOutputs(Part):
    """What the text must conform to; exactly one of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)] | None = None
    grammar: str | None = Field(None, description="in llguidance's Lark dialect")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(asked := [name for name, value in self if value not in (None, False)]) != 1:
            raise PydanticCustomError(
                "one_of",
                "give exactly one of json, json_object, regex, choice and grammar, not {count}",
                {"count": len(asked)},
            )
        return self


class SamplingBody(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="answers to each prompt; the i-th has the seed seed + i"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | StopStrings | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), le=MAX_SEED)] | None = None
    temperature: Annotated[float, _bounds("temperature")] | None = None
    top_p: Annotated[float, _bounds("top_p")] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="sample among the k likeliest tokens; 0 and -1: off"
    )
    min_p: Annotated[float, _bounds("min_p")] | None = None
    typical_p: Annotated[float, _bounds("typical_p")] | None = None
    repetition_penalty: Annotated[float, _bounds("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, _bounds("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _bounds("frequency_penalty")] | None = None
    min_tokens: Annotated[int, _bounds("min_new_tokens")] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: Literal[True] | None = None
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="keep only so many of the prompt's last tokens; -1: what fits"
    )
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="share cached prompts only with requests of the same salt and API key"
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(SamplingBody):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    )
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="unset: 16, as OpenAI has it; 0: nothing but the echo"
    )
    echo: bool | None = Field(None, description="begin the text with the prompt")
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Count | None = None
    add_special_tokens: bool | None = Field(
        None, description="false: the prompt begins as it is written, without the model's bos"
    )


class TextPart(Part):
    """A piece of a message's content."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.said is None:
            raise PydanticCustomError(
                "no_text", "a part of type {type} needs {type}", {**vars(self)}
            )
        return self

    @property
    def said(self) -> str | None:
        """The part's text."""
        return self.text if self.type == "text" else self.refusal


class CalledFunction(Part):
    """What the model called in an earlier turn; the arguments are JSON text."""

    name: str
    arguments: str | dict[str, Any]

    @model_validator(mode="after")
    def _is_json(self) -> Self:
        try:
            is_object = isinstance(self.parsed, dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise PydanticCustomError("arguments", "arguments must be JSON text of an object")
        return self

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as an object; none at all for an empty text."""
        if isinstance(self.arguments, dict):
            return self.arguments
        parsed: dict[str, Any] = json.loads(self.arguments or "{}")
        return parsed


class ToolCall(Part):
    """A call in an earlier turn."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: None = Field(None, description="the older form is refused: use tool_calls")

    @property
    def text(self) -> str:
        """The content; parts stand on lines of their own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.said or "" for part in self.content or ())

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("no_content", "a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("not_assistant", "only an assistant's message has tool_calls")
        return self


class JsonSchema(Part):
    """A schema for the whole answer; it is always kept to, `strict` or not."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """What the answer must be."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError("schema", "type json_schema, and no other, has a json_schema")
        return self


class Function(Part):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool; the arguments of a call that must be made always conform to its parameters."""

    type: Literal["function"]
    function: Function

    @property
    def shown(self) -> dict[str, Any]:
        """What a model is shown of it."""
        named = {name: value for name, value in self.function if name != "strict"}
        function = {name: value for name, value in named.items() if value is not None}
        return {"type": "function", "function": function}


class ChosenFunction(Part):
    """A tool by name."""

    name: str


class ToolChoice(Part):
    """The one tool that must be called."""

    type: Literal["function"] | None = None
    function: ChosenFunction


class TemplateFlags(BaseModel):
    """Switches that chat templates know; what a template does not mention has no effect."""

    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = None
    thinking: bool | None = None
    tools_in_user_message: bool | None = None


class ChatBody(SamplingBody):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = Field(
        None, description="the newer name of max_tokens; unset: what the context leaves"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateFlags | None = None

    @property
    def most_tokens(self) -> int | None:
        """How long the answer may be, under either name."""
        return self.max_completion_tokens or self.max_tokens


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    """Every response that is not a 200."""

    error: ErrorDetail
