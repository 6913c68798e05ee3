"""Rotary positions: settings, how people type them, frequencies, lengths and tables.

`config` has the settings, `words` their short form, `methods` the frequencies, `tables` the rest.

Left to others: rotating queries and keys with a table (`kernels`), and deciding how much context to
serve (`engine`).

The idea to know before reading on: some methods depend on the length L that is served. If L
followed the longest sequence of a batch, an answer would depend on its neighbours, and keys already
cached would carry rotations that no longer match. So L is chosen once per sequence, from prompt +
answer, rounded up to a published ladder of rungs, and holds for that sequence's life. Whoever
shares cached keys between sequences compares (RopeConfig, rung); both can be hashed.
"""

from longwing.rope.config import MEANING, RopeConfig
from longwing.rope.methods import METHODS, frequencies
from longwing.rope.tables import RotaryTables, explain, ladder, rung_for
from longwing.rope.words import check_rope, parse_rope

__all__ = [
    "MEANING",
    "METHODS",
    "RopeConfig",
    "RotaryTables",
    "check_rope",
    "explain",
    "frequencies",
    "ladder",
    "parse_rope",
    "rung_for",
]
