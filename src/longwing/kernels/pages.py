"""The cache of keys and values in pages, and what one step says about its sequences.

Holds `KVPages` (one layer's storage, its write and its reads), `AttentionInputs` (what attention is
told), and the work list that is made of them once a step and read by every layer. Which pages
belong to whom is decided elsewhere; the attention itself is in `attention.py`.

Shape key: T packed new tokens of all sequences, S sequences, P pages, B slots in a page, M pages in
the longest page table, C tokens of context, N query heads, K KV heads, G query heads of one KV head
(N / K), H head dim, F rotary frequencies (H / 2). Inside a `Batch`, S and T are its own.

The one idea: a call of the attention kernel costs about as much as 200 tokens of context, and so
does each question asked of a tensor on the way. So the page tables are read into Python once a
step, and sequences of about the same length that bring equally many tokens share one padded call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""What a cache can be kept in, by name."""

SHARED_NEW_LEN = 32
"""Sequences with more new tokens than this get a call of their own: it is busy enough."""

SHARED_CONTEXT = 2**15
"""Context, in tokens with padding, that one shared call may copy together."""

PADDING = 0.25
"""Share of the longest context that a shorter one may be padded by."""


@dataclass(frozen=True, kw_only=True)
class KVPages:
    """One layer's cache: keys and values, each (P, B, K, H).

    Every slot must hold finite numbers from the start: what a shared call reads as padding is
    multiplied by 0, which does not help against NaN.

    Attributes:
        keys_PBKH: floating point; or int8, and then a key is its integers times its scale.
        values_PBKH: as keys_PBKH.
        key_scales_PBK: float32, one for each key vector; None unless the keys are int8.
        value_scales_PBK: as key_scales_PBK.
    """

    keys_PBKH: Tensor
    values_PBKH: Tensor
    key_scales_PBK: Tensor | None = None
    value_scales_PBK: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        device: torch.device | str = "cpu",
    ) -> "KVPages":
        """One layer's room for num_pages * page_len tokens, all zero; see `allocate_layers`."""
        (layer,) = cls.allocate_layers(
            1, num_pages, page_len, num_kv_heads, head_dim, dtype, device
        )
        return layer

    @classmethod
    def allocate_layers(
        cls,
        num_layers: int,
        num_pages: int,
        page_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        device: torch.device | str = "cpu",
    ) -> "tuple[KVPages, ...]":
        """Room for num_pages * page_len tokens in every layer, all zero.

        All layers' keys lie in one piece of memory, and so do all values: a GPU's allocator rounds
        every piece up, to a multiple of 2 MiB or a part of 20. In pieces, Falcon-40B's 24K tokens
        of 8 bits would lose some 240 MiB.

        Args:
            num_layers: how many.
            num_pages: P.
            page_len: B.
            num_kv_heads: K.
            head_dim: H.
            dtype: "float32", "float16", "bfloat16", or "int8": a byte a number and 4 a vector.
            device: where.

        Raises:
            ValueError: no cache is kept in `dtype`.
        """
        if dtype not in KV_DTYPES:
            raise ValueError(f'KV dtype "{dtype}" is not one of {", ".join(KV_DTYPES)}')

        vectors = (num_layers, num_pages, page_len, num_kv_heads)

        def numbers_of_layers() -> tuple[Tensor, ...]:
            numbers = torch.zeros((*vectors, head_dim), dtype=KV_DTYPES[dtype], device=device)
            return numbers.unbind()

        def scales_of_layers() -> Sequence[Tensor | None]:
            if dtype != "int8":
                return [None] * num_layers
            return torch.zeros(vectors, device=device).unbind()

        kept = (numbers_of_layers(), numbers_of_layers(), scales_of_layers(), scales_of_layers())
        return tuple(
            cls(
                keys_PBKH=keys_PBKH,
                values_PBKH=values_PBKH,
                key_scales_PBK=key_scales_PBK,
                value_scales_PBK=value_scales_PBK,
            )
            for keys_PBKH, values_PBKH, key_scales_PBK, value_scales_PBK in zip(*kept, strict=True)
        )

    @property
    def page_len(self) -> int:
        """B, slots in a page."""
        return self.keys_PBKH.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.keys_PBKH, self.values_PBKH, self.key_scales_PBK, self.value_scales_PBK)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def read(
        self, where: "slice | Tensor", dtype: torch.dtype, slots: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Some pages' keys and values, each (pages, B, K, H), or (pages, slots, K, H).

        Args:
            where: a run of pages, which costs nothing; or (pages,) indices, which costs a copy.
            dtype: what 8-bit numbers become, at the cost of a copy; others keep their own type.
            slots: read only the first so many of each page.
        """
        keys = _read(self.keys_PBKH, self.key_scales_PBK, where, dtype, slots)
        return keys, _read(self.values_PBKH, self.value_scales_PBK, where, dtype, slots)


def write_kv(k_TKH: Tensor, v_TKH: Tensor, pages: KVPages, slots_T: Tensor) -> None:
    """Store each token's key and value in its slot; in place.

    In 8 bits a vector's scale is its largest magnitude / 127 and its numbers are rounded to the
    nearest: no number is off by more than half a scale.
    """
    _write(pages.keys_PBKH, pages.key_scales_PBK, slots_T, k_TKH)
    _write(pages.values_PBKH, pages.value_scales_PBK, slots_T, v_TKH)


def _write(numbers_PBKH: Tensor, scales_PBK: Tensor | None, slots_T: Tensor, x_TKH: Tensor) -> None:
    if scales_PBK is not None:
        x_TKH = x_TKH.float()
        # A vector of zeros needs a scale that it can be divided by.
        scales_TK = (x_TKH.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        scales_PBK.flatten(0, 1).index_copy_(0, slots_T, scales_TK)
        x_TKH = (x_TKH / scales_TK[..., None]).round_().clamp_(-127, 127)
    numbers_PBKH.flatten(0, 1).index_copy_(0, slots_T, x_TKH.to(numbers_PBKH.dtype))


def _read(
    numbers_PBKH: Tensor,
    scales_PBK: Tensor | None,
    where: slice | Tensor,
    dtype: torch.dtype,
    slots: int | None,
) -> Tensor:
    taken = _take(numbers_PBKH, where, slots)
    if scales_PBK is None:
        return taken
    return (taken * _take(scales_PBK, where, slots)[..., None]).to(dtype)


def _take(tensor: Tensor, where: slice | Tensor, slots: int | None) -> Tensor:
    tensor = tensor[:, :slots]
    return tensor[where] if isinstance(where, slice) else tensor.index_select(0, where)


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
    def spans(self) -> tuple["Span", ...]:
        """Every sequence of the step, in order. Reads the tensors once, on the first call."""
        starts, page_len = self.starts_S1.tolist(), self.pages[0].page_len
        spans = []
        for s, context_len in enumerate(self.context_lens_S.tolist()):
            table = self.page_tables_SM[s, : -(-context_len // page_len)].tolist()
            spans.append(
                Span(start=starts[s], stop=starts[s + 1], context_len=context_len, pages=table)
            )
        return tuple(spans)

    def work(self, window: int | None) -> tuple["Batch", ...]:
        """The calls that attention makes in a layer with this window; made once a step."""
        if window not in self._works:
            seen = [span.within(window, self.pages[0].page_len) for span in self.spans]
            self._works[window] = batches(seen, self.pages[0].page_len, window, self.slots_T.device)
        return self._works[window]

    @cached_property
    def _works(self) -> dict[int | None, tuple["Batch", ...]]:
        return {}


def narrowed(x_TX: Tensor, inputs: AttentionInputs | None) -> Tensor:
    """The rows of the tokens that attend, (T, …) or a copy (S, …); see `AttentionInputs.ends`."""
    if inputs is None or inputs.ends_S is None:
        return x_TX
    return x_TX.index_select(0, inputs.ends_S)


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
