"""Strict reading of a settings object: each field by name, type and bounds, and what was left over.

A JSON settings file is untrusted input. `Fields` hands out only what it is asked for by name, so a
field that names code, or an internal switch of another library, cannot be reached by accident.
"""

import math
from collections.abc import Collection, Mapping

from longwing.errors import ConfigError

MISSING = object()


class Fields:
    """The fields of one JSON object, read strictly.

    Every reader takes the names a field has gone by, newest first. A field given under two names
    must say the same under both. null counts as absent. Without a default an absent field is an
    error.

    Args:
        raw: the JSON object.
        file: its file name, for messages.
    """

    def __init__(self, raw: Mapping[str, object], file: str) -> None:
        self._raw = raw
        self.file = file
        self._read: set[str] = set()

    def error(self, name: str, reason: str, remedy: str = "") -> ConfigError:
        """A ConfigError that names this file and field."""
        return ConfigError(f'"{name}" {reason}', file=self.file, remedy=remedy)

    def integer(self, *names: str, low: int, high: int, default: object = MISSING) -> int | None:
        """A whole number in [low, high]; the default when absent."""
        name, value = self._find(names)
        if value is None:
            return self._default(names, default)  # type: ignore[return-value]
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, f"is {_show(value)}, which is not a whole number")
        if not low <= value <= high:
            raise self.error(name, f"is {_show(value)}, outside {low} to {high}")
        return value

    def count(self, *names: str, high: int, low: int = 1, default: object = MISSING) -> int:
        """A whole number that must be there or have a default."""
        value = self.integer(*names, low=low, high=high, default=default)
        if value is None:
            raise self.error(names[0], "is null, but a whole number is needed")
        return value

    def number(self, *names: str, low: float, high: float, default: float) -> float:
        """A finite number in [low, high]."""
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, f"is {_show(value)}, which is not a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.error(name, f"is {_show(value)}, outside {low:g} to {high:g}")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """True or false."""
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"is {_show(value)}, which is neither true nor false")
        return value

    def choice(self, *names: str, choices: Collection[str], default: str | None = None) -> str:
        """One of a few words."""
        name, value = self._find(names)
        if value is None:
            if default is None:
                raise self.error(names[0], "is missing")
            return default
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, f"is {_show(value)}; known are {', '.join(sorted(choices))}")
        return value

    def ids(self, *names: str, high: int) -> tuple[int, ...]:
        """A token id or a list of them (at most 64), each below `high`; negative ones mean none."""
        name, value = self._find(names)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > 64:
            raise self.error(name, f"lists {len(values)} ids; at most 64 are accepted")
        ids = []
        for item in values:
            if not isinstance(item, int) or isinstance(item, bool) or item >= high:
                raise self.error(name, f"holds {_show(item)}, not a token id below {high}")
            ids.append(item)
        return tuple(item for item in ids if item >= 0)

    def words(self, name: str, *, choices: Collection[str], length: int) -> tuple[str, ...] | None:
        """A list of exactly `length` words out of `choices`, or None."""
        _, value = self._find((name,))
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            size = f"{len(value)} entries" if isinstance(value, list) else _show(value)
            raise self.error(name, f"is {size}; a list of {length} is needed")
        for item in value:
            if not isinstance(item, str) or item not in choices:
                raise self.error(name, f"holds {_show(item)}; known are {', '.join(choices)}")
        return tuple(value)

    def must_be(self, name: str, neutral: object, why: str) -> None:
        """Refuse a field that would change the arithmetic, unless it says nothing new."""
        _, value = self._find((name,))
        same_kind = isinstance(value, bool) is isinstance(neutral, bool)
        if value is not None and not (same_kind and value == neutral):
            raise self.error(name, f"is {_show(value)}, and {why}")

    def has(self, name: str) -> bool:
        """Whether the file states a field at all, be it as null."""
        return name in self._raw

    def skip(self, names: Collection[str]) -> None:
        """Count fields as known without reading them."""
        self._read.update(names)

    def left_over(self) -> tuple[str, ...]:
        """Names nobody asked for, sorted."""
        return tuple(sorted(str(name) for name in self._raw if name not in self._read))

    def _find(self, names: tuple[str, ...]) -> tuple[str, object]:
        """The first name present and its value; None when no name is, or all are null."""
        self._read.update(names)
        present = [(name, self._raw[name]) for name in names if self._raw.get(name) is not None]
        for name, value in present[1:]:
            if value != present[0][1]:
                first, value0 = present[0]
                raise self.error(name, f"is {_show(value)}, but {first} is {_show(value0)}")
        return present[0] if present else (names[0], None)

    def _default(self, names: tuple[str, ...], default: object) -> object:
        if default is MISSING:
            raise self.error(names[0], "is missing")
        return default


def _show(value: object) -> str:
    """A value for a message: its JSON-like form, cut to 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
