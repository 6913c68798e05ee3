"""Kinds of training text: lines, topics, pass keys, facts, what is recited, prose and chats.

A record is a long user's turn that hides something, a question as it will be asked in earnest, its
answer, and then as many further questions and answers as fit: many questions a record give a dense
signal, the first one is the published form. Kinds: LongChat's lines and topics, Landmark
Attention's pass key, and facts in prose (fact_records.py). To recite gives every token of the
vocabulary its turn as an answer. Beside them windows of plain prose and of chats.

Shape key: B rows, T tokens of a row, P pieces of a row, L lines or topics of a record, Q questions.
"""

from collections.abc import Mapping

import torch
from corpus import COPIED, FIXED, FOUND, Batch, Maker, slots
from fact_records import facts
from torch import Tensor

# About how many tokens a part takes, measured on the corpus; only to fill rows.
_LINE, _LINE_QUESTION = 19.5, 48
_TURN, _TOPIC, _TOPIC_QUESTION = 85, 75, 44
_GARBAGE_CYCLE = 22
_SENTENCE = 28.5
_RECITED, _RECITED_AT_ONCE = 1.75, 60
_PROSE_SHARE, _RECITED_WEIGHT = 0.5, 0.5


class Records(Maker):
    """Makes batches of every kind."""

    def batch(self, kind: str, num_rows: int, length: int) -> Batch:
        """Rows of one kind, one of KINDS."""
        return KINDS[kind](self, num_rows, length)

    def mixed(
        self, mix: Mapping[str, float], num_rows: int, length: int
    ) -> tuple[Batch, list[str]]:
        """Rows of several kinds, drawn with these weights; and each row's kind."""
        kinds = sorted(self.rng.choices(list(mix), list(mix.values()), k=num_rows))
        parts = [self.batch(kind, kinds.count(kind), length) for kind in sorted(set(kinds))]
        batch = Batch(
            tokens_BT=torch.cat([part.tokens_BT for part in parts]),
            weights_BT=torch.cat([part.weights_BT for part in parts]),
            questions_BT=torch.cat([part.questions_BT for part in parts]),
        )
        return batch, kinds

    def prose(self, B: int, T: int) -> Batch:
        """Windows of prose; some of the tokens count, for logits of all would cost too much."""
        source = self.corpus.valid if self.held_out else self.corpus.prose
        tokens_BT = self._windows(B, T, source)[0]
        counts_BT = self.chance(*tokens_BT.shape, _PROSE_SHARE)
        return self._plain(tokens_BT, counts_BT.float())

    def chat(self, B: int, T: int) -> Batch:
        """Windows of chats; answers count alone."""
        corpus = self.corpus
        tokens_BT, marks_BT = self._windows(B, T, corpus.chat, corpus.chat_marks)
        return self._plain(tokens_BT, marks_BT.float())

    def lines(self, B: int, T: int) -> Batch:
        """LongChat's lines: every one has a label and a number, and numbers are asked for."""
        piece = self.piece
        asked = self.rng.uniform(0.2, 1.0) if T < 4096 else self.rng.uniform(0.05, 0.5)
        L = max(3, int((T - 110) / (_LINE + asked * _LINE_QUESTION)))
        Q = min(L, 2 + int(asked * L))
        first_BL, second_BL = self.pairs(B, L, "spaced word", "bare word")
        values_BL = self.draw("number", B, L, low=1)
        label = [first_BL, piece("hyphen"), second_BL]
        record = slots(
            [piece("line head"), *label, piece("line middle"), values_BL, piece("line end")]
        )

        asked_BQ = self.order(B, L)[:, :Q]
        label = [first_BL.gather(1, asked_BQ), piece("hyphen"), second_BL.gather(1, asked_BQ)]
        later_Q = torch.arange(Q, device=self.device) > 0
        questions = slots(
            [
                torch.where(later_Q, piece("ask"), piece("empty")),
                torch.where(later_Q, piece("lines ask"), piece("lines ask first")),
                *(label, piece("lines ask end"), piece("answer")),
                *(piece("line head"), label, piece("line middle")),
                *(values_BL.gather(1, asked_BQ), piece("line answer end"), piece("end")),
            ]
        )
        head = [piece("ask"), piece("lines head"), piece("newline"), piece("newline")]
        weights = [0] * 7 + [FIXED, *[COPIED] * 3, FIXED, FOUND, FIXED, COPIED]
        return self.spell(T, head, record, questions, weights)

    def topics(self, B: int, T: int) -> Batch:
        """LongChat's topics: conversations about one after another; asks for the first."""
        piece, rng = self.piece, self.rng
        num_turns = int(T > 500)
        if T > 1000:
            num_turns = rng.choice((0, 0, 1, 2, 4, 6) if T < 8000 else (2, 4, 6, 9))
        asked = rng.uniform(0.3, 1.0)
        tokens = _TOPIC + num_turns * _TURN + asked * _TOPIC_QUESTION
        L = max(2, min(99, int((T - 150) / tokens)))
        topics_BL = self._topics(B, L)
        number_L = torch.arange(L, device=self.device)
        turns: list[Tensor] = []
        for _ in range(num_turns):
            asked_BL, told_BL = self.draw("sentence", B, L), self.draw("sentence", B, L, margin=3)
            mention_BL = self.chance(B, L, 0.2)
            empty = piece("empty")
            turns += [  # two sentences are said, and sometimes the topic is named again
                *(piece("turn", 0), asked_BL, piece("turn", 1), told_BL, told_BL + 1),
                torch.where(mention_BL, self.draw("topic mentioned", B, L), empty),
                torch.where(mention_BL, topics_BL, empty),
                torch.where(mention_BL, piece("full stop"), empty),
            ]
        record = slots(
            [
                torch.where(number_L > 0, piece("topic begins", 1), piece("topic begins", 0)),
                *(topics_BL, self.draw("topic granted", B, L), *turns),
                *(self.draw("topic ends", B, L), topics_BL, self.draw("next topic", B, L)),
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
        asked_BQ = self.order(B, L - 1)[:, :Q]
        before_BQ, after_BQ = topics_BL.gather(1, asked_BQ), topics_BL.gather(1, asked_BQ + 1)
        further_questions = [
            *(piece("ask"), self.draw("topics after", B, Q), before_BQ, piece("topics after end")),
            *(piece("answer"), piece("topics answer after"), before_BQ),
            *(piece("topics answer after middle"), after_BQ, piece("full stop"), piece("end")),
        ]
        questions = torch.cat([slots(first_question), slots(further_questions)], 1)
        head = [
            *(piece("ask"), piece("topics head", 0), piece("count", min(L, 99))),
            *(piece("topics head", 1), named, piece("topics head", 2)),
        ]
        first = [0, 0, 0, 0, FIXED, COPIED, FIXED, FOUND, FIXED, COPIED, 0]
        further = [0, 0, 0, 0, 0, FIXED, COPIED, FIXED, FOUND, FIXED, COPIED]
        return self.spell(T, head, record, questions, first, further)

    def passkey(self, B: int, T: int) -> Batch:
        """Landmark Attention's pass key, in its own filler or in prose; raw text, one question."""
        piece = self.piece
        garbage = self.rng.random() < 0.7
        room = (T - 130) * self.rng.uniform(0.8, 1.0 if garbage else 0.9)
        n = max(1, int(room / (_GARBAGE_CYCLE if garbage else _SENTENCE)))
        before_B1 = self.integers(B, 1, 0, n + 1)
        number_n = torch.arange(n, device=self.device)
        if garbage:
            filler_n = torch.where(number_n > 0, piece("garbage", 1), piece("garbage", 0))
            filler_Bn = later_Bn = filler_n.expand(B, n)
        else:
            filler_Bn = self.draw("sentence", B, 1, margin=n) + number_n
            later_Bn = self.draw("sentence", B, 1, margin=n) + number_n
            for text_Bn in (filler_Bn, later_Bn):  # each begins a line
                text_Bn[:, 0] += piece("opening sentence") - piece("sentence")
        key_B1 = self.draw("number", B, 1, low=1)
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
        weights = [FIXED, FOUND, FIXED, FIXED]
        return self.spell(T, parts, slots([piece("empty")]), slots(answer), weights)

    def recite(self, B: int, T: int) -> Batch:
        """Tokens of the whole vocabulary in any order, to be written again."""
        piece, n = self.piece, _RECITED_AT_ONCE
        Q = 1 + int(T / (2 * n * _RECITED + 8))  # the last one is cut off
        said_BQn = self.draw("token", B, Q * n).unflatten(1, (Q, n))
        said = list(said_BQn.unbind(-1))
        questions = slots(
            [piece("ask"), self.draw("recite", B, Q), *said, piece("answer"), *said, piece("end")]
        )
        weights = [0] * (n + 3) + [_RECITED_WEIGHT] * n + [COPIED]
        return self.spell(T, [], slots([piece("empty")]), questions, weights)

    def _topics(self, B: int, L: int) -> Tensor:
        """(B, L) different topics, half of them of one family, with the same beginnings."""
        first, count = self.own_range("topic")
        family = count // 16 * 16
        near_BL = self.integers(B, 1, 0, family // 16) * 16 + self.order(B, 16)[:, : L // 2]
        far_BL = self.integers(B, L - near_BL.shape[1], 0, count)
        both_BL = torch.cat([near_BL, far_BL], 1)
        return first + both_BL.gather(1, self.order(B, L))

    def _cut(self, whole_B1: Tensor, garbage: bool) -> Tensor:
        """A part of a cycle of filler, after so many whole ones."""
        if not garbage:
            return self.piece("empty")
        at_B1 = self.integers(len(whole_B1), 1, 0, self.corpus.ranges["garbage cut"][1])
        first, later = self.piece("garbage cut"), self.piece("garbage cut later")
        return torch.where(whole_B1 > 0, later, first) + at_B1

    def _windows(self, B: int, T: int, *streams: Tensor) -> list[Tensor]:
        """The same T + 1 places of each stream, anywhere."""
        start_B1 = self.integers(B, 1, 0, len(streams[0]) - T - 1)
        at_BT = start_B1 + torch.arange(T + 1, device=self.device)
        return [tokens[at_BT].long() for tokens in streams]

    def _plain(self, tokens_BT: Tensor, weights_BT: Tensor) -> Batch:
        """Text without questions."""
        nothing_BT = torch.zeros_like(tokens_BT)
        return Batch(tokens_BT=tokens_BT, weights_BT=weights_BT, questions_BT=nothing_BT)


KINDS = {
    "chat": Records.chat,
    "facts": facts,
    "lines": Records.lines,
    "passkey": Records.passkey,
    "prose": Records.prose,
    "recite": Records.recite,
    "topics": Records.topics,
}
"""Name -> (maker, number of rows, tokens of a row) -> rows."""
