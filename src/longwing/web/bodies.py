"""Bodies of the page's requests: every field is one of these, or is refused by name."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longwing.server.faults import TgiFault

Word = Annotated[str, Field(max_length=200)]
Name = Annotated[str, Field(max_length=500)]
Count = Annotated[int, Field(ge=1, le=2**30)]
Tokens = Count | Word
Bytes = Annotated[int, Field(ge=1, le=2**60)] | Word
Seconds = Annotated[float, Field(ge=0, le=3600)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A JSON object; null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Nothing(Body):
    """No field at all."""


class LoadBody(Body):
    """A model, and how to load it: all that the page may set.

    `rope` is `--rope`'s words; `rope_method` and its numbers are the same in parts.
    """

    model: Name
    context: Tokens | None = None
    rope: Word | None = None
    rope_method: Word | None = None
    rope_factor: Number | None = None
    rope_theta: Number | None = None
    rope_alpha: Number | None = None
    kv_dtype: Word | None = None
    memory: Bytes | None = None
    dtype: Word | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] | None = None
    cpu_weights: Word | None = None
    prefix_cache: bool | None = None
    max_batch_tokens: Count | None = None
    max_beside_tokens: Count | None = None
    max_sequences: Count | None = None
    max_draft: Annotated[int, Field(ge=0, le=64)] | None = None
    num_pages: Count | None = None
    drain_s: Seconds | None = None


class PlanBody(LoadBody):
    """As for loading; for how many sequences at once, and perhaps on a card one does not have."""

    card: Word | None = None
    batch: Annotated[int, Field(ge=1, le=4096)] = 1


class UnloadBody(Body):
    """How long answers at work may take to finish."""

    drain_s: Seconds | None = None


class DownloadBody(Body):
    """What to pull: owner/name[@revision], and patterns of weight files."""

    name: Name
    include: Annotated[list[Word], Field(max_length=20)] = []


class DownloadName(Body):
    """Which download."""

    name: Name


class Turn(Body):
    """A message of a conversation; its length is the request's limit."""

    role: Word
    content: str


class PromptBody(Body):
    """A conversation, and the template that makes a prompt of it; None: the model's own."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000)]
    template: Word | None = None
    continue_final: bool = False


class RunBody(Body):
    """An evaluation; see `longwing eval --help`."""

    tasks: Annotated[list[Word], Field(min_length=1, max_length=4)]
    lengths: Annotated[list[Tokens], Field(max_length=12)] = []
    depths: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(max_length=21)] = []
    cases: Annotated[int, Field(ge=1, le=200)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    template: Annotated[str, Field(pattern=r"^(auto|plain)$")] = "auto"
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    name: Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f]*$")] = ""


class ReportBody(Body):
    """Runs to put side by side."""

    runs: Annotated[list[Name], Field(min_length=1, max_length=8)]


B = TypeVar("B", bound=Body)


def read(kind: type[B], raw: object) -> B:
    """The body that a JSON value describes.

    Raises:
        TgiFault: 422; names every field that is not allowed, or the first that is at fault.
    """
    if not isinstance(raw, dict):
        raise invalid("the body is not a JSON object")
    given: dict[str, Any] = {name: value for name, value in raw.items() if value is not None}
    unknown = [name[:100] for name in given if name not in kind.model_fields]
    if unknown:
        allowed = ", ".join(kind.model_fields) or "none"
        raise invalid(f"{', '.join(unknown[:10])}: not to be set here; options are {allowed}")
    try:
        return kind.model_validate(given)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        raise invalid(f"{where}: {first['msg']}"[:300]) from None


def invalid(message: str) -> TgiFault:
    """A 422 with this sentence."""
    return TgiFault("validation", message)
