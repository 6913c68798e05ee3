"""What an operator may set of the server. Command-line options and docs are made from these fields.

Names are TGI's where TGI has the setting, so that a launcher's arguments mean the same here; the
defaults are longwing's own where TGI's would be unsafe (it listens to the whole network).
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from longwing.engine.request import MAX_LOGPROBS, MAX_STOP_STRINGS
from longwing.errors import ConfigError

MAX_HEADER_BYTES = 64 * 1024
"""Names and values of all header fields together."""
MAX_HEADER_FIELDS = 100


def _setting(default: Any, help_text: str, *, low: float = 0, high: float = math.inf) -> Any:
    """A field; a number must lie in [low, high]."""
    return field(default=default, metadata={"help": help_text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve, whatever the model.

    Raises:
        ConfigError: a value out of its bounds, or two that contradict each other.
    """

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the network.")
    port: int = _setting(8080, "Port to listen on; 0 takes a free one.", high=65535)
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={"help": "Answer only requests with one of these keys as Bearer token."},
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), "Further names in a request's Host header that are this server (behind a proxy)."
    )
    cors_allow_origin: tuple[str, ...] = _setting(
        (), "Origins whose pages may ask, such as https://example.org; * is any."
    )
    max_concurrent_requests: int = _setting(
        128, "Requests at work at once; more are refused at once.", low=1
    )
    max_best_of: int = _setting(2, "Answers to choose the best from, at most.", low=1, high=64)
    max_stop_sequences: int = _setting(
        4, "Stop strings in one request, at most.", high=MAX_STOP_STRINGS
    )
    max_top_n_tokens: int = _setting(
        5, "Likeliest tokens reported for each token, at most.", high=MAX_LOGPROBS
    )
    max_client_batch_size: int = _setting(4, "Prompts in one request, at most.", low=1)
    max_input_length: int | None = _setting(
        None, "Tokens in a prompt, at most; unset: all but one of the context.", low=1
    )
    max_total_tokens: int | None = _setting(
        None, "Tokens in a prompt and its answer, at most; unset: the context.", low=2
    )
    enable_prefill_logprobs: bool = _setting(
        False, "Report the log-probabilities of prompts; costs memory, and shows the whole prompt."
    )
    disable_grammar_support: bool = _setting(False, "Refuse grammars and schemas.")
    validation_workers: int = _setting(2, "Threads that tokenise prompts.", low=1, high=64)
    payload_limit: int = _setting(2_000_000, "Bytes in a request's body, at most.", low=1)
    body_timeout_s: float = _setting(
        60.0, "Seconds in which a request's headers, and then its body, must arrive.", low=0.001
    )
    keep_alive_s: float = _setting(
        15.0, "Seconds of silence in a stream after which a comment line is sent.", low=0.001
    )
    drain_s: float = _setting(90.0, "Seconds that answers get to finish once told to stop.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            low, high = setting.metadata["low"], setting.metadata["high"]
            if not low <= value <= high or value == math.inf:
                most = "" if high == math.inf else f" and at most {high}"
                raise ConfigError(f"`{setting.name}` must be at least {low}{most}, is {value}")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key must be printable ASCII without spaces")
        longest, total = self.max_input_length, self.max_total_tokens
        if longest is not None and total is not None and longest >= total:
            raise ConfigError(
                f"`max_input_length` must be < `max_total_tokens`. Given: {longest} and {total}"
            )
