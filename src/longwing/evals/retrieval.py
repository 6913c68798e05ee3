"""Retrieval: something is hidden in a document at a known depth, and asked for at its end.

Four kinds of one idea. `topics` and `lines` are LongChat's tests, made here for any length and
depth, or read from its files (`longchat.py`); `passkey` is Landmark Attention's; `facts` asks for
several needles at once. What a kind is stands in `KINDS`: a builder and a scoring rule.

The frames of the prompts are published texts: LongChat's (DachengLi1/LongChat, Apache-2.0) and
Landmark Attention's (epfml/landmark-attention, Apache-2.0). The scoring rules are theirs too, but
for topics, where LongChat asks a judge model; here the label must stand in the answer.
"""

import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from longwing.errors import EvalError
from longwing.evals.longchat import Case
from longwing.evals.task import Cell, Model, Result, Sample
from longwing.evals.words import TOPICS, labels, sentences, turns

TOPICS_HEAD = (
    "Below is a record of our previous conversation on {count} different topics. You are the "
    "ASSISTANT, and I am the USER. At the beginning of each topic, the USER will say 'I would like "
    "to discuss the topic of <TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask "
    "you to retrieve the {ordinal} topic. Now the record start. "
)
TOPICS_TAIL = (
    " Now the record ends. What is the {ordinal} topic we discussed? Only give me the topic name. "
    "Do not summarize yourself."
)
LINES_HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each "
    "line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will "
    "ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the "
    "record start:\n\n"
)
LINE = "line {label}: REGISTER_CONTENT is <{value}>\n"
LINES_TAIL = (
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {label}? I need the "
    "number. "
)
GARBAGE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n{before}\n"
    "The pass key is {key}. Remember it. {key} is the pass key.\n{after}\n"
    "What is the pass key? The pass key is"
)
FACTS_HEAD = (
    "Below is a long text. In a few places it gives the storage code of something. Remember these "
    "codes; I will ask you for {count} of them at the end. Now the text starts:\n\n"
)
FACT = "The storage code of the {label} is {value}."
FACTS_TAIL = (
    "\n\nNow the text is over. What are the storage codes of {asked}? Give me the {count} numbers, "
    "in this order, and nothing else."
)

NUM_FACTS = 4
MAX_VALUE = 50_000  # as published: values and keys are drawn from 1 to this

_TURNS_PER_TOPIC = 6
_SENTENCES_PER_PARAGRAPH = 6

Hidden = tuple[str, tuple[str, ...]]
"""A prompt, and what its answer must hold."""


def topics(rng: random.Random, size: int, depth: float) -> Hidden:
    """A record of conversations with `size` exchanges in all; asks for the topic at this depth.

    At depth 0 it is the first topic, as published; elsewhere models must count as well.
    """
    count = min(len(TOPICS), max(2, size // _TURNS_PER_TOPIC))
    chosen = rng.sample(TOPICS, count)
    place = _place(depth, count)
    spoken = turns(rng)
    parts = []
    for number, topic in enumerate(chosen):
        num_turns = size // count + (number < size % count)
        talk = "".join(
            f" \n USER: {ask} \n ASSISTANT: {answer}" for ask, answer in islice(spoken, num_turns)
        )
        parts.append(
            f"USER: I would like to discuss the topic of {topic}. \n ASSISTANT: Sure, I'd be happy "
            f"to talk about that with you! What would you like to know?{talk} \n USER: Great, this "
            f"is the end of our discussion on the topic {topic}, let's talk about the next topic."
        )
    ordinal = _ordinal(place + 1)
    head = TOPICS_HEAD.format(count=count, ordinal=ordinal)
    return head + "".join(parts) + TOPICS_TAIL.format(ordinal=ordinal), (chosen[place],)


def lines(rng: random.Random, size: int, depth: float) -> Hidden:
    """A record of `size` lines with a number each; asks for that of the line at this depth."""
    names = labels(rng, size)
    values = [rng.randint(1, MAX_VALUE) for _ in names]
    place = _place(depth, size)
    record = "".join(
        LINE.format(label=label, value=value) for label, value in zip(names, values, strict=True)
    )
    return LINES_HEAD + record + LINES_TAIL.format(label=names[place]), (str(values[place]),)


def passkey(rng: random.Random, size: int, depth: float) -> Hidden:
    """A number within `size` characters of filler; the text is to be continued by it."""
    key = rng.randint(1, MAX_VALUE)
    filler = " ".join([GARBAGE] * (size // (len(GARBAGE) + 1) + 1))
    before = round(depth * size)
    prompt = PASSKEY.format(key=key, before=filler[:before], after=filler[: size - before])
    return prompt, (str(key),)


def facts(rng: random.Random, size: int, depth: float) -> Hidden:
    """Four numbers within `size` sentences: one at this depth, three anywhere. Asks for all."""
    names = labels(rng, NUM_FACTS)
    values = rng.sample(range(MAX_VALUE // 5, MAX_VALUE + 1), NUM_FACTS)  # all of five digits
    places = [depth, *(rng.random() for _ in names[1:])]
    told = list(islice(sentences(rng), size))
    by_place = sorted(zip(places, names, values, strict=True), reverse=True)
    for place, label, value in by_place:  # from the end, so that earlier places stay where they are
        told.insert(round(place * size), FACT.format(label=label, value=value))
    paragraphs = [
        " ".join(told[at : at + _SENTENCES_PER_PARAGRAPH])
        for at in range(0, len(told), _SENTENCES_PER_PARAGRAPH)
    ]
    order = rng.sample(range(NUM_FACTS), NUM_FACTS)
    *some, last = (f"the {names[at]}" for at in order)
    tail = FACTS_TAIL.format(asked=f"{', '.join(some)} and {last}", count=NUM_FACTS)
    head = FACTS_HEAD.format(count=NUM_FACTS)
    return head + "\n\n".join(paragraphs) + tail, tuple(str(values[at]) for at in order)


def contains_label(answer: str, expected: Sequence[str]) -> float:
    """1 if the label stands in the answer, case and punctuation apart."""
    return float(_plain(expected[0]) in _plain(answer))


def last_integer(answer: str, expected: Sequence[str]) -> float:
    """1 if the last integer of the answer is the one; LongChat's rule."""
    return float(_integers(answer)[-1:] == [_whole(expected[0])])


def first_integer(answer: str, expected: Sequence[str]) -> float:
    """1 if the first integer of the answer is the one; Landmark Attention's rule."""
    return float(_integers(answer)[:1] == [_whole(expected[0])])


def integers_found(answer: str, expected: Sequence[str]) -> float:
    """The part of the expected integers that stand in the answer, in any order."""
    found = set(_integers(answer))
    return sum(_whole(value) in found for value in expected) / len(expected)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of retrieval.

    Attributes:
        build: (rng, size, depth) -> prompt and expected answers; `size` in the kind's own unit.
        score: (answer, expected) -> 0 to 1; only 1 is right.
        chat: whether the prompt is a user's turn.
        max_new_tokens: room for the answer, as published.
        depths: where the needle lies when nobody says.
        least: the smallest size that makes sense.
    """

    build: Callable[[random.Random, int, float], Hidden]
    score: Callable[[str, Sequence[str]], float]
    chat: bool
    max_new_tokens: int
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    least: int


class Retrieval:
    """The task of one kind: cells of generated cases, or of LongChat's.

    Args:
        name: a key of KINDS.
        lengths: tokens of prompt and answer together, one generated cell each.
        characters: sizes of filler in characters, one generated cell each (`passkey` alone).
        num_cases: cases of a cell.
        depths: where the needle lies, spread over the cases; empty: the kind's own.
        seed: another one gives other cases.
        longchat: LongChat's cases by column; with them nothing is generated.
    """

    def __init__(
        self,
        name: str,
        *,
        lengths: Sequence[int],
        characters: Sequence[int] = (),
        num_cases: int,
        depths: Sequence[float] = (),
        seed: int = 0,
        longchat: Mapping[int, Sequence[Case]] | None = None,
    ) -> None:
        self.name = name
        self._kind = KINDS[name]
        self._depths = tuple(depths) or self._kind.depths
        self._seed = seed
        self._longchat = dict(longchat or {})
        self._cells = [
            Cell(
                task=name,
                source="longchat",
                size=column,
                unit=name,
                num_cases=min(num_cases, len(cases)),
                tokens=len(cases[0].prompt) // 4,
            )
            for column, cases in sorted(self._longchat.items())
        ]
        sizes = [("characters", size, size // 4) for size in characters if name == "passkey"]
        sizes += [("tokens", size, size) for size in lengths]
        if not self._longchat:
            self._cells = [
                Cell(
                    task=name,
                    source="generated",
                    size=size,
                    unit=unit,
                    num_cases=num_cases,
                    tokens=tokens,
                )
                for unit, size, tokens in sizes
            ]

    @property
    def cells(self) -> Sequence[Cell]:
        """One for each length, or for each of LongChat's columns."""
        return self._cells

    def samples(self, cell: Cell, model: Model) -> Iterator[Sample]:
        """The cell's cases; a generated one is as long as its tokens allow, to one unit."""
        for index in range(cell.num_cases):
            expected: tuple[str, ...]
            if cell.source == "longchat":
                case = self._longchat[cell.size][index]
                prompt, expected, depth = case.prompt, (case.expected,), case.depth
            else:
                depth = self._depth(index, cell.num_cases)
                prompt, expected = self._made(cell, index, depth, model)
            yield Sample(
                index=index,
                prompt=prompt,
                expected=expected,
                chat=self._kind.chat,
                max_new_tokens=self._kind.max_new_tokens,
                depth=depth,
            )

    def _depth(self, index: int, num_cases: int) -> float:
        """Depths take turns, so that an unfinished cell has seen all of them alike."""
        depths = self._depths
        if num_cases < len(depths):
            return depths[index * len(depths) // num_cases]
        return depths[index % len(depths)]

    def length(self, sample: Sample, model: Model) -> int:
        """Tokens of the prompt in its template, and the room for the answer."""
        prompt = str(sample.prompt)
        return model.count_tokens(prompt, chat=sample.chat) + sample.max_new_tokens

    def measure(self, sample: Sample, model: Model) -> Result:
        """Generate, and score the text."""
        answer = model.generate(str(sample.prompt), sample.max_new_tokens, chat=sample.chat)
        score = self._kind.score(answer.text, sample.expected)
        return Result(
            answer=answer.text,
            score=score,
            correct=score == 1,
            prompt_len=answer.prompt_len,
            num_tokens=answer.num_tokens,
            seconds=answer.seconds,
        )

    def _made(self, cell: Cell, index: int, depth: float, model: Model) -> Hidden:
        kind = self._kind

        def build(size: int) -> Hidden:
            # A generator of its own for each case: none depends on how many were made before.
            rng = random.Random(f"{self.name} {cell.unit} {cell.size} {index} {self._seed}")
            return kind.build(rng, size, depth)

        if cell.unit == "characters":
            return build(cell.size)

        def count(size: int) -> int:
            return model.count_tokens(build(size)[0], chat=kind.chat) + kind.max_new_tokens

        size = largest(count, cell.size, least=kind.least)
        if size is None:
            raise EvalError(
                f"{self.name} at {cell.size} tokens: the shortest such prompt and its answer take "
                f"{count(kind.least)}; ask for a greater length"
            )
        return build(size)


def largest(count: Callable[[int], int], limit: int, *, least: int) -> int | None:
    """About the greatest size whose count is within the limit; None if the least size is not.

    `count` grows with the size, roughly evenly and with some noise, so each guess follows the
    slope so far. Exact to one unit, or one token where units are smaller; never over the limit.
    """
    low, low_count, high = least, count(least), None
    if low_count > limit:
        return None
    base, slope = low_count, max((count(least + 8) - low_count) / 8, 0.01)
    for _ in range(20):  # four or five are enough unless the noise is large
        room = limit - low_count
        step = max(1, int(room / slope))
        if high is not None:
            step = min(step, high - low - 1)
        elif room < slope:
            break
        if step < 1 or room < 1:
            break
        guess, guess_count = low + step, count(low + step)
        if guess_count > limit:
            high = guess
        else:
            low, low_count = guess, guess_count
        slope = max((guess_count - base) / (guess - least), 0.01)
    return low


def _place(depth: float, count: int) -> int:
    """The index at a depth among `count` things in a row."""
    return round(depth * (count - 1))


def _ordinal(number: int) -> str:
    """Such as "first" or "11th"."""
    if number <= len(_ORDINALS):
        return _ORDINALS[number - 1]
    ending = "th" if number % 100 in (11, 12, 13) else _ENDINGS.get(number % 10, "th")
    return f"{number}{ending}"


_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _integers(text: str) -> list[str]:
    """Runs of digits, without leading zeros; as text, since a model may write thousands of them."""
    return [_whole(digits) for digits in re.findall(r"[0-9]+", text)]


def _whole(digits: str) -> str:
    return digits.lstrip("0") or "0"


KINDS: dict[str, Kind] = {
    "topics": Kind(
        build=topics, score=contains_label, chat=True, max_new_tokens=50, depths=(0.0,), least=2
    ),
    "lines": Kind(build=lines, score=last_integer, chat=True, max_new_tokens=100, least=2),
    "passkey": Kind(build=passkey, score=first_integer, chat=False, max_new_tokens=10, least=0),
    "facts": Kind(build=facts, score=integers_found, chat=True, max_new_tokens=100, least=8),
}
