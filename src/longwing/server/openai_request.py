"""From a body to the engine's requests: the model asked for, the settings, the room in the context.

OpenAI's defaults are written in here (temperature 1), its limits are held here against the
operator's (`ServerOptions`) and the context's; types and bounds are `openai_schema.py`'s.
"""

from dataclasses import dataclass, replace

from starlette.requests import Request as HttpRequest

from longwing.engine.request import MAX_SEED, Grammar, Request, SamplingParams
from longwing.server.faults import OpenAIFault
from longwing.server.openai_refusals import WITHOUT_EFFECT, refusal
from longwing.server.openai_schema import ChatBody, SamplingBody
from longwing.server.serving import Serving, model_names


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt that fits.

    Attributes:
        ids: its tokens.
        max_new: tokens that the answer may have.
        num_dropped: tokens cut off its beginning, as the request asked for.
    """

    ids: tuple[int, ...]
    max_new: int
    num_dropped: int = 0


def adapter_of(serving: Serving, name: str | None) -> str:
    """The adapter that goes by a model's name; "" for the model itself, or if none is given.

    Raises:
        OpenAIFault: 404; nothing that is served is called so.
    """
    info = serving.service.info
    if name is None or name in model_names(serving.model_id):
        return ""
    if name in serving.adapters:
        return name
    if info is not None and name == info.name:
        return ""
    served = ", ".join(repr(known) for known in (serving.model_id, *serving.adapters))
    raise OpenAIFault(
        404,
        f"The model {name[:100]!r} does not exist; this server has {served}",
        "NotFoundError",
        "model",
        "model_not_found",
    )


def fitted(
    serving: Serving,
    body: SamplingBody,
    ids: list[int],
    *,
    wanted: int | None,
    default: int | None = None,
) -> Prompt:
    """The prompt with the room for its answer.

    Args:
        serving: the limits.
        body: may ask for the prompt to be cut to its last tokens.
        ids: the prompt's tokens.
        wanted: tokens that the answer is to have; None is `default`, or less if less fits.
        default: None is all that the context leaves.

    Raises:
        OpenAIFault: 400; the prompt is empty, or does not fit with its answer.
    """
    room = serving.max_total_len
    kept = ids
    if body.truncate_prompt_tokens is not None:
        longest = min(serving.max_input_len, room - (wanted or 1))
        keep = body.truncate_prompt_tokens if body.truncate_prompt_tokens > 0 else longest
        if body.truncate_prompt_tokens == 0 or keep < 1:
            raise refusal("truncate_prompt_tokens: leaves no prompt", "truncate_prompt_tokens")
        kept = ids[-keep:]
    if not kept:
        raise refusal("the prompt is empty; give at least one token", _prompt_field(body))
    left = room - len(kept)
    if len(kept) > serving.max_input_len or left < (wanted or 1):
        raise _too_long(serving, len(kept), wanted, _prompt_field(body))
    return Prompt(
        ids=tuple(kept),
        max_new=wanted or min(left, default or left),
        num_dropped=len(ids) - len(kept),
    )


def sampling(
    serving: Serving, body: SamplingBody, max_new: int, *, logprobs: int | None
) -> SamplingParams:
    """The settings of one answer.

    Raises:
        OpenAIFault: 400; more stop strings than the operator allows, or an answer that would have
            to be longer than it may be.
    """
    most = serving.options.max_stop_sequences
    if len(body.stops) > most:
        raise refusal(f"stop: has {len(body.stops)} strings; the limit is {most}", "stop")
    if (body.min_tokens or 0) > max_new:
        raise refusal(
            f"min_tokens: is {body.min_tokens}, but the answer may have {max_new} tokens",
            "min_tokens",
        )
    return SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_k=max(body.top_k or 0, 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        typical_p=_or(body.typical_p, 1.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        stop=body.stops,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def samples(
    http: HttpRequest,
    body: SamplingBody,
    prompt: Prompt,
    params: SamplingParams,
    *,
    adapter: str = "",
    grammar: Grammar | None = None,
    prompt_logprobs: int | None = None,
) -> list[Request]:
    """`n` requests of one prompt; the i-th has the seed `seed` + i."""
    salt = getattr(http.state, "salt", "")
    if body.cache_salt is not None:
        salt = f"{salt}/{body.cache_salt}"
    return [
        Request(
            prompt_ids=prompt.ids,
            params=_seeded(params, body.seed, place),
            grammar=grammar,
            salt=salt,
            adapter=adapter,
            include_stop=bool(body.include_stop_str_in_output),
            prompt_logprobs=prompt_logprobs,
        )
        for place in range(body.n or 1)
    ]


def headers_of(body: SamplingBody, request: Request, num_dropped: int) -> dict[str, str]:
    """What the answer does not say of itself: settings without effect, tokens cut off."""
    extra = body.model_extra or {}
    idle = [name for name in WITHOUT_EFFECT if extra.get(name) not in (None, 0, "auto", "default")]
    idle += request.params.without_effect
    headers = {"x-longwing-without-effect": ", ".join(idle)} if idle else {}
    if num_dropped:
        headers["x-longwing-truncated-tokens"] = str(num_dropped)
    return headers


def check_grammar(serving: Serving, grammar: Grammar | None) -> None:
    """Refuse grammars if the operator does.

    Raises:
        OpenAIFault: 400.
    """
    if grammar is not None and serving.options.disable_grammar_support:
        raise refusal("this server was started without support for grammars and schemas")


def _seeded(params: SamplingParams, seed: int | None, place: int) -> SamplingParams:
    """OpenAI's seeds are signed; ours are the same 64 bits without a sign."""
    return params if seed is None else replace(params, seed=(seed + place) & MAX_SEED)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _prompt_field(body: SamplingBody) -> str:
    return "messages" if isinstance(body, ChatBody) else "prompt"


def _too_long(serving: Serving, prompt_len: int, wanted: int | None, field: str) -> OpenAIFault:
    room, longest = serving.max_total_len, serving.max_input_len
    asked = f" and {wanted} for the answer" if wanted else ", which leaves too few for an answer"
    prompts = "" if longest == room - 1 else f", of which a prompt may have {longest}"
    return refusal(
        f"This model's maximum context length is {room} tokens{prompts}. This request has "
        f"{prompt_len} in the prompt{asked}. Shorten the prompt or the answer.",
        field,
        "context_length_exceeded",
    )
