"""The paged cache: shared calls against lone ones, windows, and the 8-bit form."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longwing.kernels import (
    AttentionInputs,
    AttentionSpec,
    KVPages,
    attend,
    narrowed,
    paged_attention,
    paired,
    rotate,
    turn,
    turns,
    write_kv,
)
from longwing.kernels.batches import SHARED_CONTEXT

N, K, H = 6, 2, 8


def step(
    context_lens: list[int], new: list[int], page_len: int, dtype: str = "float32", seed: int = 0
) -> tuple[AttentionInputs, Tensor, list[tuple[Tensor, Tensor]]]:
    """Sequences over scattered pages, already written; their queries; their keys and values."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // page_len) for length in context_lens]
    order = torch.randperm(sum(needed), generator=generator).tolist()
    pages = KVPages.allocate(sum(needed), page_len, K, H, dtype)
    tables, kv = [], []
    for length, count in zip(context_lens, needed, strict=True):
        table, order = order[:count], order[count:]
        slots = [table[i // page_len] * page_len + i % page_len for i in range(length)]
        k, v = (torch.randn(length, K, H, generator=generator) for _ in range(2))
        write_kv(k, v, pages, torch.tensor(slots))
        tables.append(table + [0] * (max(needed) - count))
        kv.append((k, v))
    starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    inputs = AttentionInputs(
        starts_S1=starts,
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32),
        page_tables_SM=torch.tensor(tables, dtype=torch.int32),
        slots_T=torch.empty(0, dtype=torch.int64),
        pages=(pages,),
    )
    return inputs, torch.randn(sum(new), N, H, generator=generator), kv


def alone(
    q: Tensor, new: list[int], kv: list[tuple[Tensor, Tensor]], spec: AttentionSpec
) -> Tensor:
    parts = q.split(new)
    return torch.cat([attend(part, k, v, spec) for part, (k, v) in zip(parts, kv, strict=True)])


@pytest.mark.parametrize("window", [None, 1, 7, 20, 500])
@pytest.mark.parametrize("page_len", [4, 16, 128])
@pytest.mark.parametrize(
    ("context_lens", "new"),
    [
        ([1], [1]),
        ([9, 30, 31, 29, 100, 1], [1, 1, 1, 1, 1, 1]),
        ([90, 30, 31, 40, 100], [4, 4, 1, 40, 4]),
        ([60, 60, 60], [5, 5, 5]),
        ([50, 120], [50, 45]),
    ],
    ids=["one", "decodes", "mixed", "drafts", "chunks"],
)
def test_sequences_in_one_step_get_what_each_gets_alone(
    context_lens: list[int], new: list[int], page_len: int, window: int | None
) -> None:
    inputs, q, kv = step(context_lens, new, page_len)
    spec = AttentionSpec(scale=H**-0.5, window=window)
    actual = paged_attention(q, inputs.pages[0], inputs, spec)
    torch.testing.assert_close(actual, alone(q, new, kv, spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 7, 20])
def test_ends_attend_as_they_do_among_all_and_share_calls_as_decodes_do(
    window: int | None,
) -> None:
    inputs, q, _ = step([30, 31, 29, 100, 32], [1, 1, 4, 40, 32], 16)
    spec = AttentionSpec(scale=H**-0.5, window=window)
    whole = paged_attention(q, inputs.pages[0], inputs, spec)
    ends = inputs.ends()
    actual = paged_attention(narrowed(q, ends), inputs.pages[0], ends, spec)
    torch.testing.assert_close(actual, whole[[0, 1, 5, 45, 77]], rtol=1e-5, atol=1e-6)
    if window is None:
        assert sorted(batch.num_sequences for batch in ends.work(None)) == [1, 4]


def test_ends_are_one_call_of_decoding_on_a_gpu() -> None:
    inputs, _, _ = step([30, 31, 100], [1, 1, 40], 16)
    inputs = replace(inputs, num_decoding=2, most_new=40, most_context=100)
    assert [call.most_new for call in inputs.calls] == [1, 40]
    (call,) = inputs.ends().calls
    assert (call.most_new, call.most_context) == (1, 100)
    assert call.starts_S1.tolist() == [0, 1, 2, 3]


def test_decodes_of_like_length_share_a_call_and_others_do_not() -> None:
    inputs, _, _ = step([30, 31, 29, 100, 32], [1, 1, 1, 1, 1], 16)
    assert sorted(batch.num_sequences for batch in inputs.work(None)) == [1, 4]
    assert inputs.work(None) is inputs.work(None)


def test_shared_call_copies_no_more_than_its_limit() -> None:
    inputs, _, _ = step([SHARED_CONTEXT // 2 + 1] * 3, [1, 1, 1], 1024)
    assert [batch.num_sequences for batch in inputs.work(None)] == [1, 1, 1]


def test_a_sequence_without_new_tokens_takes_no_call() -> None:
    inputs, q, kv = step([30, 31], [0, 1], 16)
    spec = AttentionSpec(scale=H**-0.5)
    actual = paged_attention(q, inputs.pages[0], inputs, spec)
    torch.testing.assert_close(actual, attend(q, *kv[1], spec), rtol=1e-5, atol=1e-6)


def test_windows_leave_out_the_pages_that_nobody_sees() -> None:
    inputs, _, _ = step([100], [1], 16)
    assert inputs.work(10)[0].context_len <= 10 + 16


def test_8_bit_numbers_are_off_by_half_a_scale_at_most_and_attention_by_little() -> None:
    context_lens, new = [90, 30, 31, 40], [4, 1, 1, 40]
    inputs, q, kv = step(context_lens, new, 16, "int8")
    spec = AttentionSpec(scale=H**-0.5)
    for span, (k, v) in zip(inputs.spans, kv, strict=True):
        read = inputs.pages[0].read(torch.tensor(span.pages), torch.float32)
        for stored, exact in zip(read, (k, v), strict=True):
            error = (stored.flatten(0, 1)[: span.context_len] - exact).abs().amax(-1)
            assert (error <= exact.abs().amax(-1) / 127 / 2 * 1.0001).all()
    error = paged_attention(q, inputs.pages[0], inputs, spec) - alone(q, new, kv, spec)
    assert error.abs().max() < 0.03


def test_8_bit_vector_of_zeros_reads_as_zeros() -> None:
    pages = KVPages.allocate(1, 4, K, H, "int8")
    write_kv(torch.zeros(1, K, H), torch.zeros(1, K, H), pages, torch.tensor([2]))
    keys, values = pages.read(slice(0, 1), torch.float32)
    assert keys.abs().max() == 0
    assert values.abs().max() == 0


@pytest.mark.parametrize(
    ("dtype", "vector"),
    [("float32", 4 * H), ("bfloat16", 2 * H), ("float16", 2 * H), ("int8", H + 4)],
)
def test_allocated_bytes_are_a_vector_for_each_key_and_value(dtype: str, vector: int) -> None:
    assert KVPages.allocate(3, 4, K, H, dtype).nbytes == 2 * 3 * 4 * K * vector


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_one_layer_keeps_no_other_sees(dtype: str) -> None:
    first, second, third = KVPages.allocate_layers(3, 2, 4, K, H, dtype)
    one_TKH = torch.ones(8, K, H)
    write_kv(one_TKH, -one_TKH, second, torch.arange(8))
    for layer in (first, third):
        assert not any(x.any() for x in layer.read(slice(0, 2), torch.bfloat16))
    keys, values = second.read(slice(0, 2), torch.bfloat16)
    assert (keys == 1).all()
    assert (values == -1).all()


def test_unknown_cache_type_is_refused_and_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"int4.*float32, float16, bfloat16, int8"):
        KVPages.allocate(1, 1, 1, 1, "int4")


def test_lower_precision_cache_serves_float32_queries() -> None:
    inputs, q, kv = step([40, 41], [1, 1], 16, "bfloat16")
    spec = AttentionSpec(scale=H**-0.5)
    actual = paged_attention(q, inputs.pages[0], inputs, spec)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, alone(q, [1, 1], kv, spec), rtol=0, atol=0.03)


def test_turning_paired_heads_is_rotating_them() -> None:
    x = torch.randn(3, 2, H, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(3, H // 2, generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = angles.cos(), angles.sin()
    turned = turn(x[..., paired(H)], turns(cos, sin))
    torch.testing.assert_close(turned, rotate(x, cos, sin)[..., paired(H)])
