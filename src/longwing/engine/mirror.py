"""A step's batch as plain data and back, for processes that run the same steps. No torch.

The scheduler lives in one process only. The others need of a batch what `Runner` reads: tokens,
positions, pages, and the key that says rung and adapter. Pages are most of it and hardly change, so
only those that are new travel.

The one idea: the scheduler only appends to a sequence's list of pages, or takes a new list. So
place s of a batch is the same list as in the step before, with something appended, or another one;
and what `MirrorReader` makes has the same property, on which `graphs.py` relies.
"""

from collections.abc import Sequence as Many
from typing import Any

from longwing.engine.cache import CacheKey
from longwing.engine.sequence import Sequence, Work


class MirrorWriter:
    """Writes batches, each with what is new since the last."""

    def __init__(self) -> None:
        self._told: list[tuple[list[int], int]] = []

    def write(self, batch: Many[Work]) -> list[dict[str, Any]]:
        """A batch as plain data; every batch must be written, in order."""
        return [self._work(place, work) for place, work in enumerate(batch)]

    def _work(self, place: int, work: Work) -> dict[str, Any]:
        if place == len(self._told):
            self._told.append(([], 0))
        pages, key = work.sequence.pages, work.sequence.key
        known, num = self._told[place]
        wire: dict[str, Any] = {
            "start": work.start,
            "ids": list(work.token_ids),
            "drafts": work.num_drafts,
            "wants": work.wants_token,
        }
        if known is not pages:
            wire |= {"rung": key.rung, "adapter": key.adapter}
            num = 0
        wire["pages"] = pages[num:]
        self._told[place] = (pages, len(pages))
        return wire


class MirrorReader:
    """Reads what a `MirrorWriter` wrote."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def read(self, wire: Many[dict[str, Any]]) -> list[Work]:
        """The batch; its sequences have a key and pages, and neither a text nor a life."""
        return [self._work(place, item) for place, item in enumerate(wire)]

    def _work(self, place: int, wire: dict[str, Any]) -> Work:
        if "rung" in wire:
            key = CacheKey(salt="", rung=wire["rung"], adapter=wire["adapter"])
            sequence = Sequence(id=f"place {place}", prompt_ids=(), max_len=0, key=key)
            self._sequences[place : place + 1] = [sequence]
        sequence = self._sequences[place]
        sequence.pages += wire["pages"]
        return Work(
            sequence=sequence,
            start=wire["start"],
            token_ids=wire["ids"],
            num_drafts=wire["drafts"],
            wants_token=wire["wants"],
        )
