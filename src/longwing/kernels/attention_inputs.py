"""`AttentionInputs`: what one step says about its sequences, to every layer's attention.

Shape key: T packed new tokens of all sequences, S sequences, M pages in the longest page table, B
slots in a page, F rotary frequencies (half the head dim).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from longwing.kernels.batches import Batch, Span, batches
from longwing.kernels.pages import KVPages


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What one step tells attention: who the tokens belong to, and where their context lies.

    Attributes:
        starts_S1: (S + 1,) int32; sequence s owns tokens [starts[s], starts[s + 1]).
        context_lens_S: (S,) int32; tokens in the cache once this step has written its own.
        page_tables_SM: (S, M) int32; page_tables[s, i] is the page of slots [i * B, (i + 1) * B).
        slots_T: (T,) int64; where token t's key and value go, as page * B + slot.
        pages: one KVPages a layer.
        cos_TF: (T, F) float32, the rotation of each token under its own sequence's RoPE base;
            None for a model without rotary positions.
        sin_TF: as cos_TF.
        most_new: no sequence brings more tokens than this, if that is known without looking.
        most_context: no context is longer than this, likewise.
        num_decoding: so many sequences, from the first, are known to bring one token each.
        ends_S: (S,) int32, the tokens that attend, where only each sequence's last does: `ends`.
            Queries, and sequences' shares of them, are then those S; what is written stays T.
    """

    starts_S1: Tensor
    context_lens_S: Tensor
    page_tables_SM: Tensor
    slots_T: Tensor
    pages: tuple[KVPages, ...]
    cos_TF: Tensor | None = None
    sin_TF: Tensor | None = None
    most_new: int | None = None
    most_context: int | None = None
    num_decoding: int = 0
    ends_S: Tensor | None = None

    def ends(self) -> "AttentionInputs":
        """The same step where all tokens are written, but only each sequence's last one attends.

        That is all that is wanted of a model's last block: what it gives for the others would be
        read by no further block. To attention it is a step of decoding. Every sequence must bring a
        token.
        """
        starts_S1 = torch.arange(
            len(self.starts_S1), dtype=torch.int32, device=self.starts_S1.device
        )
        return replace(
            self, starts_S1=starts_S1, most_new=1, num_decoding=0, ends_S=self.starts_S1[1:] - 1
        )

    @cached_property
    def calls(self) -> tuple["AttentionInputs", ...]:
        """What a GPU's attention is called for, over all tokens each time; made once a step.

        Twice where some sequences decode beside others that read prompts. What is cut for many
        tokens would leave a decoding one's whole context to one program for each KV head.
        """
        num = self.num_decoding
        if not 0 < num < len(self.context_lens_S):
            return (self,)
        one, rest = (
            replace(
                self,
                starts_S1=self.starts_S1[part.start : part.stop + 1],
                context_lens_S=self.context_lens_S[part],
                page_tables_SM=self.page_tables_SM[part],
                num_decoding=0,
            )
            for part in (slice(0, num), slice(num, len(self.context_lens_S)))
        )
        return replace(one, most_new=1), rest

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every sequence of the step, in order. Reads the tensors once, on the first call."""
        starts, page_len = self.starts_S1.tolist(), self.pages[0].page_len
        spans = []
        for s, context_len in enumerate(self.context_lens_S.tolist()):
            table = self.page_tables_SM[s, : -(-context_len // page_len)].tolist()
            spans.append(
                Span(start=starts[s], stop=starts[s + 1], context_len=context_len, pages=table)
            )
        return tuple(spans)

    def work(self, window: int | None) -> tuple[Batch, ...]:
        """The calls that attention makes in a layer with this window; made once a step."""
        if window not in self._works:
            seen = [span.within(window, self.pages[0].page_len) for span in self.spans]
            self._works[window] = batches(seen, self.pages[0].page_len, window, self.slots_T.device)
        return self._works[window]

    @cached_property
    def _works(self) -> dict[int | None, tuple[Batch, ...]]:
        return {}


def narrowed(x_TX: Tensor, inputs: AttentionInputs | None) -> Tensor:
    """The rows of the tokens that attend, (T, …) or a copy (S, …); see `AttentionInputs.ends`."""
    if inputs is None or inputs.ends_S is None:
        return x_TX
    return x_TX.index_select(0, inputs.ends_S)
