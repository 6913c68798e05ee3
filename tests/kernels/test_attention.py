"""Attention over pages against a naive loop, and the parts it is made of."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from longwing.kernels import (
    AttentionInputs,
    AttentionSpec,
    KVPages,
    alibi_slopes,
    attend,
    paged_attention,
    rotate,
    write_kv,
)


def _naive(q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, spec: AttentionSpec) -> Tensor:
    """One head and one query at a time, in float64, from the definition."""
    T, N, _ = q_TNH.shape
    C, K, _ = k_CKH.shape
    out = torch.empty_like(q_TNH, dtype=torch.float64)
    for t in range(T):
        position = C - T + t
        first = max(0, position - spec.window + 1) if spec.window else 0
        for n in range(N):
            keys, values = (x[first : position + 1, n * K // N].double() for x in (k_CKH, v_CKH))
            scores = keys @ q_TNH[t, n].double()
            if spec.alibi_slopes_N is not None:
                slope = spec.alibi_slopes_N[n].bfloat16()
                scores += (slope * torch.arange(first, position + 1)).double()
            out[t, n] = torch.softmax(scores * spec.scale, -1) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("T", "C"), [(1, 1), (1, 17), (6, 6), (6, 17)])
@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_its_definition(
    T: int, C: int, N: int, K: int, alibi: bool, window: int | None
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(T, N, 8), torch.randn(C, K, 8), torch.randn(C, K, 8)
    slopes = alibi_slopes(N) if alibi else None
    spec = AttentionSpec(scale=8**-0.5, window=window, alibi_slopes_N=slopes)
    expected = _naive(q, k, v, spec).float()
    torch.testing.assert_close(attend(q, k, v, spec), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scattered", [False, True])
def test_pages_in_any_order_give_what_one_run_of_keys_gives(scattered: bool) -> None:
    torch.manual_seed(1)
    page_len, context_lens, new = 4, [9, 5, 12], [3, 5, 1]
    tables = [[7, 2, 9], [0, 4], [3, 8, 1]] if scattered else [[0, 1, 2], [3, 4], [5, 6, 7]]
    pages = KVPages(keys_PBKH=torch.zeros(10, 4, 2, 8), values_PBKH=torch.zeros(10, 4, 2, 8))
    spec = AttentionSpec(scale=8**-0.5)
    k = [torch.randn(c, 2, 8) for c in context_lens]
    v = [torch.randn(c, 2, 8) for c in context_lens]
    for s, table in enumerate(tables):
        slots = [table[i // page_len] * page_len + i % page_len for i in range(context_lens[s])]
        write_kv(k[s], v[s], pages, torch.tensor(slots))
    q = torch.randn(sum(new), 4, 8)
    starts = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    inputs = AttentionInputs(
        starts_S1=starts,
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32),
        page_tables_SM=torch.tensor([t + [0] * (3 - len(t)) for t in tables], dtype=torch.int32),
        slots_T=torch.empty(0, dtype=torch.int64),
        pages=(pages,),
    )
    actual = paged_attention(q, pages, inputs, spec)
    for s in range(3):
        tokens = slice(int(starts[s]), int(starts[s + 1]))
        expected = attend(q[tokens], k[s], v[s], spec)
        torch.testing.assert_close(actual[tokens], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 32, 64, 71])
def test_alibi_slopes_are_those_of_falcon_rw(num_heads: int) -> None:
    mask = torch.ones(1, 2, dtype=torch.long)
    theirs = build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
    assert torch.equal(alibi_slopes(num_heads).bfloat16().float(), theirs)


def test_rotation_turns_each_pair_by_its_angle_and_keeps_lengths() -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[0.0] * 4, [math.pi / 2] * 4, [0.3, 1.0, 2.0, 3.0]])
    turned = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned[1], torch.cat((-x[1, :, 4:], x[1, :, :4]), -1))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
