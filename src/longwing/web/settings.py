"""From a body's fields to engine options: the page may set these, within the operator's limits."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from longwing.engine.options import EngineOptions
from longwing.errors import ConfigError, RequestError
from longwing.models import DTYPES
from longwing.plan import format_size, parse_context, parse_size
from longwing.rope import METHODS, check_rope
from longwing.server.options import ServerOptions
from longwing.web.bodies import LoadBody

_PLAIN = ("kv_dtype", "dtype", "device", "cpu_weights", "prefix_cache")
_WHOLE = ("max_batch_tokens", "max_beside_tokens", "max_sequences", "max_draft", "num_pages")
_OF_ONE_MODEL: Mapping[str, Any] = {
    "context": None,
    "rope": None,
    "num_pages": None,
    "cache_tokens": None,
    "adapters": (),
}
"""Fields that the operator set for the model they started with, not for any other."""


def rope_words(body: LoadBody) -> str | None:
    """The body's RoPE settings as `--rope` takes them; None for the model's own.

    Raises:
        ConfigError: they say the same twice, or what no model could be loaded with.
    """
    parts = {name: getattr(body, f"rope_{name}") for name in ("factor", "theta", "alpha")}
    given = [f"{name}={value:.17g}" for name, value in parts.items() if value is not None]
    if body.rope_method is not None:
        if body.rope_method not in METHODS:
            raise ConfigError(
                f'rope_method "{body.rope_method}" is not one of {", ".join(METHODS)}'
            )
        given.insert(0, body.rope_method)
    if not given:
        words = body.rope
    elif body.rope is not None:
        raise ConfigError("rope and rope_method, rope_factor… say the same twice; give one")
    else:
        words = ",".join(given)
    if words is not None:
        check_rope(words)
    return words


def engine_options(body: LoadBody, operator: EngineOptions, server: ServerOptions) -> EngineOptions:
    """How to load what the body asks for.

    Args:
        body: the page's wishes.
        operator: what the server was started with: what the body does not set stays, but for what
            was meant for another model.
        server: its limits.

    Raises:
        RequestError, ConfigError: a value that cannot be, or is beyond the operator's limits.
    """
    given = {name: getattr(body, name) for name in (*_PLAIN, *_WHOLE)}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("dtype", "auto") not in ("auto", *DTYPES):
        raise RequestError(f'dtype "{body.dtype}" is not one of auto, {", ".join(DTYPES)}')
    context = tokens(body.context)
    if context is not None and context > (server.max_total_tokens or context):
        raise ConfigError(
            f"a context of {context:,} tokens is above the {server.max_total_tokens:,} that the "
            "server was started for (--max-total-tokens)"
        )
    memory = operator.memory if body.memory is None else num_bytes(body.memory)
    if memory is not None and memory > (operator.memory or memory):
        raise ConfigError(
            f"memory of {format_size(memory)} is above the {format_size(operator.memory or 0)} "
            "that the server was started with (--memory)"
        )
    fresh = replace(operator, **_OF_ONE_MODEL)
    return replace(fresh, context=context, rope=rope_words(body), memory=memory, **changes)


def tokens(context: int | str | None) -> int | None:
    """A length: 24576, or words such as "24k"."""
    return parse_context(context) if isinstance(context, str) else context


def num_bytes(size: int | str) -> int:
    """A size: bytes, or words such as "24GiB"."""
    return parse_size(size) if isinstance(size, str) else size


def shown(options: EngineOptions) -> dict[str, object]:
    """What of the options is not default, as a body that would load the same again."""
    allowed = (*LoadBody.model_fields, "rope")
    return {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if item.name in allowed and getattr(options, item.name) != item.default
    }
