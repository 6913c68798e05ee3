"""From a TGI body to requests for the engine; what is wrong is said in TGI's words and order.

Clients compare these texts, so they are TGI's to the letter, and the first fault in TGI's order is
the one reported. Two things TGI takes are refused here, because they would change nothing without
a word: `watermark`, and an `adapter_id` that is not served.

An answer is sampled if `do_sample` is set or any of temperature, top_k, top_p and typical_p departs
from its neutral value, as in TGI; then temperature is 1 unless given. For `best_of`, any of them
that is set counts.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from longwing.engine.request import Grammar, Request, SamplingParams
from longwing.errors import GrammarError
from longwing.server.faults import TgiFault
from longwing.server.options import ServerOptions
from longwing.server.serving import Serving, encode
from longwing.server.tgi_schema import (
    GenerateParameters,
    GenerateRequest,
    JsonGrammar,
    RegexGrammar,
    SchemaGrammar,
)

DEFAULT_MAX_NEW = 20
MAX_SCHEMA_BYTES = 64 * 1024
MAX_REGEX_LEN = 8 * 1024


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A body that was found valid.

    Attributes:
        requests: as many as `best_of`.
        parameters: the body's.
        inputs: the prompt's text, for `return_full_text` and the headers.
        sampled: whether a seed was used.
        seconds: what it took.
    """

    requests: tuple[Request, ...]
    parameters: GenerateParameters
    inputs: str
    sampled: bool
    seconds: float

    @property
    def prompt_len(self) -> int:
        """Tokens in the prompt, after `truncate`."""
        return len(self.requests[0].prompt_ids)

    @property
    def prefix(self) -> str:
        """What the text begins with."""
        return self.inputs if self.parameters.return_full_text else ""


async def prepare(
    serving: Serving, body: GenerateRequest, *, salt: str, streaming: bool
) -> Prepared:
    """Check a body, tokenise its prompt, and make its requests.

    Raises:
        TgiFault: the first thing that is wrong, in TGI's order.
        RequestError: something TGI does not know of: a text that is not UTF-8, a setting out of
            longwing's own bounds.
    """
    started = time.monotonic()
    asked = body.parameters or GenerateParameters.model_validate({})
    if streaming:
        _check_streaming(asked)
    _check_parameters(asked, serving.options)
    if not body.inputs:
        raise invalid("`inputs` cannot be empty")
    limit = serving.max_input_len
    if asked.truncate is not None and not 0 < asked.truncate <= limit:
        raise invalid(
            f"`truncate` must be strictly positive and less than {limit}. Given: {asked.truncate}"
        )
    ids = await encode(serving, body.inputs)
    if asked.truncate is not None:
        ids = ids[-asked.truncate :]
    max_new = DEFAULT_MAX_NEW if asked.max_new_tokens is None else asked.max_new_tokens
    _check_lengths(serving, len(ids), max_new)
    grammar = _grammar(asked, serving.options)
    _check_supported(asked, serving)
    params, sampled = _sampling(asked, max_new)
    request = Request(
        prompt_ids=tuple(ids),
        params=params,
        grammar=grammar,
        salt=salt,
        adapter=asked.adapter_id or "",
        include_stop=True,
        prompt_logprobs=0 if asked.decoder_input_details else None,
    )
    return Prepared(
        requests=(request,) * (asked.best_of or 1),
        parameters=asked,
        inputs=body.inputs,
        sampled=sampled,
        seconds=time.monotonic() - started,
    )


def invalid(message: str) -> TgiFault:
    """TGI's error for a request that is wrong."""
    return TgiFault("validation", f"Input validation error: {message}")


def _check_streaming(asked: GenerateParameters) -> None:
    if asked.best_of not in (None, 1):
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    if asked.decoder_input_details:
        raise invalid("`decoder_input_details` == true is not supported when streaming tokens")


def _check_parameters(asked: GenerateParameters, options: ServerOptions) -> None:
    """What can be said without the prompt, in TGI's order."""
    best_of = 1 if asked.best_of is None else asked.best_of
    if not 0 < best_of <= options.max_best_of:
        raise invalid(f"`best_of` must be > 0 and <= {options.max_best_of}. Given: {best_of}")
    samples = bool(asked.do_sample) or any(
        value is not None
        for value in (asked.temperature, asked.top_k, asked.top_p, asked.typical_p)
    )
    if best_of > 1 and not samples:
        raise invalid("you must use sampling when `best_of` is > 1")
    _check_numbers(asked)
    if asked.max_new_tokens == 0:
        raise invalid("`max_new_tokens` must be strictly positive")
    if len(asked.stop or ()) > options.max_stop_sequences:
        raise invalid(
            f"`stop` supports up to {options.max_stop_sequences} stop sequences. "
            f"Given: {len(asked.stop or ())}"
        )
    if best_of > 1 and asked.seed is not None:
        raise invalid("`seed` must not be set when `best_of` > 1")
    if (asked.top_n_tokens or 0) > options.max_top_n_tokens:
        raise invalid(
            f"`top_n_tokens` must be >= 0 and <= {options.max_top_n_tokens}. "
            f"Given: {asked.top_n_tokens}"
        )


def _check_numbers(asked: GenerateParameters) -> None:
    if asked.temperature is not None and asked.temperature <= 0:
        raise invalid("`temperature` must be strictly positive")
    if asked.repetition_penalty is not None and asked.repetition_penalty <= 0:
        raise invalid("`repetition_penalty` must be strictly positive")
    if asked.frequency_penalty is not None and not -2 <= asked.frequency_penalty <= 2:
        raise invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
    if asked.top_p is not None and not 0 < asked.top_p < 1:
        raise invalid("`top_p` must be > 0.0 and < 1.0")
    if asked.typical_p is not None and not 0 < asked.typical_p < 1:
        raise invalid("`typical_p` must be > 0.0 and < 1.0")
    if asked.top_k is not None and asked.top_k <= 0:
        raise invalid("`top_k` must be strictly positive")


def _check_lengths(serving: Serving, prompt_len: int, max_new: int) -> None:
    """The sum before the prompt alone, as TGI does."""
    if not prompt_len:
        raise invalid("`inputs` cannot be empty")
    if prompt_len + max_new > serving.max_total_len:
        raise invalid(
            f"`inputs` tokens + `max_new_tokens` must be <= {serving.max_total_len}. "
            f"Given: {prompt_len} `inputs` tokens and {max_new} `max_new_tokens`"
        )
    if prompt_len > serving.max_input_len:
        raise invalid(
            f"`inputs` must have less than {serving.max_input_len} tokens. Given: {prompt_len}"
        )


def _check_supported(asked: GenerateParameters, serving: Serving) -> None:
    if asked.decoder_input_details and not serving.options.enable_prefill_logprobs:
        raise invalid(
            "`decoder_input_details` == true needs a server with --enable-prefill-logprobs"
        )
    if asked.watermark:
        raise invalid("`watermark` == true is not supported")
    if asked.adapter_id is not None and asked.adapter_id not in serving.adapters:
        if not serving.adapters:
            raise invalid("`adapter_id` is not supported: this server has no adapters")
        raise invalid(
            f"`adapter_id` must be one of {', '.join(serving.adapters)}. "
            f"Given: {asked.adapter_id[:100]}"
        )


def _sampling(asked: GenerateParameters, max_new: int) -> tuple[SamplingParams, bool]:
    """The engine's settings, and whether anything is drawn."""
    sampled = bool(
        asked.do_sample
        or asked.temperature not in (None, 1)
        or asked.top_k
        or asked.top_p
        or asked.typical_p
    )
    given = {
        "top_k": asked.top_k,
        "top_p": asked.top_p,
        "typical_p": asked.typical_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "seed": asked.seed if sampled else None,
    }
    params = SamplingParams(
        max_new_tokens=max_new,
        temperature=(1.0 if asked.temperature is None else asked.temperature) if sampled else 0.0,
        stop=tuple(asked.stop or ()),
        logprobs=asked.top_n_tokens or 0,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    return params, sampled


def _grammar(asked: GenerateParameters, options: ServerOptions) -> Grammar | None:
    if asked.grammar is None:
        return None
    if options.disable_grammar_support:
        raise invalid("grammar is not supported")
    match asked.grammar:
        case RegexGrammar(value=pattern):
            if len(pattern) > MAX_REGEX_LEN:
                raise GrammarError(
                    f"a regex of {len(pattern)} characters; at most {MAX_REGEX_LEN} are taken"
                )
            return Grammar(kind="regex", source=pattern)
        case SchemaGrammar(value=named):
            return _json_grammar(named.schema_)
        case JsonGrammar(value=value):
            return _json_grammar(value)


def _json_grammar(value: object) -> Grammar:
    """A schema, which may also be given as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise GrammarError(error.msg[:200]) from None
    if not isinstance(value, Mapping):
        raise invalid("grammar is not supported")
    if not isinstance(value.get("properties"), Mapping):
        raise GrammarError("Grammar must have a 'properties' field")
    source = orjson.dumps(value)
    if len(source) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"a schema of {len(source)} bytes; at most {MAX_SCHEMA_BYTES} are taken")
    return Grammar(kind="json_schema", source=source.decode())
