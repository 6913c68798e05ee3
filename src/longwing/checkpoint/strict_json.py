"""JSON written by strangers: one object out of bounded bytes, or an error that says why not.

Holds the parsing alone; where the bytes may come from is `paths.py`, what the fields mean is the
caller's. Python's parser accepts more than JSON does: it keeps the last of two equal keys (so two
readers of one file can see two different settings), and reads NaN and Infinity. Neither passes
here.
"""

import json
import reprlib
from typing import Never

from longwing.errors import CheckpointError


def parse_object(
    raw: bytes | bytearray, file: str, error: type[CheckpointError] = CheckpointError
) -> dict[str, object]:
    """The JSON object in `raw`.

    Args:
        raw: the whole file; bounding its size is the caller's duty.
        file: its name, for messages.
        error: the class to raise; `ConfigError` for settings files.

    Raises:
        CheckpointError: (or `error`) not UTF-8, not JSON, a key given twice, NaN or Infinity,
            nested past the parser's depth, a number of more than 4300 digits, or not an object.
    """
    try:
        parsed = json.loads(
            str(raw, "utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as fault:
        raise error(f"byte {fault.start} is not UTF-8", file=file) from None
    except RecursionError:
        raise error("JSON is nested too deeply", file=file) from None
    except ValueError as fault:
        raise error(f"not valid JSON: {fault}", file=file) from None
    if not isinstance(parsed, dict):
        raise error(f"holds {show(parsed)}, not a JSON object", file=file)
    return parsed


def show(value: object) -> str:
    """A value for a message: escaped, and at most 100 characters, since a stranger chose it."""
    text = "null" if value is None else _SHORT.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# repr() alone would take time and memory, or recurse, with the size of what it is shown.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 10, 10
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A dict of the pairs; ValueError if a key comes twice."""
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {show(key)} is given twice")
        seen.add(key)
    return result


def _refuse_constant(word: str) -> Never:
    raise ValueError(f"{word} is not a JSON number")
