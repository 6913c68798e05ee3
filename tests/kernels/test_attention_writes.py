"""Attention that rotates and writes as it decodes, against two launches: rotation and write, then
attention. Interpreted on a CPU, or on a GPU.
"""

import os
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from longwing.kernels import AttentionInputs, AttentionSpec, KVPages, alibi_slopes
from longwing.kernels.digits import Digits
from longwing.layers import Attention, Rotation
from paged_steps import DECODE, DEVICE, FLOATS, TOLERANCE, made_step

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
attend_triton: Any = pytest.importorskip("longwing.kernels.attend_triton")
paged_triton: Any = pytest.importorskip("longwing.kernels.paged_triton")
write_triton: Any = pytest.importorskip("longwing.kernels.write_triton")
if DEVICE == "cpu" and type(attend_triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

Tiling = paged_triton.Tiling


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
    step = made_step([1, 1, 0, 1], [1, 128, 9, 77], page_len=page_len, **shape)
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
    q_TNH, inputs, spec = made_step(**DECODE, heads=(6, 3), dtype=torch.float16)
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
    q_TNH, inputs, spec = made_step(**DECODE, dtype=torch.float16)
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
    q_TNH, inputs, spec = made_step([1, 1], [5, 9], kv=kv)
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
    q_TNH, inputs, spec = made_step([1, 1], [5, 9], dtype=torch.float16, kv=kv)
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


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(128, 8), (71, 1)])
def test_a_captured_step_of_decoding_writes_wherever_it_is_told(heads: tuple[int, int]) -> None:
    """As a graph's steps do, in every form: keys split and whole, fetched either way."""
    for batch in (1, 5, 40):
        contexts = [1 + 777 * s % 1500 for s in range(batch)]
        q_TNH, inputs, spec = made_step([1] * batch, contexts, heads, 64, 128, torch.bfloat16)
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
