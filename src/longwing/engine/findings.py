"""What a benchmark is to measure, and what it found: plain values.

`bench.py` does the measuring. A field says in what unit; a line that was not measured says why.
"""

from dataclasses import dataclass, field

from longwing.engine.footprint import Footprint
from longwing.errors import RequestError

_LEAST_CHUNK = 256
"""Tokens of a prompt that a step reads beside those who decode, at the least by default."""

WARM_TOKENS = 4
"""Tokens of each sequence before the clock starts: a first step of a shape compiles kernels."""


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What is to be measured.

    Attributes:
        decodes: whether to time decoding, every batch at every context.
        batches: sequences decoding at once.
        contexts: tokens behind each of them.
        prompts: lengths of prompts to read, in tokens.
        drafts: numbers of guessed tokens checked in a step, at the first batch and context.
        tokens: of each sequence in one measurement.
        repeats: measurements; their median counts.
        reads: read the contexts really, token by token, instead of inventing their pages.

    Raises:
        RequestError: a number is below 1.
    """

    decodes: bool = True
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (1024,)
    prompts: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    tokens: int = 32
    repeats: int = 5
    reads: bool = False

    def __post_init__(self) -> None:
        numbers = (*self.batches, *self.contexts, *self.prompts, *self.drafts)
        if min(*numbers, self.tokens, self.repeats, 1) < 1:
            raise RequestError("batches, lengths, drafts, tokens and repeats must be 1 or more")
        if not (self.batches and self.contexts):
            raise RequestError("at least one batch and one context are needed")

    @property
    def room(self) -> int:
        """Tokens that a sequence may grow by: while it is measured, and while others begin."""
        steps_to_begin = 2 + (max(self.contexts) // _LEAST_CHUNK if self.reads else 0)
        beginning = max(self.batches) * steps_to_begin
        return beginning + WARM_TOKENS + self.tokens * self.repeats + max(self.drafts, default=0)

    @property
    def longest(self) -> int:
        """The context that an engine must be loaded for."""
        decoded = max(self.contexts, default=0) + self.room
        return max(decoded, max(self.prompts, default=0) + 1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the result.

    Attributes:
        what: "decode", "check drafts" or "prefill".
        batch: sequences at once.
        context: tokens behind each of them; of a prefill, the prompt.
        drafts: guessed tokens checked in each step.
        ms: a step's time, or a whole prompt's; the median. None if it was not measured.
        ms_low: the least of the repeats.
        ms_high: the greatest.
        tokens_per_s: of all sequences together; with drafts, if none of them is right.
        floor_ms: what memory bandwidth, or of a prefill the matrix rate, allows at best.
        note: why it was not measured, or "".
    """

    what: str
    batch: int
    context: int
    drafts: int = 0
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    tokens_per_s: float | None = None
    floor_ms: float | None = None
    note: str = ""

    @property
    def of_ceiling(self) -> float | None:
        """Part of the measured bandwidth, or matrix rate, that was put to use."""
        if self.ms is None or self.floor_ms is None:
            return None
        return self.floor_ms / self.ms


@dataclass(frozen=True, kw_only=True)
class Quoting:
    """What prompt lookup gains on an answer, which is the same with and without it.

    Attributes:
        num_tokens: of the answer.
        quoted: part of them that goes on a passage of the prompt.
        plain_tokens_per_s: without drafts.
        tokens_per_s: with drafts.
        num_drafted: tokens guessed.
        num_accepted: of these, right.
        same: whether both answers were equal (on a GPU sums of other widths may round otherwise).
    """

    num_tokens: int
    quoted: float
    plain_tokens_per_s: float
    tokens_per_s: float
    num_drafted: int
    num_accepted: int
    same: bool

    @property
    def gain(self) -> float:
        """How many times faster."""
        return self.tokens_per_s / self.plain_tokens_per_s


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What loading took.

    Attributes:
        seconds: from the folder to an engine with its cache.
        warm_up_s: its first steps of each shape, in which kernels are compiled.
        stored_bytes: tensors in the folder.
    """

    seconds: float
    warm_up_s: float
    stored_bytes: int


@dataclass(kw_only=True)
class Findings:
    """Everything found so far.

    Attributes:
        lines: one a measurement.
        quoting: what drafts gain, if that was measured.
        memory: the peaks.
        complete: whether all was measured.
    """

    lines: list[Measured] = field(default_factory=list)
    quoting: Quoting | None = None
    memory: Footprint | None = None
    complete: bool = False
