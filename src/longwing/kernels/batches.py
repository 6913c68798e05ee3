"""`Batch`: sequences of a step that attention reads in one call on a CPU; and how they are chosen.

Made once a step (`AttentionInputs.work`) and read by every layer; the attention itself is in
`attention.py`.

Shape key: S sequences of a batch, T new tokens of each, M pages of the longest context, C its
tokens, G query heads of one KV head, L = T * G.

The one idea: a call of the attention kernel costs about as much as 200 tokens of context, and so
does each question asked of a tensor on the way. So the page tables are read into Python once a
step, and sequences of about the same length that bring equally many tokens share one padded call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SHARED_NEW_LEN = 32
"""Sequences with more new tokens than this get a call of their own: it is busy enough."""

SHARED_CONTEXT = 2**15
"""Context, in tokens with padding, that one shared call may copy together."""

PADDING = 0.25
"""Share of the longest context that a shorter one may be padded by."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One sequence of a step: its tokens [start, stop), and its context, page by page."""

    start: int
    stop: int
    context_len: int
    pages: list[int]

    @property
    def new_len(self) -> int:
        """Tokens that it brings."""
        return self.stop - self.start

    @property
    def run(self) -> slice | None:
        """The pages as a slice, where they lie one after another."""
        return _run(self.pages)

    def within(self, window: int | None, page_len: int) -> "Span":
        """The same without the pages that lie before everything its tokens can see."""
        unseen = 0 if window is None else max(0, self.context_len - self.new_len - window + 1)
        drop = unseen // page_len
        if drop == 0:
            return self
        return Span(
            start=self.start,
            stop=self.stop,
            context_len=self.context_len - drop * page_len,
            pages=self.pages[drop:],
        )


class Batch:
    """Sequences that share one call: all bring T tokens, contexts padded to the longest.

    Attributes:
        new_len: T.
        num_sequences: S.
        num_tokens: S * T.
        context_len: C, of the longest.
        tokens: where the S * T tokens lie among those of the step.
        pages: the pages to read, M for each: a run where they lie in order, else (S * M,)
            indices. A shorter sequence's last page is read again for padding.
        slots: how many slots of each page.
        alone: the batch is one sequence without padding, so causality and window are all there is
            to mask.
    """

    def __init__(
        self, spans: Sequence[Span], page_len: int, window: int | None, device: torch.device
    ) -> None:
        self.new_len = spans[0].new_len
        self.num_sequences = len(spans)
        self.num_tokens = len(spans) * self.new_len
        self.alone = len(spans) == 1
        self._lens = [span.context_len for span in spans]
        self._window = window
        self._device = device
        num_pages = max(len(span.pages) for span in spans)
        longest = max(self._lens)
        # One page each need not be read whole; several must be, to follow one another.
        self.slots = longest if num_pages == 1 else page_len
        self.context_len = longest if self.alone else num_pages * self.slots
        self.tokens: slice | Tensor = slice(spans[0].start, spans[-1].stop)
        if any(a.stop != b.start for a, b in pairwise(spans)):
            tokens = [t for span in spans for t in range(span.start, span.stop)]
            self.tokens = torch.tensor(tokens, device=device)
        padded = [page for span in spans for page in _padded(span.pages, num_pages)]
        run = _run(padded)
        self.pages: slice | Tensor = torch.tensor(padded, device=device) if run is None else run
        self._bias: Tensor | None = None

    def bias_S1LC(self, group: int, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of L = T * group queries: 0 where seen, -inf where not.

        Made on the first call, for all layers. None when every query sees everything.
        """
        whole = self.new_len == 1 and all(length == self.context_len for length in self._lens)
        if whole and (self._window is None or self._window >= self.context_len):
            return None
        if self._bias is None or self._bias.dtype != dtype:
            lens_S = torch.tensor(self._lens, device=self._device)
            positions_ST = lens_S[:, None] - self.new_len
            positions_ST = positions_ST + torch.arange(self.new_len, device=self._device)
            key_C = torch.arange(self.context_len, device=self._device)
            seen_STC = key_C <= positions_ST[..., None]
            if self._window is not None:
                seen_STC &= key_C > positions_ST[..., None] - self._window
            bias_STC = torch.zeros(seen_STC.shape, dtype=dtype, device=self._device)
            bias_STC.masked_fill_(~seen_STC, float("-inf"))
            # One token's heads see alike, and a single row is broadcast over them for free.
            self._bias = bias_STC if self.new_len == 1 else bias_STC.repeat_interleave(group, 1)
        return self._bias[:, None]


def batches(
    spans: Sequence[Span], page_len: int, window: int | None, device: torch.device
) -> tuple[Batch, ...]:
    """Share out a step's sequences over as few calls as padding and memory allow."""
    longest_first = sorted(
        (span for span in spans if span.new_len > 0),
        key=lambda span: (span.new_len, -span.context_len),
    )
    groups: list[list[Span]] = []
    for span in longest_first:
        if groups and _may_join(groups[-1], span, page_len):
            groups[-1].append(span)
        else:
            groups.append([span])
    for group in groups:
        group.sort(key=lambda span: span.start)
    return tuple(Batch(group, page_len, window, device) for group in groups)


def _run(pages: list[int]) -> slice | None:
    """Pages as a slice, when they lie one after another."""
    first, count = pages[0], len(pages)
    return slice(first, first + count) if pages == [*range(first, first + count)] else None


def _padded(pages: list[int], num_pages: int) -> list[int]:
    return pages + pages[-1:] * (num_pages - len(pages))


def _may_join(group: list[Span], span: Span, page_len: int) -> bool:
    longest = group[0].context_len
    return (
        span.new_len == group[0].new_len <= SHARED_NEW_LEN
        and longest - span.context_len <= max(page_len, PADDING * longest)
        and (len(group) + 1) * longest <= SHARED_CONTEXT
    )
