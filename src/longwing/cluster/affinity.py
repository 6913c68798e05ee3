"""Which replica a prompt should go to: one that has read its beginning, unless it is too busy.

Prompts are cut into blocks; a block's name is a hash of everything up to its end, so equal names
mean equal prefixes. `PrefixMap` remembers who read which block last. `ranked` orders replicas by
that and by their load: the reader first; then, for prompts nobody has read, rendezvous hashing, so
that fronts that know nothing of each other choose alike (Thaler and Ravishankar 1998), within
bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

BLOCK_LEN = 64
"""Tokens in a block."""

KEY_BLOCKS = 16
"""Blocks whose hash stands for a document that nobody has read: 1,024 tokens."""

MAX_BLOCKS = 2**18
"""Blocks a map remembers: 17 million tokens, about 40 MB."""

MIN_SHARE = 0.3
"""A replica that has read less than this part of a prompt is as good as any other: a system prompt
that all requests begin with must not send them all to one replica."""

MAX_OVERLOAD = 1.25
SLACK = 2
"""A replica is too busy with more requests than 1.25 times the mean and two."""


def block_names(prompt_ids: Sequence[int]) -> list[bytes]:
    """A name for each whole block of a prompt, and for the prompt itself if it is shorter than one.

    Each name depends on all tokens up to the block's end.
    """
    digest = blake2b(digest_size=16)
    names: list[bytes] = []
    for start in range(0, max(len(prompt_ids) - BLOCK_LEN + 1, 1), BLOCK_LEN):
        digest.update(array("I", prompt_ids[start : start + BLOCK_LEN]).tobytes())
        names.append(digest.digest())
    return names


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What a request would like; plain data, because it travels.

    Attributes:
        reader: the replica that has read most of its prompt, if enough.
        key: stands for its document.
        loads: requests at work, by replica; one that is not named has none.
        avoid: replicas that failed this request.
    """

    reader: str | None = None
    key: bytes = b""
    loads: Mapping[str, int] = field(default_factory=dict)
    avoid: frozenset[str] = frozenset()


def ranked(replicas: Iterable[str], wish: Preference) -> list[str]:
    """All replicas, the one to try first in front."""
    names = list(replicas)
    loads = {name: wish.loads.get(name, 0) for name in names}
    limit = MAX_OVERLOAD * sum(loads.values()) / max(len(names), 1) + SLACK

    def order(name: str) -> tuple[bool, bool, bool, int, bytes]:
        busy = loads[name] > limit
        weight = blake2b(wish.key, key=name.encode()[-64:], digest_size=8).digest()
        return (name in wish.avoid, busy, name != wish.reader, loads[name] * busy, weight)

    return sorted(names, key=order)


class PrefixMap:
    """Who read which blocks, the last `max_blocks` of them."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._reader: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._reader)

    def learn(self, names: Sequence[bytes], replica: str) -> None:
        """`replica` has read a prompt with these blocks."""
        # Backwards, so that what is forgotten first is an end, not a beginning.
        for name in reversed(names):
            self._reader[name] = replica
            self._reader.move_to_end(name)
        while len(self._reader) > self._max_blocks:
            self._reader.popitem(last=False)

    def reader(self, names: Sequence[bytes]) -> str | None:
        """The replica that has read the most of a prompt, if that is MIN_SHARE of it."""
        for place in reversed(range(len(names))):
            found = self._reader.get(names[place])
            if found is not None:
                return found if place + 1 >= MIN_SHARE * len(names) else None
        return None

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        for name in [name for name, reader in self._reader.items() if reader == replica]:
            del self._reader[name]


def document_key(names: Sequence[bytes]) -> bytes:
    """What stands for a prompt's document while nobody has read it."""
    return names[min(len(names), KEY_BLOCKS) - 1]
