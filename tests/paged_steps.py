"""Steps of attention over pages, made up for tests; and the reference that kernels are held to."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longwing.kernels import AttentionInputs, AttentionSpec, KVPages, paged_attention, write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
MIXED = {"new": [3, 1, 20], "contexts": [9, 50, 80]}
DECODE = {"new": [1, 1, 1], "contexts": [1, 64, 200]}


def made_step(
    new: list[int],
    contexts: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    page_len: int = 16,
    dtype: torch.dtype = torch.float32,
    kv: str | None = None,
    seed: int = 0,
) -> tuple[Tensor, AttentionInputs, AttentionSpec]:
    """Queries and a filled cache, pages in no order. What no sequence has written is NaN."""
    torch.manual_seed(seed)
    (N, K), longest = heads, max(-(-c // page_len) for c in contexts)
    num_pages = longest * len(contexts) + 2
    kv = kv or str(dtype).removeprefix("torch.")
    pages = KVPages.allocate(num_pages, page_len, K, head_dim, kv)
    for scales_or_numbers in (
        (pages.keys_PBKH, pages.values_PBKH)
        if kv != "int8"
        else (
            pages.key_scales_PBK,
            pages.value_scales_PBK,
        )
    ):
        assert scales_or_numbers is not None
        scales_or_numbers.fill_(float("nan"))
    order = torch.randperm(num_pages)[: longest * len(contexts)]
    tables_SM = order.view(len(contexts), longest).to(torch.int32)
    for table_M, context in zip(tables_SM, contexts, strict=True):
        at_C = torch.arange(context)
        slots_C = table_M.long()[at_C // page_len] * page_len + at_C % page_len
        k, v = (torch.randn(context, K, head_dim).to(dtype) for _ in "kv")
        write_kv(k, v, pages, slots_C)
    starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    moved = [x if x is None else x.to(DEVICE) for x in vars(pages).values()]
    inputs = AttentionInputs(
        starts_S1=starts.to(DEVICE),
        context_lens_S=torch.tensor(contexts, dtype=torch.int32).to(DEVICE),
        page_tables_SM=tables_SM.to(DEVICE),
        slots_T=torch.empty(0, dtype=torch.int64, device=DEVICE),
        pages=(KVPages(**dict(zip(vars(pages), moved, strict=True))),),
    )
    q_TNH = torch.randn(sum(new), N, head_dim).to(dtype).to(DEVICE)
    return q_TNH, inputs, AttentionSpec(scale=head_dim**-0.5)


def assert_equals_reference(
    q_TNH: Tensor, inputs: AttentionInputs, spec: AttentionSpec, **cut: Any
) -> None:
    """The Triton kernels against the reference in float32, on the same numbers."""
    from longwing.kernels import paged_triton  # once the test has said where it runs

    pages = inputs.pages[0]
    actual = paged_triton.paged_attention(q_TNH, pages, inputs, spec, **cut)
    assert actual.dtype == q_TNH.dtype
    known = [x if x is None else x.nan_to_num() for x in vars(pages).values()]
    if pages.key_scales_PBK is None:
        known = [x if x is None else x.float() for x in known]
    plain = KVPages(**dict(zip(vars(pages), known, strict=True)))
    expected = paged_attention(q_TNH.float(), plain, replace(inputs, pages=(plain,)), spec)
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[q_TNH.dtype]
