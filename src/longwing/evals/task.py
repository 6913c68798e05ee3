"""What every task speaks of: `Model`, `Sample`, `Cell`, `Result` and `Task`.

A task is a set of cells (all cases of one length), the samples of each, and a way to measure a
model on one. It sees only a `Model`, so the same task judges a loaded model, a server, and the
oracle of a test. Which cells there are is the plan's business (`run.py`).

The one idea: a sample is complete before any model answers it. Its prompt, the answer that is
expected and its place in the grid follow from plan and seed alone, so that two models are asked
the same, and a run that was killed can tell what it has done.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: the answer, without the prompt.
        prompt_len: tokens that were read, template included.
        num_tokens: tokens that were generated.
        seconds: from the question to the last token.
    """

    text: str
    prompt_len: int
    num_tokens: int
    seconds: float


class Model(Protocol):
    """All that a task may ask of a model. Answers are greedy."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def settings(self) -> Mapping[str, object]:
        """JSON values that say what it is and how it runs, for the record."""

    @property
    def context_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens that this prompt costs, the chat template included if `chat`."""

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        """The likeliest answer. `chat`: the prompt is a user's turn, not raw text."""

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        """The natural log-probability of each option's token right after a raw prompt."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a piece of raw text, with nothing put before or after it."""

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """The natural log-probability of each token after those before it.

        If the model's texts begin with a special token, it stands before the first of these;
        else nothing does, and the first entry is None. `count_tokens("")` says how many tokens
        are added in this way.
        """


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its right answer.

    Attributes:
        index: its number within the cell.
        prompt: a text, or token ids where the very tokens are the matter.
        expected: what a right answer holds; several strings where several facts were asked for.
        chat: whether the prompt is put into the model's chat template.
        max_new_tokens: room for the answer.
        depth: where in the document the answer stands, 0 the start and 1 the end; None: all over.
        facts: further JSON values for the record.
    """

    index: int
    prompt: str | tuple[int, ...]
    expected: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = 0
    depth: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the prompt, hex: two runs with the same value asked the same."""
        text = self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All cases of one length of one task.

    Attributes:
        task: the task's name.
        source: where the cases come from: "generated", "longchat", "quality" or a text's name.
        size: how long, in `unit`.
        unit: "tokens" (prompt and answer together), "characters", "topics", "lines", or "" where
            the data alone decides.
        num_cases: how many.
        tokens: about how many tokens a case has, for the time that is left.
    """

    task: str
    source: str
    size: int
    unit: str
    num_cases: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one sample went.

    Attributes:
        answer: what the model wrote or chose; "" where it only read.
        score: from 0 to 1; None where the measure is a loss.
        correct: whether it counts as right; None where the measure is a loss.
        prompt_len: tokens that were read.
        num_tokens: tokens that were generated.
        seconds: how long it took.
        facts: further JSON values for the record.
    """

    answer: str
    score: float | None
    correct: bool | None
    prompt_len: int
    num_tokens: int
    seconds: float
    facts: Mapping[str, object] = field(default_factory=dict)


class Task(Protocol):
    """One thing to measure. Making one reads its data; an unusable file is refused there."""

    @property
    def cells(self) -> Sequence[Cell]:
        """Its cells, shortest first."""

    def samples(self, cell: Cell, model: Model) -> Iterator[Sample]:
        """The cell's cases, in order. They depend on the model by its tokenizer alone.

        Raises:
            EvalError: no sample of that size can be made.
        """

    def length(self, sample: Sample, model: Model) -> int:
        """Tokens that the sample and its answer need."""

    def measure(self, sample: Sample, model: Model) -> Result:
        """Ask the model, and judge what it says."""
