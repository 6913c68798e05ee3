"""Batches of training text, put together on the GPU from the pieces that prepare.py made.

A record is a long user's turn that hides something, a question as it will be asked in earnest, its
answer, and then as many further questions and answers as fit: many questions a record give a dense
signal, the first one is the published form. Kinds: LongChat's lines and topics, Landmark
Attention's pass key, and facts in running prose; beside them windows of plain prose and of chats.

The one idea: a record is a row of piece numbers. Everything about it, its words and values, their
order, where the needle lies, is chosen by tensor operations over all rows at once, and `_spell`
turns rows of pieces into rows of tokens with one search. A Python loader fed an H200 one step in
two seconds; this feeds it a hundred a second.

Shape key: B rows, T tokens of a row, P pieces of a row, L lines or topics of a record, Q questions,
F facts, S slots between which facts are hidden.
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
_FOUND, _COPIED, _FIXED = 1.0, 0.25, 0.1

# About how many tokens a part takes, measured on the corpus; only to fill rows.
_LINE, _LINE_QUESTION = 19.5, 48
_TURN, _TOPIC, _TOPIC_QUESTION = 85, 75, 44
_GARBAGE_CYCLE = 22
_SENTENCE, _FACT, _FACT_QUESTION = 28.5, 19, 42


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
        arrays = load(packed)
        wide = {name: array.to(torch.int32).to(device) for name, array in arrays.items()}
        self.prose, self.valid = wide["prose"], wide["valid"]
        self.chat, self.chat_marks = wide["chat"], wide["chat_marks"]
        self.piece_ids, self.piece_starts = wide["piece_ids"], wide["piece_starts"]
        self.device = device


class Records:
    """Makes batches. Two makers with the same seed, corpus and device make the same.

    Args:
        corpus: the pieces.
        seed: chooses everything.
        held_out: use the words, topics and sentences that training makers never use.
    """

    def __init__(self, corpus: Corpus, seed: int, *, held_out: bool = False) -> None:
        self._corpus = corpus
        self._held_out = held_out
        self._rng = random.Random(seed)
        self._generator = torch.Generator(corpus.device).manual_seed(seed)

    def batch(self, kind: str, num_rows: int, length: int) -> Batch:
        """Rows of one kind: "lines", "topics", "passkey", "facts", "prose" or "chat"."""
        make = {"lines": self.lines, "topics": self.topics, "passkey": self.passkey}
        make |= {"facts": self.facts, "prose": self.prose, "chat": self.chat}
        return make[kind](num_rows, length)

    def mixed(
        self, mix: Mapping[str, float], num_rows: int, length: int
    ) -> tuple[Batch, list[str]]:
        """Rows of several kinds, drawn with these weights; and each row's kind."""
        kinds = sorted(self._rng.choices(list(mix), list(mix.values()), k=num_rows))
        parts = [self.batch(kind, kinds.count(kind), length) for kind in sorted(set(kinds))]
        batch = Batch(
            tokens_BT=torch.cat([part.tokens_BT for part in parts]),
            weights_BT=torch.cat([part.weights_BT for part in parts]),
            questions_BT=torch.cat([part.questions_BT for part in parts]),
        )
        return batch, kinds

    def prose(self, B: int, T: int) -> Batch:
        """Windows of prose."""
        source = self._corpus.valid if self._held_out else self._corpus.prose
        tokens_BT = self._windows(B, T, source)[0]
        return self._plain(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.float32))

    def chat(self, B: int, T: int) -> Batch:
        """Windows of chats; answers count alone."""
        corpus = self._corpus
        tokens_BT, marks_BT = self._windows(B, T, corpus.chat, corpus.chat_marks)
        return self._plain(tokens_BT, marks_BT.float())

    def lines(self, B: int, T: int) -> Batch:
        """LongChat's lines: every one has a label and a number, and numbers are asked for."""
        piece = self._piece
        asked = self._rng.uniform(0.2, 1.0) if T < 4096 else self._rng.uniform(0.05, 0.5)
        L = max(3, int((T - 110) / (_LINE + asked * _LINE_QUESTION)))
        Q = min(L, 2 + int(asked * L))
        first_BL, second_BL = self._labels(B, L)
        values_BL = self._draw("number", B, L, low=1)
        label = [first_BL, piece("hyphen"), second_BL]
        record = _slots(
            [piece("line head"), *label, piece("line middle"), values_BL, piece("line end")]
        )

        asked_BQ = self._order(B, L)[:, :Q]
        label = [first_BL.gather(1, asked_BQ), piece("hyphen"), second_BL.gather(1, asked_BQ)]
        later_Q = torch.arange(Q, device=self._corpus.device) > 0
        questions = _slots(
            [
                torch.where(later_Q, piece("ask"), piece("empty")),
                torch.where(later_Q, piece("lines ask"), piece("lines ask first")),
                *(label, piece("lines ask end"), piece("answer")),
                *(piece("line head"), label, piece("line middle")),
                *(values_BL.gather(1, asked_BQ), piece("line answer end"), piece("end")),
            ]
        )
        head = [piece("ask"), piece("lines head"), piece("newline"), piece("newline")]
        weights = [0] * 7 + [_FIXED, *[_COPIED] * 3, _FIXED, _FOUND, _FIXED, _COPIED]
        return self._spell(T, head, record, questions, weights)

    def topics(self, B: int, T: int) -> Batch:
        """LongChat's topics: conversations about one after another; asks for the first."""
        piece, rng = self._piece, self._rng
        num_turns = int(T > 500)
        if T > 1000:
            num_turns = rng.choice((0, 0, 1, 2, 4, 6) if T < 8000 else (2, 4, 6, 9))
        asked = rng.uniform(0.3, 1.0)
        tokens = _TOPIC + num_turns * _TURN + asked * _TOPIC_QUESTION
        L = max(2, min(99, int((T - 150) / tokens)))
        topics_BL = self._topics(B, L)
        number_L = torch.arange(L, device=self._corpus.device)
        turns: list[Tensor] = []
        for _ in range(num_turns):
            asked_BL, told_BL = self._draw("sentence", B, L), self._draw("sentence", B, L, margin=3)
            mention_BL = self._chance(B, L, 0.2)
            empty = piece("empty")
            turns += [  # two sentences are said, and sometimes the topic is named again
                *(piece("turn", 0), asked_BL, piece("turn", 1), told_BL, told_BL + 1),
                torch.where(mention_BL, self._draw("topic mentioned", B, L), empty),
                torch.where(mention_BL, topics_BL, empty),
                torch.where(mention_BL, piece("full stop"), empty),
            ]
        record = _slots(
            [
                torch.where(number_L > 0, piece("topic begins", 1), piece("topic begins", 0)),
                *(topics_BL, self._draw("topic granted", B, L), *turns),
                *(self._draw("topic ends", B, L), topics_BL, self._draw("next topic", B, L)),
            ]
        )

        ordinal = rng.choices(("first", "any"), (0.75, 0.25))[0]
        place = 0 if ordinal == "first" else rng.choice([n for n in (0, 1, 2, 3) if n < L] + [-1])
        named = piece("ordinal", place % 5)
        first_question = [
            *(piece("topics ask first"), named, piece("topics ask end"), piece("answer")),
            *(piece("topics answer"), named, piece("topics answer middle"), topics_BL[:, [place]]),
            *(piece("full stop"), piece("end"), piece("empty")),
        ]
        Q = min(L - 1, 1 + int(asked * L))
        asked_BQ = self._order(B, L - 1)[:, :Q]
        before_BQ, after_BQ = topics_BL.gather(1, asked_BQ), topics_BL.gather(1, asked_BQ + 1)
        further_questions = [
            *(piece("ask"), self._draw("topics after", B, Q), before_BQ, piece("topics after end")),
            *(piece("answer"), piece("topics answer after"), before_BQ),
            *(piece("topics answer after middle"), after_BQ, piece("full stop"), piece("end")),
        ]
        questions = torch.cat([_slots(first_question), _slots(further_questions)], 1)
        head = [
            *(piece("ask"), piece("topics head", 0), piece("count", min(L, 99))),
            *(piece("topics head", 1), named, piece("topics head", 2)),
        ]
        first = [0, 0, 0, 0, _FIXED, _COPIED, _FIXED, _FOUND, _FIXED, _COPIED, 0]
        further = [0, 0, 0, 0, 0, _FIXED, _COPIED, _FIXED, _FOUND, _FIXED, _COPIED]
        return self._spell(T, head, record, questions, first, further)

    def passkey(self, B: int, T: int) -> Batch:
        """Landmark Attention's pass key, in its own filler or in prose; raw text, one question."""
        piece = self._piece
        garbage = self._rng.random() < 0.7
        room = (T - 130) * self._rng.uniform(0.8, 1.0 if garbage else 0.9)
        n = max(1, int(room / (_GARBAGE_CYCLE if garbage else _SENTENCE)))
        before_B1 = self._integers(B, 1, 0, n + 1)
        number_n = torch.arange(n, device=self._corpus.device)
        if garbage:
            filler_n = torch.where(number_n > 0, piece("garbage", 1), piece("garbage", 0))
            filler_Bn = later_Bn = filler_n.expand(B, n)
        else:
            filler_Bn = self._draw("sentence", B, 1, margin=n) + number_n
            later_Bn = self._draw("sentence", B, 1, margin=n) + number_n
        key_B1 = self._draw("number", B, 1, low=1)
        parts = [
            piece("key head"),
            torch.where(number_n < before_B1, filler_Bn, piece("empty")),
            self._cut(before_B1, garbage),
            *(piece("key middle", 0), key_B1, piece("key middle", 1), key_B1),
            piece("key middle", 2),
            torch.where(number_n < n - before_B1, later_Bn, piece("empty")),
            self._cut(n - before_B1, garbage),
            piece("key tail"),
        ]
        answer = [piece("space"), key_B1, piece("full stop"), piece("end")]
        weights = [_FIXED, _FOUND, _FIXED, _FIXED]
        return self._spell(T, parts, _slots([piece("empty")]), _slots(answer), weights)

    def facts(self, B: int, T: int) -> Batch:
        """Facts such as "The door code of the A B is 123." among sentences of prose."""
        piece, rng = self._piece, self._rng
        each = _FACT + _FACT_QUESTION
        F = rng.randint(2, max(3, min(99, int((T - 60) / (each + _SENTENCE)))))
        P = F + max(1, int((T - 60 - F * each) / _SENTENCE))
        first_BF, second_BF = self._labels(B, F)
        hyphen_BF = self._chance(B, F, 0.5)
        bare, spaced = piece("bare word"), piece("spaced word")
        label = [
            first_BF,
            torch.where(hyphen_BF, piece("hyphen"), piece("empty")),
            torch.where(hyphen_BF, second_BF, second_BF - bare + spaced),
        ]
        kinds = sorted(name for name in self._corpus.ranges if name.startswith("fact "))
        starts_k = self._tensor([self._corpus.ranges[name][0] for name in kinds])
        wordy_k = self._tensor([name.startswith("fact w") for name in kinds])
        kind_BF = self._integers(B, F, 0, len(kinds))
        fact_BF = starts_k[kind_BF]
        values_BF = torch.where(
            wordy_k[kind_BF], self._draw("spaced word", B, F), self._draw("number", B, F, low=1)
        )
        told_BF7 = torch.stack([fact_BF + 2, *label, fact_BF + 3, values_BF, fact_BF + 4], -1)

        slot_order_BP = self._order(B, P)
        is_fact_BP = torch.zeros_like(slot_order_BP, dtype=torch.bool)
        is_fact_BP.scatter_(1, slot_order_BP[:, :F], True)
        fact_number_BP = (is_fact_BP.cumsum(1) - 1).clamp(min=0)
        sentence_BP = self._draw("sentence", B, 1, margin=P) + (~is_fact_BP).cumsum(1) - 1
        to_opening = piece("opening sentence") - piece("sentence")
        opening = rng.randint(0, 2)  # words in front of the text, if it is not 0
        opens_BP = self._chance(B, P, 0.15)
        opens_BP[:, 0] = opening > 0
        newline_BP = torch.where(opens_BP, piece("newline"), piece("empty"))
        sentence_BP = torch.where(opens_BP, sentence_BP + to_opening, sentence_BP)
        empty_BP = torch.zeros_like(sentence_BP)
        prose_BP7 = torch.stack([newline_BP, newline_BP, sentence_BP, *[empty_BP] * 4], -1)
        told_BP7 = told_BF7.gather(1, fact_number_BP[..., None].expand(-1, -1, 7))
        record_BPK = torch.where(is_fact_BP[..., None], told_BP7, prose_BP7)

        Q = F
        asked_BQ = self._order(B, F)
        fact_BQ, values_BQ = fact_BF.gather(1, asked_BQ), values_BF.gather(1, asked_BQ)
        label = [part.gather(1, asked_BQ) for part in label]
        plainly = rng.random() < 0.5
        opener = self._draw("question follows", B, 1)
        first_Q = torch.arange(Q, device=self._corpus.device) == 0
        in_between = torch.where(first_Q, piece("newline"), piece("empty"))
        questions = _slots(
            [
                in_between if plainly else piece("empty"),
                in_between if plainly else piece("empty"),
                torch.where(first_Q, piece("empty") if plainly else opener, piece("ask")),
                fact_BQ + torch.where(first_Q & (not plainly), 0, 5),
                *(label, fact_BQ + 1, piece("answer")),
                *(fact_BQ + 6, label, fact_BQ + 3, values_BQ, fact_BQ + 4, piece("end")),
            ]
        )
        weights = [0] * 9 + [_FIXED, *[_COPIED] * 3, _FIXED, _FOUND, _FIXED, _COPIED]
        head = [piece("ask"), piece("text follows", opening)]
        return self._spell(T, head, record_BPK, questions, weights)

    def _spell(
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
        device = self._corpus.device
        table_Qk = self._tensor([weights[min(q, len(weights) - 1)] for q in range(Q)]).float()
        number_Qk = torch.arange(1, Q + 1, device=device)[:, None].expand(Q, k)
        blank_P = torch.zeros(pieces_BP.shape[1] - Q * k, device=device)
        weights_P = torch.cat([blank_P, table_Qk.flatten()])
        questions_P = torch.cat([blank_P.long(), number_Qk.flatten()]) * (weights_P > 0)

        starts = self._corpus.piece_starts
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
            tokens_BT=torch.where(inside_BT, self._corpus.piece_ids[ids_BT].long(), END),
            weights_BT=torch.where(inside_BT, weights_P[which_BT], 0.0),
            questions_BT=torch.where(inside_BT, questions_P[which_BT], 0),
        )

    def _labels(self, B: int, L: int) -> tuple[Tensor, Tensor]:
        """Two words a label, (B, L) each: the first with a space in front, the second without.

        In half of the batches both are drawn from small sets, so that most labels of a record share
        a word with several others, and both words must be looked at.
        """
        if self._rng.random() < 0.5:
            return self._draw("spaced word", B, L), self._draw("bare word", B, L)
        num_pairs = L * self._rng.choice((2, 3, 6))
        num_first = min(num_pairs, max(2, int(num_pairs ** self._rng.uniform(0.35, 0.65))))
        num_second = -(-num_pairs // num_first)
        pair_BL = self._order(B, num_first * num_second)[:, :L]
        firsts = self._draw("spaced word", B, num_first)
        seconds = self._draw("bare word", B, num_second)
        return firsts.gather(1, pair_BL % num_first), seconds.gather(1, pair_BL // num_first)

    def _topics(self, B: int, L: int) -> Tensor:
        """(B, L) different topics, half of them of one family, with the same beginnings."""
        first, count = self._own_range("topic")
        family = count // 16 * 16
        near_BL = self._integers(B, 1, 0, family // 16) * 16 + self._order(B, 16)[:, : L // 2]
        far_BL = self._integers(B, L - near_BL.shape[1], 0, count)
        both_BL = torch.cat([near_BL, far_BL], 1)
        return first + both_BL.gather(1, self._order(B, L))

    def _cut(self, whole_B1: Tensor, garbage: bool) -> Tensor:
        """A part of a cycle of filler, after so many whole ones."""
        if not garbage:
            return self._piece("empty")
        at_B1 = self._integers(len(whole_B1), 1, 0, self._corpus.ranges["garbage cut"][1])
        first, later = self._piece("garbage cut"), self._piece("garbage cut later")
        return torch.where(whole_B1 > 0, later, first) + at_B1

    def _windows(self, B: int, T: int, *streams: Tensor) -> list[Tensor]:
        """The same T + 1 places of each stream, anywhere."""
        start_B1 = self._integers(B, 1, 0, len(streams[0]) - T - 1)
        at_BT = start_B1 + torch.arange(T + 1, device=self._corpus.device)
        return [tokens[at_BT].long() for tokens in streams]

    def _plain(self, tokens_BT: Tensor, weights_BT: Tensor) -> Batch:
        """Text without questions."""
        nothing_BT = torch.zeros_like(tokens_BT)
        return Batch(tokens_BT=tokens_BT, weights_BT=weights_BT, questions_BT=nothing_BT)

    def _piece(self, name: str, place: int = 0) -> Tensor:
        """The number of a fixed piece."""
        first, count = self._corpus.ranges[name]
        return torch.full((), first + place % count, device=self._corpus.device)

    def _draw(self, name: str, B: int, n: int, *, low: int = 0, margin: int = 0) -> Tensor:
        """(B, n) random pieces of a name, not the first `low` nor the last `margin`."""
        first, count = self._own_range(name)
        return first + self._integers(B, n, low, max(low + 1, count - margin))

    def _own_range(self, name: str) -> tuple[int, int]:
        """The pieces of a name that this maker may use: the last sixteenth is held out."""
        first, count = self._corpus.ranges[name]
        if name not in ("spaced word", "bare word", "topic", "sentence"):
            return first, count
        border = count * 15 // 16 // 16 * 16
        return (first + border, count - border) if self._held_out else (first, border)

    def _integers(self, B: int, n: int, low: int, high: int) -> Tensor:
        """(B, n) integers from low to below high."""
        device = self._corpus.device
        return torch.randint(low, high, (B, n), generator=self._generator, device=device)

    def _order(self, B: int, n: int) -> Tensor:
        """(B, n) a random order of n things for each row."""
        device = self._corpus.device
        return torch.rand(B, n, generator=self._generator, device=device).argsort(1)

    def _chance(self, B: int, n: int, probability: float) -> Tensor:
        """(B, n) true with this probability."""
        device = self._corpus.device
        return torch.rand(B, n, generator=self._generator, device=device) < probability

    def _tensor(self, values: object) -> Tensor:
        return to_device(torch.tensor(values), self._corpus.device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy there; on a GPU one that nobody waits for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _at_least_2d(part: Tensor) -> Tensor:
    """(), (n,), (B, n) -> (1, 1), (1, n), (B, n)."""
    return part.reshape(1, -1) if part.ndim < 2 else part


def _slots(parts: list[Tensor | list[Tensor]]) -> Tensor:
    """Parts of a slot, each (), (L,) or (B, L), side by side: (B or 1, L, k)."""
    flat = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    shape = torch.broadcast_shapes(*(_at_least_2d(part).shape for part in flat))
    return torch.stack([_at_least_2d(part).expand(shape) for part in flat], -1)
