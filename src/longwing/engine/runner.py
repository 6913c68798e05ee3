"""`Runner`: a step's work as tensors, through the model, to hidden states and logits.

Holds the KV pages. Which pages and which tokens is the scheduler's word; what to do with logits is
the engine's.

Shape key: T packed tokens of all sequences, S sequences, M pages of the longest page table, D model
dim, R rows wanted, V vocabulary, F rotary frequencies, P pages, B slots in a page.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longwing.engine.sequence import Work
from longwing.kernels import AttentionInputs, KVPages
from longwing.models import Decoder


class Runner:
    """Runs batches of one model.

    Args:
        model: the model.
        num_pages: pages to allocate, in every layer.
        page_len: slots in a page.
        kv_dtype: number type of keys and values, as KVPages names it.
    """

    def __init__(self, model: Decoder, *, num_pages: int, page_len: int, kv_dtype: str) -> None:
        self.model = model
        self.num_pages = num_pages
        self.page_len = page_len
        config = model.config
        self.pages = tuple(
            KVPages.allocate(
                num_pages,
                page_len,
                config.num_kv_heads,
                config.head_dim,
                dtype=kv_dtype,
                device=model.device,
            )
            for _ in range(config.num_layers)
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(pages.nbytes for pages in self.pages)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Work]) -> Tensor:
        """Run a step: write its keys and values to the pages; (T, D) hidden states."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, context_lens = [0], []
        for work in batch:
            end = work.start + len(work.token_ids)
            tokens += work.token_ids
            positions += range(work.start, end)
            slots += _slots(work.sequence.pages, work.start, end, self.page_len)
            starts.append(len(tokens))
            context_lens.append(end)
        positions_T = self._ints(positions)
        cos_TF, sin_TF = self._rotation(batch, positions_T, starts)
        inputs = AttentionInputs(
            starts_S1=self._ints(starts, torch.int32),
            context_lens_S=self._ints(context_lens, torch.int32),
            page_tables_SM=self._page_tables(batch, context_lens),
            slots_T=self._ints(slots),
            pages=self.pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
            most_new=max(len(work.token_ids) for work in batch),
            most_context=max(context_lens),
        )
        return self.model(self._ints(tokens), positions_T, inputs)

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """(R, V) float32 logits of some rows."""
        if len(rows) == len(hidden_TD):
            return self.model.logits(hidden_TD)
        return self.model.logits(hidden_TD[self._ints(rows)])

    def _page_tables(self, batch: Sequence[Work], context_lens: Sequence[int]) -> Tensor:
        """(S, M) int32, ragged rows filled up with 0, which nobody reads."""
        nums = [-(-length // self.page_len) for length in context_lens]
        longest = max(nums)
        return self._ints(
            [
                work.sequence.pages[:num] + [0] * (longest - num)
                for work, num in zip(batch, nums, strict=True)
            ],
            torch.int32,
        )

    def _rotation(
        self, batch: Sequence[Work], positions_T: Tensor, starts: Sequence[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """cos_TF and sin_TF: each token's rotation under its own sequence's rung."""
        rotary = self.model.rotary
        if rotary is None:
            return None, None
        need: dict[int, int] = {}
        for work in batch:
            rung, end = work.sequence.key.rung, work.start + len(work.token_ids)
            need[rung] = max(need.get(rung, 0), end)
        if len(need) == 1:
            (rung,) = need
            cos_LF, sin_LF = rotary.table(rung, need[rung])
            return cos_LF[positions_T], sin_LF[positions_T]
        cos, sin = [], []
        for s, work in enumerate(batch):
            rung = work.sequence.key.rung
            cos_LF, sin_LF = rotary.table(rung, need[rung])
            own_T = positions_T[starts[s] : starts[s + 1]]
            cos.append(cos_LF[own_T])
            sin.append(sin_LF[own_T])
        return torch.cat(cos), torch.cat(sin)

    def _ints(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.model.device)


def _slots(pages: Sequence[int], start: int, end: int, page_len: int) -> list[int]:
    """Where positions [start, end) of a sequence lie, as page * page_len + slot."""
    if end - start == 1:
        return [pages[start // page_len] * page_len + start % page_len]
    slots: list[int] = []
    at = start
    while at < end:
        index, offset = divmod(at, page_len)
        run = min(page_len - offset, end - at)
        first = pages[index] * page_len + offset
        slots += range(first, first + run)
        at += run
    return slots
