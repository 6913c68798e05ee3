"""Documents to rows: packed tight, never cut, in an order that a seed fixes for ever.

A row is one pass through the model: several documents end to end, each seen by itself. There is no
padding and no batch dimension; an optimiser step sums over several rows.

Shape key: T tokens of a row.

The one idea: best fit, longest first. Each document goes into the fullest row that still has room.
It wastes a few percent where documents are short beside the row, and rows of one epoch are as many
as of any other, because that depends on lengths alone; so a step number says which rows it takes.
"""

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longwing.errors import TuningError
from longwing.tune.records import Document


@dataclass(frozen=True, kw_only=True)
class Row:
    """Documents end to end, on the CPU.

    Attributes:
        tokens_T: (T,) int64.
        targets_T: (T,) int64, the token that follows each in its document; 0 where none does.
        weights_T: (T,) float32, what each target weighs in the loss.
        lengths: tokens of each document.
    """

    tokens_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    lengths: tuple[int, ...]


NOTHING = Row(
    tokens_T=torch.zeros(1, dtype=torch.int64),
    targets_T=torch.zeros(1, dtype=torch.int64),
    weights_T=torch.zeros(1),
    lengths=(1,),
)
"""A row that teaches nothing: for a process that has one row less than others, and keeps step."""


def pack(lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """Which documents share a row: lists of indices, by best fit, longest first.

    Cost: n log n in the number of documents.
    """
    rows: list[list[int]] = []
    # (room left, row), in order; the smallest room that suffices is found by bisection.
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([])
            left, row = row_len, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


class Schedule:
    """Which documents each step of a run takes.

    Args:
        documents: all of them.
        row_len: tokens of a row; no document is longer.
        batch: rows of a step.
        epochs: times to go through the data; a part of one is rounded up to a step.
        steps: steps to stop after; 0: as epochs say.
        prompt_weight: of tokens that are not learned, in the loss.
        seed: orders everything.

    Attributes:
        rows_per_epoch: rows that the data makes.
        num_steps: steps of the run.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        row_len: int,
        *,
        batch: int,
        epochs: float = 1.0,
        steps: int = 0,
        prompt_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        longest = max(len(document.tokens_T) for document in documents)
        if longest > row_len:
            raise TuningError(
                f"a row of {row_len:,} tokens does not hold a document of {longest:,}; give --row "
                f"{longest} or more"
            )
        self.documents = documents
        self.row_len = row_len
        self.batch = batch
        self.prompt_weight = prompt_weight
        self.seed = seed
        self.rows_per_epoch = len(pack(self._lengths(range(len(documents))), row_len))
        whole = math.ceil(self.rows_per_epoch * epochs - 1e-9)
        self.num_rows = steps * batch if steps else whole
        self.num_steps = steps or math.ceil(whole / batch)
        self._order = lru_cache(maxsize=2)(self._ordered)

    def rows_of(self, step: int) -> list[list[int]]:
        """The documents of each row of a step, the last of which may have fewer rows."""
        first = step * self.batch
        numbers = range(first, min(first + self.batch, self.num_rows))
        return [
            self._order(number // self.rows_per_epoch)[number % self.rows_per_epoch]
            for number in numbers
        ]

    def row(self, indices: Sequence[int]) -> Row:
        """Documents as a row."""
        chosen = [self.documents[index] for index in indices]
        tokens_T = torch.cat([document.tokens_T for document in chosen]).long()
        learned_T = torch.cat([document.learned_T for document in chosen])
        lengths = tuple(len(document.tokens_T) for document in chosen)
        weights_T = torch.where(learned_T, 1.0, self.prompt_weight).roll(-1)
        # The first token of the next document is not what follows the last of this one.
        weights_T[torch.tensor(lengths).cumsum(0) - 1] = 0.0
        return Row(
            tokens_T=tokens_T,
            targets_T=tokens_T.roll(-1).where(weights_T > 0, 0),
            weights_T=weights_T,
            lengths=lengths,
        )

    def _lengths(self, indices: Sequence[int]) -> list[int]:
        return [len(self.documents[index].tokens_T) for index in indices]

    def _ordered(self, epoch: int) -> list[list[int]]:
        """The rows of one epoch. Which documents of a length share a row changes with the epoch."""
        rng = random.Random(f"{self.seed} {epoch}")
        indices = list(range(len(self.documents)))
        rng.shuffle(indices)
        packed = pack(self._lengths(indices), self.row_len)
        rows = [[indices[place] for place in row] for row in packed]
        for row in rows:
            rng.shuffle(row)
        rng.shuffle(rows)
        return rows
