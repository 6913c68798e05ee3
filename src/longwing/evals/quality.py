"""QuALITY: a multiple-choice question over a whole story, answered by the likelier letter.

The prompt is ZeroSCROLLS' and ends in "Answer: (", so that one forward pass decides: whichever of
A, B, C, D has the greatest probability there. Accuracy is told over all questions and over the hard
ones, of which fewer than half of five annotators in a hurry were right.

Reads QuALITY 1.0.1 (one article a line, its questions in a list), and the older flat form. The
data set is not shipped: it states no licence.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from longwing.errors import EvalError
from longwing.evals.journal import parse_line, text_lines
from longwing.evals.task import Cell, Model, Result, Sample

LETTERS = "ABCD"

PROMPT = (
    "You are provided a story and a multiple-choice question with 4 possible answers (marked by A, "
    "B, C, D). Choose the best answer by writing its corresponding letter (either A, B, C, or D)."
    "\n\nStory:\n{story}\n\nQuestion and Possible Answers:\n{question}\n (A) {a}\n (B) {b}\n"
    " (C) {c}\n (D) {d}\n\nAnswer: ("
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        id: unique among all.
        story: the article as plain text.
        text: the question.
        options: the four answers.
        gold: which is right, 0 to 3.
        hard: whether readers in a hurry mostly failed.
    """

    id: str
    story: str
    text: str
    options: tuple[str, ...]
    gold: int
    hard: bool

    @property
    def prompt(self) -> str:
        """What the model reads; the letter comes next."""
        a, b, c, d = self.options
        return PROMPT.format(story=self.story, question=self.text, a=a, b=b, c=c, d=d)


class Quality:
    """The task.

    Args:
        file: QuALITY's articles, a JSON object a line.
        num_cases: questions to take; None: all.
        seed: which, if not all.
    """

    def __init__(self, file: Path, *, num_cases: int | None = None, seed: int = 0) -> None:
        questions = read_questions(file)
        if num_cases is not None and num_cases < len(questions):
            questions = random.Random(f"quality {seed}").sample(questions, num_cases)
        self._questions = questions
        self._cell = Cell(
            task="quality",
            source="quality",
            size=0,
            unit="",
            num_cases=len(questions),
            tokens=len(questions[0].prompt) // 4,
        )

    @property
    def cells(self) -> Sequence[Cell]:
        """One: the stories are as long as they are."""
        return (self._cell,)

    def samples(self, cell: Cell, model: Model) -> Iterator[Sample]:
        """The questions."""
        for index, question in enumerate(self._questions):
            yield Sample(
                index=index,
                prompt=question.prompt,
                expected=(LETTERS[question.gold],),
                max_new_tokens=1,
                facts={"question": question.id, "hard": question.hard},
            )

    def length(self, sample: Sample, model: Model) -> int:
        """Tokens of the prompt and the letter, and the answer that servers keep room for."""
        return model.count_tokens(str(sample.prompt), chat=False) + 2

    def measure(self, sample: Sample, model: Model) -> Result:
        """Compare the four letters' log-probabilities."""
        prompt = str(sample.prompt)
        started = time.perf_counter()
        logprobs = model.choose(prompt, LETTERS)
        seconds = time.perf_counter() - started
        letter = LETTERS[max(range(len(LETTERS)), key=logprobs.__getitem__)]
        correct = letter == sample.expected[0]
        return Result(
            answer=letter,
            score=float(correct),
            correct=correct,
            prompt_len=model.count_tokens(prompt, chat=False),
            num_tokens=1,
            seconds=seconds,
            facts={"logprobs": [round(value, 5) for value in logprobs]},
        )


def read_questions(file: Path) -> list[Question]:
    """Every question once, in the file's order, of either form.

    Raises:
        EvalError: the file cannot be read, or a line holds no article; names the line.
    """
    questions: dict[str, Question] = {}
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        record = parse_line(line, file, number)
        read = _nested if "questions" in record else _flat
        try:
            for question in read(record):
                questions.setdefault(question.id, question)
        except (KeyError, IndexError, TypeError, ValueError) as fault:
            raise EvalError(
                f"{file}, line {number}: not an article of QuALITY "
                f"({type(fault).__name__}: {fault}); take the file as QuALITY publishes it, with "
                "its gold labels"
            ) from None
    if not questions:
        raise EvalError(f"{file} holds no question; take the file as QuALITY publishes it")
    return list(questions.values())


def plain_text(html: str) -> str:
    """An article's text: blocks on lines of their own, what is not shown left out."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    blocks = "".join(parser.pieces).split("\n\n")
    return "\n\n".join(block for text in blocks if (block := " ".join(text.split())))


def _nested(record: Mapping[str, object]) -> Iterator[Question]:
    story = plain_text(_text(record["article"]))
    for item in _list(record["questions"]):
        if not isinstance(item, dict):
            raise TypeError("a question is no object")
        yield _question(
            id=_text(item["question_unique_id"]),
            story=story,
            text=_text(item["question"]),
            options=_list(item["options"]),
            gold_label=item["gold_label"],
            hard=bool(item["difficult"]),
        )


def _flat(record: Mapping[str, object]) -> Iterator[Question]:
    story = plain_text("".join(map(_text, _list(record["article"]))))
    number = 1
    while f"question{number}" in record:
        name = f"question{number}"
        gold_label, hurried = (
            record[f"{name}_gold_label"],
            record[f"{name}_annotator_speed_answers"],
        )
        answers = _list(hurried)
        right = sum(str(answer) == str(gold_label) for answer in answers)
        yield _question(
            id=f"{record['unique_id']}_{number}",
            story=story,
            text=_text(record[name]),
            options=[record[f"{name}option{option}"] for option in range(1, 5)],
            gold_label=gold_label,
            hard=2 * right < len(answers),
        )
        number += 1
    if number == 1:
        raise KeyError("questions")


def _question(
    *, id: str, story: str, text: str, options: Sequence[object], gold_label: object, hard: bool
) -> Question:
    gold = int(str(gold_label)) - 1
    if len(options) != len(LETTERS) or not 0 <= gold < len(LETTERS):
        raise ValueError(f"{len(options)} options and gold label {gold_label}; there must be 4")
    chosen = tuple(_text(option).strip() for option in options)
    return Question(id=id, story=story, text=text.strip(), options=chosen, gold=gold, hard=hard)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} stands where text should")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} stands where a list should")
    return value


class _Text(HTMLParser):
    """Collects text; a block's border becomes an empty line."""

    _BLOCKS = frozenset(
        (
            *("body", "blockquote", "div", "h1", "h2", "h3", "h4", "h5", "h6"),
            *("hr", "li", "ol", "p", "pre", "table", "tr", "ul"),
        )
    )
    _HIDDEN = frozenset(("style", "script", "title"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a border, or the start of what is not shown."""
        self._hidden += tag in self._HIDDEN
        if tag in self._BLOCKS or tag == "br":
            self.pieces.append("\n\n" if tag in self._BLOCKS else " ")

    def handle_endtag(self, tag: str) -> None:
        """Note a border, or the end of what is not shown."""
        self._hidden = max(0, self._hidden - (tag in self._HIDDEN))
        if tag in self._BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Keep what is shown."""
        if not self._hidden:
            # An empty line inside running text is layout of the source, not a border.
            self.pieces.append(" ".join(data.split("\n")))
