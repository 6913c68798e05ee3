"""What prepare.py made, on a device, and what every kind of record is put together with.

The one idea: a record is a row of piece numbers. Everything about it, its words and values, their
order, where the needle lies, is chosen by tensor operations over all rows at once, and `spell`
turns rows of pieces into rows of tokens with one search. A Python loader fed an H200 one step in
two seconds; this feeds it a hundred a second.

Shape key: B rows, T tokens of a row, P pieces of a row, L slots of a record, Q questions.
"""

import json
import lzma
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

END = 11

# How much a token of an answer counts: what must be found, what is copied from the question, and
# what is the same in every answer.
FOUND, COPIED, FIXED = 1.0, 0.25, 0.1

DRAWN = ("spaced word", "bare word", "name", "topic", "sentence")
"""Pieces of which the last sixteenth is held out."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens to learn from.

    Attributes:
        tokens_BT: (B, T + 1) token ids; the model reads all but the last, and foretells all but the
            first.
        weights_BT: (B, T + 1) how much it matters that this token is foretold; 0: not at all.
        questions_BT: (B, T + 1) which question the token helps to answer, from 1; 0: none.
    """

    tokens_BT: Tensor
    weights_BT: Tensor
    questions_BT: Tensor

    def rows(self, start: int, step: int) -> "Batch":
        """Every `step`th row."""
        return Batch(
            tokens_BT=self.tokens_BT[start::step],
            weights_BT=self.weights_BT[start::step],
            questions_BT=self.questions_BT[start::step],
        )


class Corpus:
    """What prepare.py made, on a device.

    Args:
        file: corpus.safetensors.xz.
        device: where batches shall be made.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        packed = file.read_bytes()
        packed = lzma.decompress(packed) if file.suffix == ".xz" else packed
        header_len = int.from_bytes(packed[:8], "little")
        metadata = json.loads(packed[8 : 8 + header_len])["__metadata__"]
        self.ranges: Mapping[str, tuple[int, int]] = json.loads(metadata["ranges"])
        self.relations: list[list[int]] = json.loads(metadata["relations"])
        arrays = load(packed)
        wide = {name: array.to(torch.int32).to(device) for name, array in arrays.items()}
        self.prose, self.valid = wide["prose"], wide["valid"]
        self.chat, self.chat_marks = wide["chat"], wide["chat_marks"]
        self.piece_ids, self.piece_starts = wide["piece_ids"], wide["piece_starts"]
        self.device = device


class Maker:
    """Draws pieces and spells rows. Two with the same seed, corpus and device do the same.

    Args:
        corpus: the pieces.
        seed: chooses everything.
        held_out: use the words, names, topics and sentences that training never uses.
    """

    def __init__(self, corpus: Corpus, seed: int, *, held_out: bool = False) -> None:
        self.corpus = corpus
        self.device = corpus.device
        self.held_out = held_out
        self.rng = random.Random(seed)
        self._generator = torch.Generator(corpus.device).manual_seed(seed)

    def spell(
        self,
        T: int,
        head: list[Tensor],
        record_BLk: Tensor,
        questions_BQk: Tensor,
        *weights: list[float],
    ) -> Batch:
        """Pieces to tokens, cut or filled up to T + 1.

        Args:
            T: tokens the model shall read.
            head: pieces before the record, each (), (B, 1) or (B, n).
            record_BLk: (B or 1, L, k) pieces of the record.
            questions_BQk: (B or 1, Q, k) pieces of questions and answers.
            weights: of a question's k pieces; a second list is for all but the first question.
        """
        B = max(part.shape[0] for part in (record_BLk, questions_BQk, *map(_at_least_2d, head)))
        Q, k = questions_BQk.shape[1:]
        parts = [*map(_at_least_2d, head), record_BLk.flatten(1), questions_BQk.flatten(1)]
        pieces_BP = torch.cat([part.expand(B, -1) for part in parts], 1)
        device = self.device
        table_Qk = self.tensor([weights[min(q, len(weights) - 1)] for q in range(Q)]).float()
        number_Qk = torch.arange(1, Q + 1, device=device)[:, None].expand(Q, k)
        blank_P = torch.zeros(pieces_BP.shape[1] - Q * k, device=device)
        weights_P = torch.cat([blank_P, table_Qk.flatten()])
        questions_P = torch.cat([blank_P.long(), number_Qk.flatten()]) * (weights_P > 0)

        starts = self.corpus.piece_starts
        starts_BP = starts[pieces_BP].long()
        lens_BP = starts[pieces_BP + 1] - starts_BP
        ends_BP = lens_BP.cumsum(1)
        at_BT = torch.arange(T + 1, device=device).expand(B, -1).contiguous()
        which_BT = torch.searchsorted(ends_BP, at_BT, right=True)
        inside_BT = which_BT < pieces_BP.shape[1]
        which_BT = which_BT.clamp(max=pieces_BP.shape[1] - 1)
        offset_BP = starts_BP - (ends_BP - lens_BP)
        ids_BT = torch.where(inside_BT, offset_BP.gather(1, which_BT) + at_BT, 0)
        return Batch(
            tokens_BT=torch.where(inside_BT, self.corpus.piece_ids[ids_BT].long(), END),
            weights_BT=torch.where(inside_BT, weights_P[which_BT], 0.0),
            questions_BT=torch.where(inside_BT, questions_P[which_BT], 0),
        )

    def pairs(self, B: int, L: int, firsts: str, seconds: str) -> tuple[Tensor, Tensor]:
        """Two pieces each, (B, L): no pair twice.

        In half of the batches both are drawn from small sets, so that most pairs of a record share
        a piece with several others, and both pieces must be looked at.
        """
        if self.rng.random() < 0.5:
            return self.draw(firsts, B, L), self.draw(seconds, B, L)
        num_pairs = L * self.rng.choice((2, 3, 6))
        num_first = min(num_pairs, max(2, int(num_pairs ** self.rng.uniform(0.35, 0.65))))
        num_second = -(-num_pairs // num_first)
        pair_BL = self.order(B, num_first * num_second)[:, :L]
        first_BL, second_BL = self.draw(firsts, B, num_first), self.draw(seconds, B, num_second)
        return first_BL.gather(1, pair_BL % num_first), second_BL.gather(1, pair_BL // num_first)

    def piece(self, name: str, place: int = 0) -> Tensor:
        """The number of a fixed piece."""
        first, count = self.corpus.ranges[name]
        return torch.full((), first + place % count, device=self.device)

    def draw(self, name: str, B: int, n: int, *, low: int = 0, margin: int = 0) -> Tensor:
        """(B, n) random pieces of a name, not the first `low` nor the last `margin`."""
        first, count = self.own_range(name)
        return first + self.integers(B, n, low, max(low + 1, count - margin))

    def own_range(self, name: str) -> tuple[int, int]:
        """The pieces of a name that this maker may use: the last sixteenth is held out."""
        first, count = self.corpus.ranges[name]
        if name not in DRAWN:
            return first, count
        border = count * 15 // 16 // 16 * 16
        return (first + border, count - border) if self.held_out else (first, border)

    def integers(self, B: int, n: int, low: int, high: int) -> Tensor:
        """(B, n) integers from low to below high."""
        device = self.device
        return torch.randint(low, high, (B, n), generator=self._generator, device=device)

    def order(self, B: int, n: int) -> Tensor:
        """(B, n) a random order of n things for each row."""
        device = self.device
        return torch.rand(B, n, generator=self._generator, device=device).argsort(1)

    def chance(self, B: int, n: int, probability: float) -> Tensor:
        """(B, n) true with this probability."""
        device = self.device
        return torch.rand(B, n, generator=self._generator, device=device) < probability

    def tensor(self, values: object) -> Tensor:
        """Numbers on the device; nobody waits for them."""
        return to_device(torch.tensor(values), self.device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy there; on a GPU one that nobody waits for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _at_least_2d(part: Tensor) -> Tensor:
    """(), (n,), (B, n) -> (1, 1), (1, n), (B, n)."""
    return part.reshape(1, -1) if part.ndim < 2 else part


def slots(parts: list[Tensor | list[Tensor]]) -> Tensor:
    """Parts of a slot, each (), (L,) or (B, L), side by side: (B or 1, L, k)."""
    flat = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    shape = torch.broadcast_shapes(*(_at_least_2d(part).shape for part in flat))
    return torch.stack([_at_least_2d(part).expand(shape) for part in flat], -1)
