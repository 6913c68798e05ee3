"""Attention over pages in Triton against the reference: interpreted on a CPU, or on a GPU.

The interpreter multiplies float16 and float32 alone, so bfloat16 is only tested on a GPU.
"""

import os
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from longwing.errors import RequestError
from longwing.kernels import (
    AttentionInputs,
    AttentionSpec,
    KVPages,
    alibi_slopes,
    paged_attention,
    write_kv,
)
from longwing.kernels.digits import Digits
from longwing.layers import Attention, Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
attend_triton: Any = pytest.importorskip("longwing.kernels.attend_triton")
paged_triton: Any = pytest.importorskip("longwing.kernels.paged_triton")
write_triton: Any = pytest.importorskip("longwing.kernels.write_triton")
if DEVICE == "cpu" and type(attend_triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

Tiling = paged_triton.Tiling
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
MIXED = {"new": [3, 1, 20], "contexts": [9, 50, 80]}
DECODE = {"new": [1, 1, 1], "contexts": [1, 64, 200]}


def _step(
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


def _assert_equals_reference(
    q_TNH: Tensor, inputs: AttentionInputs, spec: AttentionSpec, **cut: Any
) -> None:
    """Against the reference in float32, on the same numbers."""
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


@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", [(3, 3), (6, 3), (16, 1), (71, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_heads_that_share_keys_get_what_the_reference_gives(
    dtype: torch.dtype, heads: tuple[int, int], step: dict[str, list[int]]
) -> None:
    _assert_equals_reference(*_step(**step, heads=heads, dtype=dtype))


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_heads_can_be_written_in_the_order_that_a_product_of_many_tokens_takes(
    num_splits: int, head_dim: int
) -> None:
    q_TNH, inputs, spec = _step(**MIXED, heads=(6, 3), head_dim=head_dim, dtype=torch.float16)
    pages = inputs.pages[0]
    natural_TNH, arranged_TNH = (
        paged_triton.paged_attention(
            q_TNH, pages, inputs, spec, num_splits=num_splits, arrange=arrange
        )
        for arrange in (False, True)
    )
    by_lane = natural_TNH.flatten(1).unflatten(1, (-1, 4, 2, 2, 2)).permute(0, 1, 3, 5, 2, 4)
    assert torch.equal(arranged_TNH.flatten(1), by_lane.flatten(1))


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [
        ((6, 3), 16),
        ((6, 3), 64),
        ((3, 3), 64),
        ((71, 1), 64),
        ((6, 3), 96),
        ((3, 3), 128),
        ((2, 1), 256),
    ],
)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_step_of_few_tokens_leaves_the_digits_of_its_result(
    num_splits: int, head_dim: int, heads: tuple[int, int]
) -> None:
    one_idle = {"new": [1, 0, 1], "contexts": [70, 5, 200]}
    drafts = {"new": [3, 1], "contexts": [9, 50]}
    for step, most_new in ((DECODE, 1), (one_idle, 1), (DECODE, None), (drafts, 3)):
        q_TNH, inputs, spec = _step(**step, heads=heads, head_dim=head_dim, dtype=torch.float16)
        room = Digits.room_like(q_TNH.flatten(1))
        room.digits_3TK.fill_(77)
        room.steps_CT.fill_(float("nan"))
        found_TNH = paged_triton.paged_attention(
            *(q_TNH, inputs.pages[0], inputs, spec),
            most_new=most_new,
            num_splits=num_splits,
            digits=room,
        )
        expected = Digits.of(found_TNH.flatten(1))
        assert torch.equal(room.digits_3TK, expected.digits_3TK)
        assert torch.equal(room.steps_CT, expected.steps_CT)


def test_a_step_of_several_calls_leaves_the_digits_of_all_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q_TNH, inputs, spec = _step([1, 1, 3], [50, 7, 40], dtype=torch.float16)
    inputs = replace(inputs, num_decoding=2, most_new=3, most_context=50)
    assert len(inputs.calls) == 2
    monkeypatch.setenv("LONGWING_KERNELS", "triton")
    monkeypatch.setattr(write_triton, "rotate_and_write", lambda q_TNH, *_: q_TNH)
    room = Digits.room_like(q_TNH.flatten(1))
    out_TD = Attention(0, spec)(q_TNH, q_TNH, q_TNH, None, inputs, digits=room)
    expected = Digits.of(out_TD)
    assert torch.equal(room.digits_3TK, expected.digits_3TK)
    assert torch.equal(room.steps_CT, expected.steps_CT)


def test_sequences_that_decode_beside_a_prompt_get_a_call_of_their_own() -> None:
    q_TNH, inputs, spec = _step([1, 1, 20, 3], [50, 7, 40, 3])
    whole = paged_triton.paged_attention(q_TNH, inputs.pages[0], inputs, spec)
    (itself,) = inputs.calls
    assert itself is inputs
    found = torch.full_like(whole, float("nan"))
    calls = replace(inputs, num_decoding=2, most_new=20, most_context=50).calls
    assert [call.most_new for call in calls] == [1, 20]
    for call in calls:
        paged_triton.paged_attention(
            q_TNH, inputs.pages[0], call, spec, most_new=call.most_new, out_TNH=found
        )
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_every_head_dimension_gives_what_the_reference_gives(
    head_dim: int, step: dict[str, list[int]]
) -> None:
    _assert_equals_reference(*_step(**step, head_dim=head_dim, heads=(2, 1)))


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("page_len", [16, 32, 64, 128, 256])
def test_pages_of_every_length_give_what_the_reference_gives(page_len: int, kv: str | None) -> None:
    _assert_equals_reference(*_step(**MIXED, page_len=page_len, kv=kv))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [1, 16, 70, 1000])
def test_windows_and_alibi_follow_the_reference(window: int, alibi: bool, num_splits: int) -> None:
    q_TNH, inputs, spec = _step([3, 20, 1], [9, 60, 150], heads=(2, 2), page_len=32)
    slopes = alibi_slopes(2).to(DEVICE) if alibi else None
    spec = replace(spec, window=window, alibi_slopes_N=slopes)
    _assert_equals_reference(q_TNH, inputs, spec, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [2, 3, 16])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_any_number_of_splits_gives_what_the_reference_gives(
    kv: str | None, num_splits: int
) -> None:
    _assert_equals_reference(*_step(**DECODE, kv=kv), num_splits=num_splits)


@pytest.mark.parametrize("most_new", [None, 40, 64])
@pytest.mark.parametrize("rows", [16, 64])
def test_a_tile_finds_its_rows_whatever_the_host_knows(rows: int, most_new: int | None) -> None:
    """Tiles that begin and end inside a token, too: 6 heads share keys."""
    tiles = Tiling(rows=rows, keys=16, num_warps=4, num_stages=2)
    step = _step([5, 1, 40, 2], [5, 30, 40, 77], heads=(6, 1))
    _assert_equals_reference(*step, tiles=tiles, most_new=most_new)


@pytest.mark.parametrize("num_new", [2, 5, 9])
def test_drafts_are_verified_as_if_each_token_came_alone(num_new: int) -> None:
    step = _step([num_new, num_new], [num_new, 150], heads=(16, 1), page_len=64)
    _assert_equals_reference(*step, most_new=9, most_context=4096, num_splits=4)


def test_the_copy_engine_fetches_what_threads_fetch() -> None:
    tiles = Tiling(rows=64, keys=64, num_warps=4, num_stages=2, bulk=True)
    q_TNH, inputs, spec = _step(**MIXED, page_len=128)
    for window in (None, 30):
        _assert_equals_reference(q_TNH, inputs, replace(spec, window=window), tiles=tiles)


def _new_kv(
    q_TNH: Tensor, inputs: AttentionInputs, *, rotates: bool = True
) -> tuple[Any, AttentionInputs]:
    """What each sequence's last token brings, and room for it: its cells are NaN until written."""
    pages, (T, _, H) = inputs.pages[0], q_TNH.shape
    K, B = pages.keys_PBKH.shape[2], pages.page_len
    slots_T = torch.full((T,), -1, dtype=torch.int64)
    starts = inputs.starts_S1.tolist()
    for s, context in enumerate(inputs.context_lens_S.tolist()):
        if starts[s + 1] > starts[s]:
            page = int(inputs.page_tables_SM[s, (context - 1) // B])
            slots_T[starts[s]] = page * B + (context - 1) % B
    for numbers in (pages.keys_PBKH, pages.values_PBKH):
        numbers.flatten(0, 1)[slots_T[slots_T >= 0].to(DEVICE)] = float("nan")
    # Of one projection, so that tokens and heads have strides of their own.
    kv_TXH = torch.randn(T, 2 * K, H).to(q_TNH)
    angles_TF = torch.randn(T, H // 2, device=DEVICE)
    new = paged_triton.NewKV(
        k_TKH=kv_TXH[:, :K],
        v_TKH=kv_TXH[:, K:],
        cos_TF=angles_TF.cos() if rotates else None,
        sin_TF=angles_TF.sin() if rotates else None,
        slots_T=slots_T.to(DEVICE),
    )
    return new, replace(inputs, slots_T=new.slots_T, most_new=1)


def _assert_same_pages(ours: KVPages, theirs: KVPages) -> None:
    for one, other in zip(vars(ours).values(), vars(theirs).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _assert_equals_two_launches(
    q_TNH: Tensor, inputs: AttentionInputs, spec: AttentionSpec, *, rotates: bool = True, **cut: Any
) -> None:
    """Pages bit for bit, and so is what comes out, but that a GPU fuses less when it rotates."""
    new, inputs = _new_kv(q_TNH, inputs, rotates=rotates)
    ours = inputs.pages[0]
    theirs = KVPages(keys_PBKH=ours.keys_PBKH.clone(), values_PBKH=ours.values_PBKH.clone())
    found_TNH = paged_triton.paged_attention(q_TNH, ours, inputs, spec, most_new=1, new=new, **cut)
    rotated_TNH = write_triton.rotate_and_write(
        q_TNH, new.k_TKH, new.v_TKH, new.cos_TF, new.sin_TF, theirs, new.slots_T
    )
    expected_TNH = paged_triton.paged_attention(
        rotated_TNH, theirs, inputs, spec, most_new=1, **cut
    )
    _assert_same_pages(ours, theirs)
    T = int(inputs.starts_S1[-1])  # What lies beyond fills a graph's step up.
    found, expected = found_TNH[:T].double(), expected_TNH[:T].double()
    error = (found - expected).norm() / expected.norm()
    assert error <= (0 if DEVICE == "cpu" else TOLERANCE[q_TNH.dtype])


def _padded_decode(page_len: int, **shape: Any) -> tuple[Tensor, AttentionInputs, AttentionSpec]:
    """A context of one token, one that ends where its page does, one that brings none; padding."""
    step = _step([1, 1, 0, 1], [1, 128, 9, 77], page_len=page_len, **shape)
    q_TNH, inputs, spec = step
    padded = replace(
        inputs,
        starts_S1=torch.cat([inputs.starts_S1, inputs.starts_S1[-1:]]),
        context_lens_S=torch.cat([inputs.context_lens_S, torch.zeros_like(inputs.starts_S1[:1])]),
        page_tables_SM=torch.cat([inputs.page_tables_SM, inputs.page_tables_SM[:1]]),
    )
    return torch.cat([q_TNH, q_TNH[:2]]), padded, spec


@pytest.mark.parametrize(
    ("heads", "page_len", "num_splits"),
    [((32, 2), 128, 3), ((71, 1), 16, 2), ((4, 4), 32, 1)],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_step_of_decoding_rotates_and_writes_as_it_attends(
    dtype: torch.dtype, heads: tuple[int, int], page_len: int, num_splits: int
) -> None:
    step = _padded_decode(page_len, heads=heads, dtype=dtype)
    _assert_equals_two_launches(*step, num_splits=num_splits)


@pytest.mark.parametrize("head_dim", [80, 96, 128])
def test_every_head_dimension_is_rotated_and_written_by_attention(head_dim: int) -> None:
    step = _padded_decode(32, heads=(3, 1), head_dim=head_dim, dtype=torch.float16)
    _assert_equals_two_launches(*step, num_splits=1)


@pytest.mark.parametrize("window", [None, 70])
def test_what_was_just_written_is_not_left_to_the_copy_engine(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may see memory as it was: here, as it was before the launch."""
    descriptor = paged_triton._descriptor
    monkeypatch.setattr(paged_triton, "_descriptor", lambda x, keys: descriptor(x.clone(), keys))
    tiles = Tiling(rows=64, keys=64, num_warps=4, num_stages=2, bulk=True)
    q_TNH, inputs, spec = _padded_decode(128, heads=(71, 1), dtype=torch.float16)
    spec = replace(spec, window=window)
    _assert_equals_two_launches(q_TNH, inputs, spec, num_splits=2, tiles=tiles)


@pytest.mark.parametrize(("window", "alibi"), [(1, False), (70, False), (16, True), (None, True)])
def test_what_attention_writes_it_sees_through_any_window(window: int | None, alibi: bool) -> None:
    q_TNH, inputs, spec = _padded_decode(16, heads=(2, 1))
    slopes = alibi_slopes(2).to(DEVICE) if alibi else None
    spec = replace(spec, window=window, alibi_slopes_N=slopes)
    _assert_equals_two_launches(q_TNH, inputs, spec, num_splits=3, rotates=not alibi)


@pytest.mark.parametrize("kv", ["float32", "float16"])
def test_attention_writes_to_a_cache_of_another_float_type(kv: str) -> None:
    dtype = torch.float16 if kv == "float32" else torch.float32
    _assert_equals_two_launches(*_padded_decode(32, heads=(2, 1), dtype=dtype, kv=kv))


def test_attention_that_rotates_leaves_the_digits_of_its_result() -> None:
    q_TNH, inputs, spec = _step(**DECODE, heads=(6, 3), dtype=torch.float16)
    new, inputs = _new_kv(q_TNH, inputs)
    for num_splits in (1, 2):
        room = Digits.room_like(q_TNH.flatten(1))
        found_TNH = paged_triton.paged_attention(
            *(q_TNH, inputs.pages[0], inputs, spec),
            most_new=1,
            num_splits=num_splits,
            digits=room,
            new=new,
        )
        expected = Digits.of(found_TNH.flatten(1))
        assert torch.equal(room.digits_3TK, expected.digits_3TK)
        assert torch.equal(room.steps_CT, expected.steps_CT)


def test_a_token_without_a_slot_is_written_nowhere_by_attention() -> None:
    q_TNH, inputs, spec = _step(**DECODE, dtype=torch.float16)
    new, inputs = _new_kv(q_TNH, inputs)
    pages = inputs.pages[0]
    before = KVPages(keys_PBKH=pages.keys_PBKH.clone(), values_PBKH=pages.values_PBKH.clone())
    new.slots_T.fill_(-1)
    paged_triton.paged_attention(q_TNH, pages, inputs, spec, most_new=1, new=new)
    _assert_same_pages(pages, before)


@pytest.mark.parametrize(("kv", "most_new"), [("int8", 1), ("float32", 2), ("float32", None)])
def test_attention_refuses_to_write_what_it_would_write_wrongly(
    kv: str, most_new: int | None
) -> None:
    q_TNH, inputs, spec = _step([1, 1], [5, 9], kv=kv)
    new = paged_triton.NewKV(
        k_TKH=q_TNH, v_TKH=q_TNH, cos_TF=None, sin_TF=None, slots_T=torch.zeros(2).long()
    )
    with pytest.raises(ValueError, match="use rotate_and_write"):
        paged_triton.paged_attention(
            q_TNH, inputs.pages[0], inputs, spec, most_new=most_new, new=new
        )


@pytest.mark.parametrize(
    ("change", "kv", "launches"),
    [
        ({"most_new": 1, "num_decoding": 2}, "float16", 0),
        ({"most_new": 1, "num_decoding": 2}, "int8", 1),
        ({"most_new": 2, "num_decoding": 2}, "float16", 1),
        ({"most_new": 1, "num_decoding": 1}, "float16", 1),
        ({}, "float16", 1),
    ],
    ids=["decodes", "int8", "drafts", "two calls", "unknown"],
)
def test_only_a_step_that_decodes_to_floats_needs_no_launch_to_write(
    change: dict[str, int], kv: str, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q_TNH, inputs, spec = _step([1, 1], [5, 9], dtype=torch.float16, kv=kv)
    k_TKH, v_TKH = torch.randn(2, 2, 2, 64).to(q_TNH)
    slots = [int(inputs.page_tables_SM[s, 0]) * 16 + at for s, at in enumerate((4, 8))]
    inputs = replace(inputs, slots_T=torch.tensor(slots, device=DEVICE), **change)
    for numbers in vars(inputs.pages[0]).values():
        if numbers is not None:
            numbers.nan_to_num_()
    angles_TF = torch.randn(2, 32, device=DEVICE)
    rotation = Rotation(cos_TF=angles_TF.cos(), sin_TF=angles_TF.sin())
    writes = Mock(wraps=write_triton.rotate_and_write)
    monkeypatch.setattr(write_triton, "rotate_and_write", writes)
    found = []
    for kernels in ("triton", "reference"):
        monkeypatch.setenv("LONGWING_KERNELS", kernels)
        found.append(Attention(0, spec)(q_TNH, k_TKH, v_TKH, rotation, inputs))
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
    assert writes.call_count == launches


def test_queries_may_be_part_of_one_projection() -> None:
    q_TNH, inputs, spec = _step(**MIXED)
    qkv_TXH = torch.cat([torch.randn_like(q_TNH), q_TNH, torch.randn_like(q_TNH)], 1)
    _assert_equals_reference(qkv_TXH[:, 4:8], inputs, spec)


def test_a_sequence_that_brings_nothing_is_passed_over() -> None:
    q_TNH, inputs, spec = _step([2, 1], [40, 20])
    pages = inputs.pages[0]
    expected = paged_triton.paged_attention(q_TNH, pages, inputs, spec)
    padded = replace(
        inputs,
        starts_S1=torch.tensor([0, 2, 2, 3, 3], dtype=torch.int32, device=DEVICE),
        context_lens_S=torch.tensor([40, 7, 20, 0], dtype=torch.int32, device=DEVICE),
        page_tables_SM=inputs.page_tables_SM[[0, 0, 1, 1]],
    )
    for most_new in (None, 2):
        actual = paged_triton.paged_attention(q_TNH, pages, padded, spec, most_new=most_new)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_no_tokens_are_no_work() -> None:
    q_TNH, inputs, spec = _step([1], [5])
    assert len(paged_triton.paged_attention(q_TNH[:0], inputs.pages[0], inputs, spec)) == 0


@pytest.mark.parametrize(("head_dim", "page_len"), [(40, 16), (272, 16), (64, 8), (64, 48)])
def test_what_the_kernel_does_not_have_is_refused_with_a_remedy(
    head_dim: int, page_len: int
) -> None:
    step = _step([1], [5], head_dim=head_dim, page_len=page_len)
    with pytest.raises(RequestError, match=r"LONGWING_KERNELS=reference|such as 64"):
        paged_triton.paged_attention(step[0], step[1].pages[0], *step[1:])


@pytest.mark.parametrize("num_programs", [1, 8, 200, 10**6])
def test_splits_never_leave_a_program_less_than_a_useful_share(num_programs: int) -> None:
    tiles = paged_triton.tiling(16, 64, 64, torch.float16)
    for most_context in (1, 100, 1000, 10**6):
        for window in (None, 64, 4096):
            spec = AttentionSpec(scale=1.0, window=window)
            num = paged_triton.splits(num_programs, most_context, spec, tiles, torch.device(DEVICE))
            assert 1 <= num <= max(1, min(most_context, window or most_context) // 64)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kv", [None, "int8"])
def test_a_captured_launch_serves_other_lengths_and_pages(kv: str | None) -> None:
    bounds = {"most_new": 2, "most_context": 1024}
    q_TNH, inputs, spec = _step([2, 2], [1000, 900], (32, 2), 64, 64, torch.bfloat16, kv)
    pages = inputs.pages[0]
    paged_triton.paged_attention(q_TNH, pages, inputs, spec, **bounds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paged_triton.paged_attention(q_TNH, pages, inputs, spec, **bounds)
    inputs.context_lens_S.copy_(torch.tensor([3, 700]))
    inputs.page_tables_SM.copy_(inputs.page_tables_SM.flip(1))
    inputs.page_tables_SM[:, -2:] = 0
    for numbers in vars(pages).values():
        if numbers is not None:
            numbers.nan_to_num_()
    graph.replay()
    expected = paged_triton.paged_attention(q_TNH, pages, inputs, spec, **bounds)
    assert torch.equal(captured, expected)
    _assert_equals_reference(q_TNH, replace(inputs), spec, **bounds)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(128, 8), (71, 1)])
def test_a_captured_step_of_decoding_writes_wherever_it_is_told(heads: tuple[int, int]) -> None:
    """As a graph's steps do, in every form: keys split and whole, fetched either way."""
    for batch in (1, 5, 40):
        contexts = [1 + 777 * s % 1500 for s in range(batch)]
        q_TNH, inputs, spec = _step([1] * batch, contexts, heads, 64, 128, torch.bfloat16)
        new, inputs = _new_kv(q_TNH, inputs)
        pages, bounds = inputs.pages[0], {"most_new": 1, "most_context": 1536}
        other = KVPages(keys_PBKH=pages.keys_PBKH.clone(), values_PBKH=pages.values_PBKH.clone())
        paged_triton.paged_attention(q_TNH, other, inputs, spec, **bounds, new=new)
        slots_T = new.slots_T.clone()
        new.slots_T.fill_(-1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = paged_triton.paged_attention(q_TNH, pages, inputs, spec, **bounds, new=new)
        new.slots_T.copy_(slots_T)
        graph.replay()
        rotated_TNH = write_triton.rotate_and_write(
            q_TNH, new.k_TKH, new.v_TKH, new.cos_TF, new.sin_TF, other, slots_T
        )
        expected = paged_triton.paged_attention(rotated_TNH, other, inputs, spec, **bounds)
        _assert_same_pages(pages, other)
        torch.testing.assert_close(captured, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("step", [([1], [20_000]), ([700], [5000]), ([1, 300, 9], [3000, 300, 9])])
@pytest.mark.parametrize(("heads", "head_dim"), [((128, 8), 64), ((32, 8), 128), ((16, 8), 256)])
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_long_contexts_in_bfloat16_give_what_the_reference_gives(
    kv: str, heads: tuple[int, int], head_dim: int, step: tuple[list[int], list[int]]
) -> None:
    _assert_equals_reference(*_step(*step, heads, head_dim, 128, torch.bfloat16, kv))
