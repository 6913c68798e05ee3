"""The meter of one template rendering: time, and the size of every value before it exists.

jinja2 computes with Python's own strings, lists and numbers, of which one step can make more than
the machine holds. Here each has a weight: a string its characters, a list or dict `MEMBER` more for
each member, all the way down. Nothing heavier than `MAX_WEIGHT` may come to be, so no single step
takes long, and between steps the meter looks at the clock.

Templates cannot change a list or dict (jinja2's immutable sandbox), so the weight of one, once
taken, stays true and is kept. Objects (macros, namespaces, generators) have no weight: they may be
handed on, but not put into lists, nor written out as text, which would also show memory addresses.
Where the meter sits in a template is `sandbox.py`.
"""

import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any, TypeVar

from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Undefined

MAX_WEIGHT = 16 * 2**20
"""Of one value, and of the whole output."""
MEMBER = 64
"""Weight of a place in a list or dict, and of any number."""
MAX_WORK = 16 * MAX_WEIGHT
"""Characters that all steps of a rendering may make together; strings may live on, so of memory."""
MAX_DEPTH = 64
"""Lists within lists."""
MAX_BITS = 4096
"""Of one number."""

_T = TypeVar("_T")
_VIEWS = (KeysView, ValuesView, ItemsView)


class LimitError(TemplateRuntimeError):
    """The template ran past one of the limits."""


class Meter:
    """What one rendering has used.

    Args:
        timeout_s: seconds of this thread's own processor time: a busy machine is no fault of a
            template, and templates cannot wait.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.thread_time() + timeout_s
        self._work = 0
        # By id; keeps the object as well, so that its id stays its own.
        self._known: dict[int, tuple[object, tuple[int, int]]] = {}

    def tick(self, work: int = 0) -> None:
        """Count a step that makes `work` characters, and look at the clock."""
        self._work += work
        if time.thread_time() > self._deadline:
            raise LimitError(f"ran longer than {self._timeout_s:g} s")
        if self._work > MAX_WORK:
            raise LimitError(f"made more than {MAX_WORK} characters on the way to its output")

    def made(self, value: _T) -> _T:
        """Pass on a value that a step has just made, once it is weighed and counted."""
        weight = self.weigh(value)
        self.tick(weight if isinstance(value, str) else 0)
        return value

    def weigh(self, value: object) -> int:
        """The weight of a value that is handed on."""
        return self.allow(self._measured(value)[0]) if isinstance(value, _DATA) else MEMBER

    def weigh_text(self, value: object) -> int:
        """The weight of a value that is about to become text; an object is refused."""
        if not isinstance(value, _DATA):
            raise TemplateRuntimeError(f"would print a {type(value).__name__}, which is not text")
        return self.allow(self._measured(value)[0])

    def allow(self, weight: int) -> int:
        """The same weight, unless a value of it would be too large."""
        if weight > MAX_WEIGHT:
            raise LimitError(f"would make a value of more than {MAX_WEIGHT} characters")
        return weight

    def allow_bits(self, bits: int) -> None:
        """Refuse a number of so many bits, if it would be too large."""
        if bits > MAX_BITS:
            raise LimitError(f"would make a number of more than {MAX_BITS} bits")

    def foresee(self, name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a filter or method whose result would be far larger than what it is given."""
        expected = _EXPECTED.get(name)
        if expected is None:
            return
        try:
            weight = expected(*args, **kwargs)
        except (TypeError, ValueError, AttributeError):
            return  # not its arguments; it will say itself what is wrong with them
        self.allow(weight)

    def foresee_product(self, left: Any, right: Any) -> None:
        """Refuse left * right, of numbers or of a number and something to repeat, if too large."""
        if isinstance(left, int) and isinstance(right, int):
            self.allow_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, int):
            self.allow(self.weigh(right) * max(left, 0))
        elif isinstance(right, int):
            self.allow(self.weigh(left) * max(right, 0))

    def foresee_power(self, base: Any, exponent: Any) -> None:
        """Refuse base ** exponent if too large."""
        if isinstance(base, int) and isinstance(exponent, int):
            self.allow_bits(base.bit_length() * max(exponent, 1))

    def _measured(self, value: Any) -> tuple[int, int]:
        """The weight of data, and how deep lists or dicts nest in it."""
        if isinstance(value, str):
            return len(value), 0
        if isinstance(value, int):
            self.allow_bits(value.bit_length())
        if isinstance(value, _ATOMS):
            return MEMBER, 0
        if not isinstance(value, _DATA):
            raise TemplateRuntimeError(f"puts a {type(value).__name__} into a list or dict")
        if id(value) in self._known:
            return self._known[id(value)][1]
        container: Any = value
        self.allow(MEMBER * len(container))
        members = [*value, *value.values()] if isinstance(value, dict) else list(container)
        parts = [self._measured(member) for member in members]
        weight = self.allow(MEMBER + sum(MEMBER + weight for weight, _ in parts))
        depth = 1 + max((depth for _, depth in parts), default=0)
        if depth > MAX_DEPTH:
            raise LimitError(f"nests lists or dicts deeper than {MAX_DEPTH}")
        self._known[id(value)] = value, (weight, depth)
        return weight, depth


def _replaced(value: object, old: str, new: str, count: int | None = None) -> int:
    text = str(value)
    times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    return len(text) + times * max(len(new) - len(old), 0)


def _split(text: str, sep: object = None, maxsplit: int = -1) -> int:
    pieces = sum(map(text.count, [sep] if isinstance(sep, str) else _WHITESPACE))
    return MEMBER * (pieces if maxsplit < 0 else min(pieces, maxsplit))


def _indented(text: str, width: int | str = 4, *_: object, **__: object) -> int:
    return len(text) + (len(width) if isinstance(width, str) else width) * text.count("\n")


def _rounded(value: object, precision: int = 0, *_: object, **__: object) -> int:
    return MAX_WEIGHT * abs(precision) // 16  # ten to this power is computed exactly: 16 at most


def _characters(items: object, *_: object, **__: object) -> int:
    return MEMBER * len(items) if isinstance(items, str) else 0  # one string becomes many


_ATOMS = (int, float, type(None), range, Undefined)
_DATA = (str, *_ATOMS, list, tuple, dict, *_VIEWS)
_WHITESPACE = [char for char in map(chr, range(0x3001)) if char.isspace()]
_EXPECTED: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "indent": _indented,
    "round": _rounded,
    **dict.fromkeys(["split", "rsplit", "splitlines"], _split),
    **dict.fromkeys(["list", "map", "select", "reject", "selectattr", "rejectattr"], _characters),
    **dict.fromkeys(["sort", "unique", "reverse", "groupby", "min", "max", "title"], _characters),
}
"""Filters and methods that can make much of little, and the weight to expect."""
