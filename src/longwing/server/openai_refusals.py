"""What is refused of a body, and in which words; every refusal is a 400 that names the field.

No setting is dropped without a word. What a field of a body meets is one of these:

- it is declared in `openai_schema.py`, and obeyed;
- it is in `REFUSED`: longwing knows what it means and cannot do it, so a value that asks for
  something is a 400 which says what to do instead (null, false, empty and the value that means
  "as usual" pass);
- it is in `WITHOUT_EFFECT`: it cannot change the answer, only when it comes, and requests are
  served in the order in which they come; the header x-longwing-without-effect names it;
- it is unknown, or a label of the caller's (`user`, `metadata`), and ignored: SDKs send fields of
  tomorrow, and a client must not break on them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from longwing.server.faults import OpenAIFault
from longwing.server.openai_schema import MAX_NAME, SamplingBody

_GUIDED = "use response_format or structured_outputs"
REFUSED: Mapping[str, str] = {
    "suffix": "longwing does not fill in; put both parts into the prompt",
    "logit_bias": "longwing cannot bias single tokens; use structured_outputs to rule text out",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "longwing reads and writes text only",
    "modalities": "longwing reads and writes text only",
    "prediction": "longwing guesses ahead by itself",
    "web_search_options": "longwing does not search the web",
    "reasoning_effort": "use chat_template_kwargs, if the model's template knows a switch for it",
    "verbosity": "say in a message how long the answer should be",
    "store": "longwing stores nothing",
    "chat_template": "templates come with the model, never with a request",
    "documents": "put documents into a message",
    "tool_prompt": "tools are described by the model's template",
    "prompt_embeds": "give the prompt as text or token ids",
    "use_beam_search": "longwing samples, or takes the likeliest token at temperature 0",
    "length_penalty": "it belongs to beam search",
    "early_stopping": "it belongs to beam search",
    "bad_words": "use structured_outputs to rule text out",
    "allowed_token_ids": "use structured_outputs",
    "logits_processors": "no code comes with a request",
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "grammar": _GUIDED,
    "return_tokens_as_token_ids": "ask for logprobs, which name each token by its text",
    "return_token_ids": "use /tokenize",
    "response_format": "use structured_outputs, or /v1/chat/completions",
    "tools": "use /v1/chat/completions",
    "messages": "use /v1/chat/completions",
    "prompt": "use /v1/completions",
    "echo": "a chat's prompt is not repeated",
    "best_of": "ask for n answers and choose among them",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "adapter_id": "the server runs the model it was started with",
}
"""Fields that longwing knows and cannot obey where a body does not declare them; and the remedy."""

_AS_USUAL: Mapping[str, Sequence[Any]] = {
    "modalities": (["text"],),
    "function_call": ("none",),
    "length_penalty": (1, 1.0),
    "best_of": (1,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
}
"""Values by which a refused field asks for nothing; None, False and what is empty always do so."""

WITHOUT_EFFECT = ("priority", "service_tier")
"""Fields about when an answer comes, not what it is."""

Body = TypeVar("Body", bound=SamplingBody)


def read(kind: type[Body], raw: object) -> Body:
    """The body that a JSON value describes.

    Raises:
        OpenAIFault: 400; `param` is the field at fault.
    """
    try:
        body = kind.model_validate(raw)
    except ValidationError as fault:
        raise invalid(fault.errors(include_url=False, include_input=False)) from None
    refuse_unsupported(body)
    return body


def refuse_unsupported(body: SamplingBody) -> None:
    """Hold a body's further fields against `REFUSED`.

    Raises:
        OpenAIFault: 400, with the remedy.
    """
    for name, value in (body.model_extra or {}).items():
        usual = [None, False, "", [], {}, *_AS_USUAL.get(name, ())]
        # by type as well: 0 and 1 are not False and True here
        asks = all(type(value) is not type(one) or value != one for one in usual)
        if name in REFUSED and asks:
            raise refusal(f"{name} is not supported: {REFUSED[name]}", name)


def refusal(message: str, param: str | None = None, code: str | None = None) -> OpenAIFault:
    """A 400 that says what is wrong with which field."""
    return OpenAIFault(400, message, "BadRequestError", param, code)


def invalid(errors: Iterable[Mapping[str, Any]]) -> OpenAIFault:
    """What pydantic found wrong, as a 400 about the first field at fault.

    Args:
        errors: as `ValidationError.errors` or `RequestValidationError.errors` give them.
    """
    found = [(_place(error.get("loc", ())), str(error.get("msg", ""))) for error in errors]
    first = found[0][0] if found else ""
    if not first:
        return refusal(found[0][1] if found else "the body is not valid")
    # Where a field may be of several types, each type has its own complaint; the deepest one is
    # about the type that was meant.
    same = [(place, reason) for place, reason in found if f"{place}.".startswith(f"{first}.")]
    field = max((place for place, _ in same), key=lambda place: place.count("."))
    reasons = dict.fromkeys(reason for place, reason in same if place == field)
    return refusal(f"{field}: {'; or '.join(reasons)}", field)


def _place(loc: Iterable[int | str]) -> str:
    """messages.0.content, without the names of types that pydantic adds in a choice of types."""
    parts = [str(part) for part in loc if part != "body"]
    return ".".join(
        part[:MAX_NAME]
        for part in parts
        if part.isdecimal() or (part.isidentifier() and part not in _TYPES)
    )


_TYPES = frozenset(["str", "dict", "ToolChoice"])
