"""`DecodeGraphs`: decoding steps as CUDA graphs, recorded when their shape is first met.

Decoding launches some hundreds of small kernels a token, and to launch them one by one takes longer
than they run. A graph is the same launches recorded once and started as one. It is recorded for
fixed addresses and fixed grids; so a step is written into fixed tensors (one small copy; page
tables only as they grow) and padded up to the next shape that graphs are recorded for.

The one idea: padding is nobody's. A padded token's slot is negative, so nothing is stored for it;
a padded sequence has no tokens, so attention passes it over; and what is computed for them in
between nobody reads.

Shape key: T tokens of a step, S sequences, M pages of a table, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwing.engine.adapters import AdapterTable
from longwing.engine.rotations import Rotations
from longwing.engine.sequence import Work
from longwing.kernels import AttentionInputs, KVPages, attends_in_triton
from longwing.models import Decoder

MOST_TOKENS = 64
"""Larger steps are launched one kernel at a time: by then the GPU has enough to do."""

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, MOST_TOKENS)
"""Sequences of a decoding step. Products take up to 2, 8, 16, 32 or 64 tokens in one tile."""

CONTEXTS = (1024, 2048, 4096, 8192)
"""Bounds on the context that graphs are recorded for, and the whole context. Attention is cut
accordingly; beyond the last it is cut no finer (`paged_triton.MAX_SPLITS`)."""


def can_record(model: Decoder, pages: KVPages) -> bool:
    """Whether a model's steps can be recorded: on a GPU, and nothing in them asks the host."""
    config = model.config
    q_TNH = torch.empty(
        (1, config.num_heads, config.head_dim), dtype=model.dtype, device=model.device
    )
    return (
        q_TNH.is_cuda
        and attends_in_triton(q_TNH, pages)
        and all(linear.packed is None for _, linear in model.linears())
    )


@dataclass(frozen=True)
class Shape:
    """What a graph is recorded for.

    Attributes:
        tokens: T.
        sequences: S.
        most_new: no sequence brings more tokens.
        most_context: no context is longer.
    """

    tokens: int
    sequences: int
    most_new: int
    most_context: int


class DecodeGraphs:
    """Runs the decoding steps of one model.

    Args:
        model: see `can_record`. On a CPU, for tests, steps are padded all the same and then run.
        pages: the cache, one for each layer.
        context: longest sequence in tokens.
        most_sequences: sequences of a step at most.
        rotations: the model's.
        adapters: likewise, if it has any.
    """

    def __init__(
        self,
        model: Decoder,
        pages: tuple[KVPages, ...],
        *,
        context: int,
        most_sequences: int,
        rotations: Rotations,
        adapters: AdapterTable | None = None,
    ) -> None:
        self.model, self.pages, self.rotations = model, pages, rotations
        self.adapters = adapters
        self.page_len = pages[0].page_len
        self.contexts = (*(bound for bound in CONTEXTS if bound < context), context)
        self.most_sequences = min(most_sequences, MOST_TOKENS)
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._numbers = _Mirrored(6, MOST_TOKENS + 1, model.device)
        self._tables = _Mirrored(self.most_sequences, -(-context // self.page_len), model.device)
        self._written: list[tuple[list[int], int]] = [([], 0)] * self.most_sequences
        self._read = torch.cuda.Event() if model.device.type == "cuda" else None
        self._have_read()

    def __len__(self) -> int:
        return len(self._graphs)

    def shape(self, batch: Sequence[Work]) -> Shape | None:
        """The shape that a step is padded to; None if it reads prompts, or is too large."""
        if len(batch) > self.most_sequences or any(
            not work.wants_token or len(work.token_ids) != 1 + work.num_drafts for work in batch
        ):
            return None
        longest = max(work.start + len(work.token_ids) for work in batch)
        return self.padded([len(work.token_ids) for work in batch], longest)

    def padded(self, new_lens: Sequence[int], longest: int) -> Shape | None:
        """The smallest shape that holds so many new tokens of each; None if there is none.

        Shapes are few, since each is recorded when it is first met, in a quarter of a second.
        """
        sequences = min(_padded_batch(len(new_lens)), self.most_sequences)
        context = next(bound for bound in self._contexts(sequences) if longest <= bound)
        if max(new_lens) == 1:
            return Shape(sequences, sequences, 1, context)
        tokens = max(_LEAST_DRAFTED, _power_of_two(sum(new_lens)))
        if tokens > MOST_TOKENS:
            return None
        most_new = max(_LEAST_DRAFTED, _power_of_two(max(new_lens)))
        return Shape(tokens, sequences, most_new, context)

    def usual_shapes(self) -> list[Shape]:
        """Those of plain decoding: every batch, at each bound on its context."""
        sizes = sorted({_padded_batch(num) for num in range(1, self.most_sequences + 1)})
        batches = dict.fromkeys(min(size, self.most_sequences) for size in sizes)
        return [Shape(num, num, 1, bound) for num in batches for bound in self._contexts(num)]

    def _contexts(self, num_sequences: int) -> tuple[int, ...]:
        """Several sequences keep a GPU busy however their attention is cut, so two bounds do."""
        every = self.contexts
        return every if num_sequences == 1 or len(every) == 1 else (every[0], every[-1])

    def run(self, batch: Sequence[Work], shape: Shape, tokens_T: Tensor | None = None) -> Tensor:
        """The step's hidden states, (its tokens, D); they hold until the next step.

        Args:
            batch: the step.
            shape: its shape.
            tokens_T: its tokens, int64 on the device, where the host does not know them yet.
        """
        num_tokens = self._write(batch, shape)
        try:
            if tokens_T is not None:
                self._numbers.on_device[0, :num_tokens].copy_(tokens_T)
            if self.model.device.type != "cuda":
                return self._forward(shape)[:num_tokens]
            if shape not in self._graphs:
                self._record(shape)
            graph, hidden_TD = self._graphs[shape]
            graph.replay()
        finally:  # What has failed may have begun.
            self._have_read()
        return hidden_TD[:num_tokens]

    def record(self, shape: Shape) -> None:
        """Record a shape ahead of its first use, with a step of padding alone."""
        if shape not in self._graphs:
            self._write((), shape)
            self._record(shape)

    def _record(self, shape: Shape) -> None:
        """Record the step that was last written, after running it once to compile its kernels.

        What it writes to the cache its replay will write again.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                self._forward(shape)
                torch.cuda.synchronize()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    hidden_TD = self._forward(shape)
        finally:
            current.wait_stream(self._stream)
        self._graphs[shape] = (graph, hidden_TD)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Of a higher priority than the side branches of `models.branch.Branch`."""
        return torch.cuda.Stream(self.model.device, priority=-1)

    @cached_property
    def _sending(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.model.device)

    @cached_property
    def _pool(self) -> Any:
        """Graphs run one at a time, so they share their memory."""
        return torch.cuda.graph_pool_handle()

    def _forward(self, shape: Shape) -> Tensor:
        T, S = shape.tokens, shape.sequences
        tokens, rows, slots, lens, starts, owners = self._numbers.on_device
        if self.adapters is not None:
            self.adapters.choose_from(owners[:T])
        cos_TF, sin_TF = self.rotations.at(rows[:T])
        inputs = AttentionInputs(
            starts_S1=starts[: S + 1],
            context_lens_S=lens[:S],
            page_tables_SM=self._tables.on_device[:S],
            slots_T=slots[:T],
            pages=self.pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
            most_new=shape.most_new,
            most_context=shape.most_context,
        )
        return self.model(tokens[:T], rows[:T], inputs)

    def _write(self, batch: Sequence[Work], shape: Shape) -> int:
        """Write a step where graphs read it; its number of tokens."""
        tokens, rows, slots, lens, starts, owners = self._numbers.for_writing()
        at = 0
        for s, work in enumerate(batch):
            pages, first_row = work.sequence.pages, self.rotations.first_row(work.sequence.key.rung)
            starts[s] = at
            if self.adapters is not None:
                owner = self.adapters.index(work.sequence.key.adapter)
                owners[at : at + len(work.token_ids)] = owner
            for position, token in enumerate(work.token_ids, work.start):
                page, slot = divmod(position, self.page_len)
                tokens[at] = token
                rows[at] = first_row + position
                slots[at] = pages[page] * self.page_len + slot
                at += 1
            lens[s] = work.start + len(work.token_ids)
            self._write_table(s, pages)
        starts[len(batch) : shape.sequences + 1] = at
        lens[len(batch) : shape.sequences] = 0
        tokens[at : shape.tokens] = rows[at : shape.tokens] = 0
        slots[at : shape.tokens] = -1
        self._send()
        return at

    def _send(self) -> None:
        """Bring what was written to the device as soon as the last step has read what is there.

        In a line of its own, so that it is there when the last step's tokens are: to begin and end
        a copy among kernels takes longer than the copy.
        """
        if self._read is None:
            self._numbers.copy()
            self._tables.copy()
            return
        self._sending.wait_event(self._read)
        with torch.cuda.stream(self._sending):
            self._numbers.copy()
            self._tables.copy()
        torch.cuda.current_stream(self.model.device).wait_stream(self._sending)

    def _have_read(self) -> None:
        """Whatever is sent next comes after all that the device has been given so far."""
        if self._read is not None:
            self._read.record(torch.cuda.current_stream(self.model.device))

    def _write_table(self, s: int, pages: list[int]) -> None:
        """Bring a row up to date. The scheduler only appends to a list of pages, or takes a new."""
        known, num = self._written[s]
        if known is not pages:
            num = 0
        if num < len(pages):
            self._tables.for_writing()[s, num : len(pages)] = pages[num:]
            self._written[s] = (pages, len(pages))


class _Mirrored:
    """A matrix of int32 that the host writes and the device reads.

    Attributes:
        on_device: rows of a multiple of 16 bytes, so that each begins where any kernel may load.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        shape = (num_rows, -(-num_columns // 4) * 4)
        self._on_host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._as_numpy = self._on_host.numpy()
        self._changed = False
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.on_device = torch.zeros(shape, dtype=torch.int32, device=device)

    def for_writing(self) -> np.ndarray:
        """The host's side, once its last copy is through."""
        if not self._changed and self._copied is not None:
            self._copied.synchronize()
        self._changed = True
        return self._as_numpy

    def copy(self) -> None:
        """Send it to the device, if it was given out for writing."""
        if self._changed:
            self.on_device.copy_(self._on_host, non_blocking=True)
            if self._copied is not None:
                self._copied.record(torch.cuda.current_stream(self.on_device.device))
            self._changed = False


def _padded_batch(num: int) -> int:
    """The next size of a batch that graphs are recorded for."""
    return next(size for size in BATCHES if num <= size)


_LEAST_DRAFTED = 8
"""Tokens that a product takes in any case."""


def _power_of_two(num: int) -> int:
    """The next power of two from num on."""
    return 1 << (num - 1).bit_length()
