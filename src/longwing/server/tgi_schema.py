"""The bodies of TGI's API: what comes in, as types; what goes out, for the API's description.

Types are as strict as TGI's own (Rust's serde): "1" is no integer and `true` is none either, 5.0 is
no integer but 5 is a number, integers have their width. null means the same as a field left out,
and unknown fields are ignored; both because clients send them (`temperature: null`, `use_cache`).
What a value may be is `tgi_validation.py`, in TGI's words and order.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from longwing.engine.request import MAX_SEED

_I32, _U32, _USIZE = 2**31 - 1, 2**32 - 1, 2**63 - 1

U32 = Annotated[int, Field(ge=0, le=_U32)]
USize = Annotated[int, Field(ge=0, le=_USIZE)]
I32 = Annotated[int, Field(ge=-_I32 - 1, le=_I32)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class JsonGrammar(_Body):
    """An answer that is JSON of this schema."""

    type: Literal["json"]
    value: Any = Field(description="A JSON schema, as an object or as text.")


class RegexGrammar(_Body):
    """An answer that matches this regular expression as a whole."""

    type: Literal["regex"]
    value: str


class NamedSchema(_Body):
    """A schema with a name, as OpenAI has it."""

    name: str | None = None
    schema_: Any = Field(alias="schema")


class SchemaGrammar(_Body):
    """An answer that is JSON of this schema."""

    type: Literal["json_schema"]
    value: NamedSchema


class GenerateParameters(_Body):
    """The settings of an answer."""

    best_of: USize | None = Field(None, description="Generate so many, return the likeliest.")
    temperature: float | None = Field(None, description="Above 0. 1: the model's distribution.")
    repetition_penalty: float | None = Field(None, description="Above 0. 1: none.")
    frequency_penalty: float | None = Field(None, description="From -2 to 2. 0: none.")
    top_k: I32 | None = Field(None, description="Sample among the k likeliest tokens.")
    top_p: float | None = Field(None, description="Between 0 and 1, without both.")
    typical_p: float | None = Field(None, description="Between 0 and 1, without both.")
    do_sample: bool | None = Field(None, description="Sample, instead of the likeliest token.")
    max_new_tokens: U32 | None = Field(None, description="Tokens to generate, at most; 20.")
    return_full_text: bool | None = Field(None, description="Begin the text with the prompt.")
    stop: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="End the text after one of these."
    )
    truncate: USize | None = Field(None, description="Read only so many last tokens of the prompt.")
    watermark: bool | None = Field(None, description="Not supported; only false.")
    details: bool | None = Field(None, description="Report the tokens, and why the text ended.")
    decoder_input_details: bool | None = Field(None, description="Report the prompt's tokens.")
    seed: Seed | None = Field(None, description="Same seed, same text.")
    top_n_tokens: U32 | None = Field(None, description="Report the n likeliest for each token.")
    grammar: JsonGrammar | RegexGrammar | SchemaGrammar | None = Field(
        None, discriminator="type", description="What the text must conform to."
    )
    adapter_id: str | None = Field(
        None, description="Answer with this adapter, of those that /info lists."
    )


class GenerateRequest(_Body):
    """A prompt and what is wanted of it."""

    inputs: str = Field(description="The prompt; special tokens in it are read as such.")
    parameters: GenerateParameters | None = None


class CompatGenerateRequest(GenerateRequest):
    """The same for `POST /`, which also streams."""

    stream: bool | None = None


class PrefillToken(BaseModel):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Token(PrefillToken):
    """A generated token."""

    special: bool


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class BestOfSequence(BaseModel):
    """One of the answers that were not the best."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class Details(BaseModel):
    """How an answer came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    """An answer."""

    generated_text: str
    details: Details | None = None


class ErrorResponse(BaseModel):
    """Whatever went wrong."""

    error: str
    error_type: str


class SimpleToken(BaseModel):
    """A token of a text, and the characters it stands for."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(BaseModel):
    """A conversation as the model reads it."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(BaseModel):
    """What is served: the fields of TGI 1.0.3 and of TGI 3, the RoPE ladder, and the adapters."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_length: int
    max_input_tokens: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int | None
    max_waiting_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    architecture: str
    quantization: str
    rope_method: str
    rope_rungs: list[int]
    adapters: list[str]
