"""Perplexity: how well a model foretells a text, and where in the window it gets better or worse.

A text is cut into windows of one length, each read on its own from position 0. From one reading of
a window come three figures: the loss over all it foretold, the loss in each of 32 stretches
of positions (a model past its trained length shows it here), and the loss of the last tokens alone,
which have the whole length before them.

With a stride below the length the windows overlap, and each counts only the tokens that the one
before had not reached: the sliding-window figure, in which nearly every token has a long past.

Several texts are read one after the other; no window reaches from one into the next.

Loss is in nats per token; perplexity is its exponential.
"""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from longwing.errors import EvalError
from longwing.evals.journal import read_text
from longwing.evals.task import Cell, Model, Result, Sample

NUM_STRETCHES = 32
LAST_LEN = 256
"""Tokens at the end of a window that `last_nll` is about; a quarter of the window if less."""

_SLICE = 100_000
"""Characters encoded at once: a book in one piece would take some tokenizers its square."""

_TOKENS_PER_CHAR = 0.25


class Perplexity:
    """The task.

    Args:
        files: texts, UTF-8.
        lengths: tokens of a window, one cell each; a special token that begins the model's texts
            is one of them.
        num_cases: windows of a cell at most; None: all there are.
        stride: tokens from one window's start to the next one's; None: the length.
        max_tokens: use no more than so many tokens of each text, so that every length reads the
            same; None: all of it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        lengths: Sequence[int],
        num_cases: int | None = None,
        stride: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        for length in lengths:
            if length < 2:
                raise EvalError(f"a window of {length} tokens foretells nothing; 2 is the least")
            if stride is not None and not 1 <= stride <= length:
                raise EvalError(f"a stride of {stride} does not fit windows of {length} tokens")
        self._texts = [_Text(file, max_tokens) for file in files]
        self._num_cases = num_cases
        self._stride = stride
        self._cells = [
            Cell(
                task="perplexity",
                source=files[0].name if len(files) == 1 else f"{len(files)} texts",
                size=length,
                unit="tokens",
                num_cases=self._about(length),
                tokens=length,
            )
            for length in sorted(set(lengths))
        ]

    @property
    def cells(self) -> Sequence[Cell]:
        """One for each window length; its number of cases is a guess until the text is encoded."""
        return self._cells

    def samples(self, cell: Cell, model: Model) -> Iterator[Sample]:
        """The windows, from the start of each text; its last one may be shorter.

        Raises:
            EvalError: a text is shorter than a window.
        """
        length = cell.size - model.count_tokens("", chat=False)
        stride = min(self._stride or length, length)
        index = 0
        for text in self._texts:
            reached = 0  # tokens of the text that an earlier window foretold, or began with
            for start in count(0, stride):
                window = tuple(text.tokens(model, start, start + length))
                if start == 0 and len(window) < length:
                    raise EvalError(
                        f"{text.file} has {len(window):,} tokens, less than one window of "
                        f"{length:,}; give more text or a shorter length"
                    )
                if start + len(window) <= max(reached, start + 1):
                    break  # nothing new to foretell
                if index == self._num_cases:
                    return
                first = max(0, reached - start)
                facts = {"text": text.file.name, "first": first, "window": length}
                yield Sample(index=index, prompt=window, facts=facts)
                reached = start + len(window)
                index += 1

    def length(self, sample: Sample, model: Model) -> int:
        """Tokens of the window."""
        return len(sample.prompt) + model.count_tokens("", chat=False)

    def measure(self, sample: Sample, model: Model) -> Result:
        """Read the window, and sum its losses."""
        ids = [token for token in sample.prompt if isinstance(token, int)]
        started = time.perf_counter()
        losses = [None if value is None else -value for value in model.logprobs(ids)]
        seconds = time.perf_counter() - started
        first, window = (int(str(sample.facts[name])) for name in ("first", "window"))
        counted = [
            (position, loss)
            for position, loss in enumerate(losses)
            if loss is not None and position >= first
        ]
        last_len = min(LAST_LEN, max(1, window // 4))
        # A text's last window may be shorter: its end does not have the whole length before it.
        last = losses[-last_len:] if len(ids) == window else []
        return Result(
            answer="",
            score=None,
            correct=None,
            prompt_len=len(ids),
            num_tokens=0,
            seconds=seconds,
            facts={
                **_sum("", [loss for _, loss in counted]),
                **_sum("last_", [loss for loss in last if loss is not None]),
                "stretches": _stretches(counted, window),
            },
        )

    def _about(self, length: int) -> int:
        """Windows that the texts will give, guessed from their characters."""
        stride = self._stride or length
        windows = sum(max(1, math.ceil(text.about / stride)) for text in self._texts)
        return min(windows, self._num_cases or windows)


class _Text:
    """A text that is encoded as far as it is needed.

    Attributes:
        file: where it lies.
        about: tokens it has, guessed.
    """

    def __init__(self, file: Path, max_tokens: int | None) -> None:
        self.file = file
        self._text = read_text(file)
        self._max_tokens = max_tokens
        self._ids: list[int] = []
        self._encoded = 0  # characters of the text that are in _ids
        self.about = min(len(self._text) * _TOKENS_PER_CHAR, max_tokens or math.inf)

    def tokens(self, model: Model, start: int, end: int) -> list[int]:
        """Token ids of the text from start to end, encoding no more of it than is needed."""
        end = min(end, self._max_tokens or end)
        while len(self._ids) < end and self._encoded < len(self._text):
            piece = self._text[self._encoded : self._encoded + _SLICE]
            self._ids += model.encode(piece)
            self._encoded += len(piece)
        return self._ids[start:end]


def _sum(name: str, losses: Sequence[float]) -> dict[str, object]:
    return {f"{name}nll": round(math.fsum(losses), 6), f"{name}tokens": len(losses)}


def _stretches(counted: Sequence[tuple[int, float]], length: int) -> list[list[float]]:
    """[summed loss, tokens] of each of 32 equal stretches of the window's positions."""
    sums = [[0.0, 0] for _ in range(NUM_STRETCHES)]
    for position, loss in counted:
        stretch = sums[position * NUM_STRETCHES // length]
        stretch[0] += loss
        stretch[1] += 1
    return [[round(total, 6), count] for total, count in sums]
