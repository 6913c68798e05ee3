"""`Runner`: a step's work as tensors, through the model, to hidden states and logits.

Holds the KV pages. Which pages and which tokens is the scheduler's word; what to do with logits is
the engine's. On a GPU, steps that only decode go through `graphs.py`.

Shape key: T packed tokens of all sequences, S sequences, M pages of the longest page table, D model
dim, R rows wanted, V vocabulary, F rotary frequencies, P pages, B slots in a page.
"""

from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwing.engine.adapters import AdapterTable
from longwing.engine.graphs import DecodeGraphs, can_record
from longwing.engine.options import EngineOptions
from longwing.engine.rotations import Rotations
from longwing.engine.sequence import Work
from longwing.kernels import AttentionInputs, KVPages
from longwing.models import Decoder


def runner_settings(model: Decoder, options: EngineOptions) -> dict[str, Any]:
    """What a `Runner` is made with, beside the model."""
    word = str(model.dtype).removeprefix("torch.")
    return {
        "num_pages": options.num_pages,
        "page_len": options.page_len,
        "kv_dtype": word if options.kv_dtype == "auto" else options.kv_dtype,
        "most_sequences": options.max_sequences,
        "adapters": AdapterTable.of_model(model, options),
    }


class Runner:
    """Runs batches of one model.

    Args:
        model: the model.
        num_pages: pages to allocate, in every layer.
        page_len: slots in a page.
        kv_dtype: number type of keys and values, as KVPages names it.
        most_sequences: sequences of a decoding step at most that graphs are made for.
        adapters: those attached to the model, if any are.

    Attributes:
        pages: the cache, one for each layer.
        graphs: decoding as CUDA graphs; None where it cannot be, or need not.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int,
        page_len: int,
        kv_dtype: str,
        most_sequences: int = 64,
        adapters: AdapterTable | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.num_pages = num_pages
        self.page_len = page_len
        config = model.config
        self.pages = KVPages.allocate_layers(
            config.num_layers,
            num_pages,
            page_len,
            model.num_kv_heads,
            config.head_dim,
            dtype=kv_dtype,
            device=model.device,
        )
        self._rotations = Rotations(model.rotary) if model.device.type == "cuda" else None
        self.graphs: DecodeGraphs | None = None
        if self._rotations is not None and can_record(model, self.pages[0]):
            self.graphs = DecodeGraphs(
                model,
                self.pages,
                context=min(model.context, num_pages * page_len),
                most_sequences=most_sequences,
                rotations=self._rotations,
                adapters=adapters,
            )

    def close(self) -> None:
        """End what runs beside it: of one rank alone, nothing."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(pages.nbytes for pages in self.pages)

    @torch.inference_mode()
    def record_graphs(self) -> None:
        """Record the graphs of plain decoding, rather than when a request first needs them."""
        if self.graphs is not None:
            for shape in self.graphs.usual_shapes():
                self.graphs.record(shape)

    @torch.inference_mode()
    def forward(
        self, batch: Sequence[Work], tokens_T: Tensor | None = None, *, ends_only: bool = False
    ) -> Tensor:
        """Run a step: write its keys and values to the pages; (T, D) hidden states.

        What it returns holds until the next step.

        Args:
            batch: the step.
            tokens_T: its tokens, int64 on the device, in place of those in `batch`: of a step that
                is launched before the host knows what the one before it chose.
            ends_only: of each work only the last token's are wanted, (S, D) in the batch's order;
                so the last block does no more for the others than remember them.
        """
        shape = None if self.graphs is None else self.graphs.shape(batch)
        if self.graphs is not None and shape is not None:
            hidden_TD = self.graphs.run(batch, shape, tokens_T)
            return self._ends(hidden_TD, batch) if ends_only else hidden_TD
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
        known_T, positions_T, slots_T, starts_S1, context_lens_S, page_tables_SM = self._placed(
            np.array(tokens, np.int64),
            np.array(positions, np.int64),
            np.array(slots, np.int64),
            np.array(starts, np.int32),
            np.array(context_lens, np.int32),
            self._page_tables(batch, context_lens),
        )
        cos_TF, sin_TF = self._rotation(batch, positions_T, starts)
        if self.adapters is not None:
            self.adapters.choose(batch, self.model.device)
        inputs = AttentionInputs(
            starts_S1=starts_S1,
            context_lens_S=context_lens_S,
            page_tables_SM=page_tables_SM,
            slots_T=slots_T,
            pages=self.pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
            most_new=max(len(work.token_ids) for work in batch),
            most_context=max(context_lens),
            num_decoding=sum(1 for _ in takewhile(lambda work: len(work.token_ids) == 1, batch)),
        )
        tokens_T = known_T if tokens_T is None else tokens_T
        if not ends_only:
            return self.model(tokens_T, positions_T, inputs)
        if len({work.sequence.key.adapter for work in batch}) > 1:
            # The adapters are chosen for T tokens, from the first block to the last.
            return self._ends(self.model(tokens_T, positions_T, inputs), batch)
        return self.model(tokens_T, positions_T, inputs, ends_only=True)

    def _ends(self, hidden_TD: Tensor, batch: Sequence[Work]) -> Tensor:
        """(S, D): the rows of each work's last token."""
        if len(hidden_TD) == len(batch):
            return hidden_TD
        past = accumulate(len(work.token_ids) for work in batch)
        return hidden_TD[self._ints([end - 1 for end in past])]

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """(R, V) logits of some rows, in the output head's number type."""
        if len(rows) == len(hidden_TD):
            return self.model.head(hidden_TD)
        return self.model.head(hidden_TD[self._ints(rows)])

    def _page_tables(self, batch: Sequence[Work], context_lens: Sequence[int]) -> np.ndarray:
        """(S, M) int32, ragged rows filled up with 0, which nobody reads."""
        nums = [-(-length // self.page_len) for length in context_lens]
        tables_SM = np.zeros((len(batch), max(nums)), np.int32)
        for table_M, work, num in zip(tables_SM, batch, nums, strict=True):
            table_M[:num] = work.sequence.pages[:num]
        return tables_SM

    def _placed(self, *arrays: np.ndarray) -> list[Tensor]:
        """Arrays on the model's device, in one copy that nobody waits for.

        Each begins at a multiple of 16 bytes, as Triton compiles kernels anew for what does not.
        """
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] + -(-array.nbytes // 16) * 16)
        device = self.model.device
        host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        as_numpy = host.numpy()
        for array, start in zip(arrays, starts, strict=False):
            as_numpy[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
        there = host.to(device, non_blocking=True)
        return [
            there[start : start + array.nbytes]
            .view(torch.int64 if array.dtype == np.int64 else torch.int32)
            .view(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        ]

    def _rotation(
        self, batch: Sequence[Work], positions_T: Tensor, starts: Sequence[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """cos_TF and sin_TF: each token's rotation under its own sequence's rung."""
        rotary = self.model.rotary
        if rotary is None:
            return None, None
        if self._rotations is not None:
            first_rows = [self._rotations.first_row(work.sequence.key.rung) for work in batch]
            if len(set(first_rows)) == 1:
                return self._rotations.at(positions_T + first_rows[0])
            first_row_T = self._ints(first_rows).repeat_interleave(
                self._ints([len(work.token_ids) for work in batch]), output_size=starts[-1]
            )
            return self._rotations.at(positions_T + first_row_T)
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
