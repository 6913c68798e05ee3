"""Nested JSON that a chat template reads: the tools that are offered, and the calls made of them.

Their strings come from the same strangers as the messages do, so each is guarded like one
(`guard.py`): `texts` takes them out in order, `with_texts` puts them back. Numbers, true, false and
null cannot spell a special token, and stay.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from longwing.errors import RequestError
from longwing.tokenizer.chat import check_text

MAX_DEPTH = 48
"""Lists and objects within each other; the meter of a rendering stops at 64."""

_WORD = re.compile(r"[A-Za-z0-9_.-]+")


def texts(value: object, what: str, depth: int = 0) -> Iterator[str]:
    """The strings of nested JSON in order, each member's name before its value.

    Raises:
        RequestError: it nests too deeply, or holds what is not JSON or what UTF-8 cannot write.
    """
    if depth > MAX_DEPTH:
        raise RequestError(f"{what} nests deeper than {MAX_DEPTH} lists and objects")
    if isinstance(value, str):
        yield check_text(value, what)
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield check_text(name, what)
            yield from texts(member, what, depth + 1)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from texts(member, what, depth + 1)
    elif not (value is None or isinstance(value, bool | int | float)):
        raise RequestError(f"{what} holds a {type(value).__name__}, which is not JSON")


def with_texts(value: Any, replacements: Iterator[str]) -> Any:
    """The same value with other strings, in the order in which `texts` gave them."""
    if isinstance(value, str):
        return next(replacements)
    if isinstance(value, Mapping):
        return {next(replacements): with_texts(member, replacements) for member in value.values()}
    if isinstance(value, list | tuple):
        return [with_texts(member, replacements) for member in value]
    return value


def is_word(text: str) -> bool:
    """Letters, digits, `_`, `.` and `-` only, as in the names that a template looks for.

    A special token has other characters, and cannot be put together from words without some text
    that has them, which is guarded.
    """
    return _WORD.fullmatch(text) is not None
