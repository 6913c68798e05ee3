"""Facts in prose: statements of facts.py hidden among sentences of books, and questions on them.

A record tells many facts, each in one of its relation's ways, and asks for them in other words: in
FalconLite2's template (the first question after the text, the others in turns of their own), as
plain text, or after "Question:" and "Answer:", where the answer is the value alone. In some records
two facts are told of everyone. Some questions have no answer in the text.

Shape key: B rows, T tokens of a row, F facts, Q questions, S slots of the record (a fact or a
sentence), R relations, 3 the pieces of an entity or a value.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from corpus import COPIED, FIXED, FOUND, Batch, Maker, slots
from facts import ENTITIES, IN_DIGITS, NUM_ASKED, NUM_TOLD, VALUES
from torch import Tensor

# About how many tokens a part takes, measured on the corpus; only to fill rows.
_SENTENCE, _FACT, _FACT_QUESTION = 28.5, 17, 25

_NOT_THERE = 0.12
"""Questions that the text does not answer."""

_ANSWER, _QUESTIONS = 4 * NUM_TOLD, 4 * (NUM_TOLD + 1)
"""Where a relation's answer and its questions begin among its pieces (prepare.relation_pieces)."""

_TELL_LEN = 11
"""Pieces of a slot: two line ends, before, entity, between, value, after."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """The facts of each row.

    Attributes:
        relation_BF: which relation.
        entity_BF3: of whom or what, in pieces.
        value_BF3: what, in pieces.
        paired: whether facts 2n and 2n + 1 are of the same entity.
    """

    relation_BF: Tensor
    entity_BF3: Tensor
    value_BF3: Tensor
    paired: bool

    def take(self, at_BQ: Tensor) -> "Told":
        """Facts in another order."""
        at_BQ3 = at_BQ[..., None].expand(-1, -1, 3)
        return Told(
            relation_BF=self.relation_BF.gather(1, at_BQ),
            entity_BF3=self.entity_BF3.gather(1, at_BQ3),
            value_BF3=self.value_BF3.gather(1, at_BQ3),
            paired=self.paired,
        )


class Relations:
    """The table of relations, on the device."""

    def __init__(self, maker: Maker) -> None:
        table_Rk = maker.tensor(maker.corpus.relations)
        self.entity_R, self.value_R, self.value_first_Ri = (
            table_Rk[:, 0],
            table_Rk[:, 1],
            table_Rk[:, 2:] > 0,
        )
        self.num = len(table_Rk)
        names = (f"fact {number:02}" for number in range(self.num))
        self.start_R = maker.tensor([maker.corpus.ranges[name][0] for name in names])
        kinds = [row[0] for row in maker.corpus.relations]  # those of a kind stand together
        self.first_R = maker.tensor([kinds.index(kind) for kind in kinds])
        self.count_R = maker.tensor([kinds.count(kind) for kind in kinds])

    def another(self, relation_BF: Tensor, by_BF: Tensor) -> Tensor:
        """Another relation of the same kind of entity, `by_BF` >= 0 further on."""
        first, count = self.first_R[relation_BF], self.count_R[relation_BF]
        step = 1 + by_BF % (count - 1)
        return first + (relation_BF - first + step) % count


def facts(maker: Maker, B: int, T: int) -> Batch:
    """Rows of facts among prose."""
    piece, rng = maker.piece, maker.rng
    relations = Relations(maker)
    each = _FACT + _FACT_QUESTION
    F = rng.randint(2, max(3, min(99, int((T - 60) / (each + _SENTENCE)))))
    S = F + max(1, int((T - 60 - F * each) / _SENTENCE * rng.uniform(0.6, 1.0)))
    num_asked = max(F, int((T - 60 - F * _FACT - (S - F) * _SENTENCE) / _FACT_QUESTION))
    told = draw_facts(maker, relations, B, F)
    form = rng.choices((_chat, _plain, _question_answer), (0.6, 0.2, 0.2))[0]
    opening = rng.randint(0, 2) if form is _chat else 0  # words in front of the text, if not 0
    record_BSk = _text(maker, relations, told, S, opening)
    asked, missing_BQ = _asked(maker, relations, told, num_asked)
    questions, weights = form(maker, relations, asked, missing_BQ)
    head = [piece("ask"), piece("text follows", opening)] if form is _chat else []
    return maker.spell(T, head, record_BSk, questions, weights)


def draw_facts(maker: Maker, relations: Relations, B: int, F: int) -> Told:
    """Facts, each of its own entity, or two of everyone's."""
    relation_BF = maker.integers(B, F, 0, relations.num)
    entity_kBF3 = _entities(maker, B, F)
    paired = maker.rng.random() < 0.4
    if paired:
        first_F = torch.arange(F, device=maker.device) // 2 * 2
        is_second_F = torch.arange(F, device=maker.device) % 2 == 1
        other_BF = relations.another(relation_BF[:, first_F], maker.integers(B, F, 0, 1000))
        relation_BF = torch.where(is_second_F, other_BF, relation_BF)
        entity_kBF3 = entity_kBF3[:, :, first_F]
    return Told(
        relation_BF=relation_BF,
        entity_BF3=_chosen(entity_kBF3, relations.entity_R[relation_BF]),
        value_BF3=_chosen(_values(maker, B, F), relations.value_R[relation_BF]),
        paired=paired,
    )


def _entities(maker: Maker, B: int, F: int) -> Tensor:
    """(kinds, B, F, 3): an entity of each of ENTITIES."""
    empty = maker.piece("empty")
    first_BF, second_BF = maker.pairs(B, F, "spaced word", "bare word")
    alone_BF, hyphen_BF = maker.chance(B, F, 0.3), maker.chance(B, F, 0.5)
    spaced_BF = second_BF - maker.piece("bare word") + maker.piece("spaced word")
    thing = [
        torch.where(alone_BF, maker.draw("spaced word", B, F), first_BF),
        torch.where(hyphen_BF & ~alone_BF, maker.piece("hyphen"), empty),
        torch.where(alone_BF, empty, torch.where(hyphen_BF, second_BF, spaced_BF)),
    ]
    first_BF, second_BF = maker.pairs(B, F, "name", "name")
    alone_BF = maker.chance(B, F, 0.4)
    person = [
        torch.where(alone_BF, maker.draw("name", B, F), first_BF),
        empty,
        torch.where(alone_BF, empty, second_BF),
    ]
    place = [maker.draw("name", B, F), empty, empty]
    work = [maker.piece("title"), maker.draw("name", B, F), maker.draw("spaced word", B, F)]
    by_kind = {"thing": thing, "person": person, "place": place, "work": work}
    return _stacked([by_kind[kind] for kind in ENTITIES], B, F)


def _values(maker: Maker, B: int, F: int) -> Tensor:
    """(kinds, B, F, 3): a value of each of VALUES."""
    empty, word = maker.piece("empty"), "spaced word"
    year_BF = maker.piece("number") + maker.integers(B, F, 1400, 1990)
    if maker.corpus.ranges["number"][1] < 1990:  # a toy's
        year_BF = maker.draw("number", B, F)
    surname_BF = torch.where(maker.chance(B, F, 0.4), maker.draw("name", B, F), empty)
    by_kind = {
        "number": [maker.draw("number", B, F, low=1), empty, empty],
        "year": [year_BF, empty, empty],
        "name": [maker.draw("name", B, F), empty, surname_BF],
        "place": [maker.draw("name", B, F), empty, empty],
        "word": [maker.draw(word, B, F), empty, empty],
        "phrase": [maker.piece("article"), maker.draw(word, B, F), maker.draw(word, B, F)],
        "day": [maker.draw("day", B, F), empty, empty],
        "time": [maker.draw("time", B, F), empty, empty],
    }
    return _stacked([by_kind[kind] for kind in VALUES], B, F)


def _stacked(kinds: list[list[Tensor]], B: int, F: int) -> Tensor:
    """Three pieces of each kind, (), or (B, F): (kinds, B, F, 3)."""
    return torch.stack([slots(parts).reshape(-1, F, 3).expand(B, F, 3) for parts in kinds])


def _chosen(options_kBF3: Tensor, kind_BF: Tensor) -> Tensor:
    """Of each fact the option of its kind, (B, F, 3)."""
    at = kind_BF[None, ..., None].expand(1, *options_kBF3.shape[1:])
    return options_kBF3.gather(0, at)[0]


def _text(maker: Maker, relations: Relations, told: Told, S: int, opening: int) -> Tensor:
    """(B, S, _TELL_LEN) pieces: the facts in their order among sentences that follow each other."""
    piece = maker.piece
    B, F = told.relation_BF.shape
    way_BF = maker.integers(B, F, 0, NUM_TOLD)
    start_BF = relations.start_R[told.relation_BF] + 4 * way_BF
    value_first_BF1 = relations.value_first_Ri[told.relation_BF, way_BF][..., None]
    first_BF3 = torch.where(value_first_BF1, told.value_BF3, told.entity_BF3)
    second_BF3 = torch.where(value_first_BF1, told.entity_BF3, told.value_BF3)
    start_BF1 = start_BF[..., None]
    told_BF9 = torch.cat([start_BF1, first_BF3, start_BF1 + 2, second_BF3, start_BF1 + 3], -1)

    order_BS = maker.order(B, S)
    is_fact_BS = torch.zeros_like(order_BS, dtype=torch.bool).scatter_(1, order_BS[:, :F], True)
    number_BS = (is_fact_BS.cumsum(1) - 1).clamp(min=0)
    told_BS9 = told_BF9.gather(1, number_BS[..., None].expand(-1, -1, 9)).clone()
    sentence_BS = maker.draw("sentence", B, 1, margin=S) + (~is_fact_BS).cumsum(1) - 1
    begins_BS = maker.chance(B, S, 0.15)  # a paragraph; then there is no space in front
    newline_BS = torch.where(begins_BS, piece("newline"), piece("empty"))
    newline_BS[:, 0] = piece("newline") if opening else piece("empty")
    begins_BS[:, 0] = True
    told_BS9[..., 0] += begins_BS
    to_opening = piece("opening sentence") - piece("sentence")
    sentence_BS = torch.where(begins_BS, sentence_BS + to_opening, sentence_BS)
    prose_BS9 = torch.full_like(told_BS9, int(maker.corpus.ranges["empty"][0]))
    prose_BS9[..., 0] = sentence_BS
    record_BS9 = torch.where(is_fact_BS[..., None], told_BS9, prose_BS9)
    return torch.cat([newline_BS[..., None].expand(-1, -1, 2), record_BS9], -1)


def _asked(maker: Maker, relations: Relations, told: Told, Q: int) -> tuple[Told, Tensor]:
    """What is asked, all facts once, then all again; and (B, Q) whether the text does not tell it.

    Then the question is of somebody else or, where that cannot be told too, of something else.
    """
    B, F = told.relation_BF.shape
    asked = told.take(torch.cat([maker.order(B, F) for _ in range(0, Q, F)], 1)[:, :Q])
    missing_BQ = maker.chance(B, Q, _NOT_THERE)
    stranger_BQ3 = _chosen(_entities(maker, B, Q), relations.entity_R[asked.relation_BF])
    is_known_BQ = maker.chance(B, Q, 0.0 if told.paired else 0.5)
    other_BQ = relations.another(asked.relation_BF, maker.integers(B, Q, 0, 1000))
    is_stranger_BQ3 = (missing_BQ & ~is_known_BQ)[..., None]
    changed = Told(
        relation_BF=torch.where(missing_BQ & is_known_BQ, other_BQ, asked.relation_BF),
        entity_BF3=torch.where(is_stranger_BQ3, stranger_BQ3, asked.entity_BF3),
        value_BF3=asked.value_BF3,
        paired=told.paired,
    )
    return changed, missing_BQ


Form = Callable[[Maker, Relations, Told, Tensor], tuple[Tensor, list[float]]]
"""A way to ask: to the pieces of each question and answer, (B, Q, k), and their k weights."""


def _chat(
    maker: Maker, relations: Relations, asked: Told, missing_BQ: Tensor
) -> tuple[Tensor, list[float]]:
    """The first question ends the user's turn with the text; others are turns of their own."""
    piece = maker.piece
    plainly = maker.rng.random() < 0.5
    is_first_Q = torch.arange(missing_BQ.shape[1], device=maker.device) == 0
    B = len(missing_BQ)
    opener = piece("blank line") if plainly else maker.draw("question follows", B, 1)
    lead = torch.where(is_first_Q, opener, piece("ask"))
    bare_Q = torch.ones_like(is_first_Q) if plainly else ~is_first_Q
    return _sentences(maker, relations, asked, missing_BQ, lead, bare_Q, piece("answer"))


def _plain(
    maker: Maker, relations: Relations, asked: Told, missing_BQ: Tensor
) -> tuple[Tensor, list[float]]:
    """Without a template: the question, a line end, and the answer."""
    piece = maker.piece
    bare_Q = torch.ones(missing_BQ.shape[1], dtype=torch.bool, device=maker.device)
    lead, mark = piece("blank line"), piece("newline")
    return _sentences(maker, relations, asked, missing_BQ, lead, bare_Q, mark)


def _sentences(
    maker: Maker,
    relations: Relations,
    asked: Told,
    missing_BQ: Tensor,
    lead: Tensor,
    bare_Q: Tensor,
    mark: Tensor,
) -> tuple[Tensor, list[float]]:
    """Questions that are answered in a sentence."""
    piece, empty = maker.piece, maker.piece("empty")
    start_BQ = relations.start_R[asked.relation_BF]
    question = _question(maker, start_BQ, asked, bare_Q)
    entity = asked.entity_BF3.unbind(-1)
    at_BQ = start_BQ + _ANSWER
    answer = [at_BQ + 1, *entity, at_BQ + 2, *asked.value_BF3.unbind(-1), at_BQ + 3]
    answer = [torch.where(missing_BQ, empty, part) for part in answer]
    not_there = torch.where(missing_BQ, piece("not there", 0), empty)
    weights = [0.0] * 7 + [COPIED, *[COPIED] * 3, FIXED, *[FOUND] * 3, FIXED, COPIED, COPIED]
    return slots([lead, *question, mark, *answer, not_there, piece("end")]), weights


def _question_answer(
    maker: Maker, relations: Relations, asked: Told, missing_BQ: Tensor
) -> tuple[Tensor, list[float]]:
    """Without a template, after "Question:" and "Answer:"; the value is the answer."""
    piece, empty = maker.piece, maker.piece("empty")
    is_spaced_Q = torch.zeros(missing_BQ.shape[1], dtype=torch.bool, device=maker.device)
    start_BQ = relations.start_R[asked.relation_BF]
    question = _question(maker, start_BQ, asked, is_spaced_Q)
    kind_BQ = relations.value_R[asked.relation_BF]
    in_digits = [VALUES.index(kind) for kind in IN_DIGITS]
    is_digits_BQ = sum((kind_BQ == kind).long() for kind in in_digits) > 0
    space_BQ = torch.where(is_digits_BQ, piece("space"), empty)
    answer = [space_BQ, *asked.value_BF3.unbind(-1), piece("full stop")]
    answer = [torch.where(missing_BQ, empty, part) for part in answer]
    not_there = torch.where(missing_BQ, piece("not there", 1), empty)
    weights = [0.0] * 7 + [FIXED, *[FOUND] * 3, FIXED, COPIED, COPIED]
    parts = [piece("qa question"), *question, piece("qa answer"), *answer]
    return slots([*parts, not_there, piece("end")]), weights


def _question(maker: Maker, start_BQ: Tensor, asked: Told, bare_Q: Tensor) -> list[Tensor]:
    """Five pieces: before, with a space in front unless bare; the entity; after."""
    way_BQ = maker.integers(*start_BQ.shape, 0, NUM_ASKED)
    at_BQ = start_BQ + _QUESTIONS + 3 * way_BQ
    return [at_BQ + bare_Q.long(), *asked.entity_BF3.unbind(-1), at_BQ + 2]
