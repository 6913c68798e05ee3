"""Attention over pages in Triton against the reference: interpreted on a CPU, or on a GPU.

The interpreter multiplies float16 and float32 alone, so bfloat16 is only tested on a GPU.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from longwing.errors import RequestError
from longwing.kernels import AttentionSpec, alibi_slopes
from longwing.kernels.digits import Digits
from longwing.layers import Attention
from paged_steps import DECODE, DEVICE, FLOATS, MIXED, assert_equals_reference, made_step

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
attend_triton: Any = pytest.importorskip("longwing.kernels.attend_triton")
paged_triton: Any = pytest.importorskip("longwing.kernels.paged_triton")
write_triton: Any = pytest.importorskip("longwing.kernels.write_triton")
if DEVICE == "cpu" and type(attend_triton.triton.language.max).__name__ == "JITFunction":
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

Tiling = paged_triton.Tiling


@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", [(3, 3), (6, 3), (16, 1), (71, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_heads_that_share_keys_get_what_the_reference_gives(
    dtype: torch.dtype, heads: tuple[int, int], step: dict[str, list[int]]
) -> None:
    assert_equals_reference(*made_step(**step, heads=heads, dtype=dtype))


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_heads_can_be_written_in_the_order_that_a_product_of_many_tokens_takes(
    num_splits: int, head_dim: int
) -> None:
    q_TNH, inputs, spec = made_step(**MIXED, heads=(6, 3), head_dim=head_dim, dtype=torch.float16)
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
        q_TNH, inputs, spec = made_step(**step, heads=heads, head_dim=head_dim, dtype=torch.float16)
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
    q_TNH, inputs, spec = made_step([1, 1, 3], [50, 7, 40], dtype=torch.float16)
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
    q_TNH, inputs, spec = made_step([1, 1, 20, 3], [50, 7, 40, 3])
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
    assert_equals_reference(*made_step(**step, head_dim=head_dim, heads=(2, 1)))


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("page_len", [16, 32, 64, 128, 256])
def test_pages_of_every_length_give_what_the_reference_gives(page_len: int, kv: str | None) -> None:
    assert_equals_reference(*made_step(**MIXED, page_len=page_len, kv=kv))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [1, 16, 70, 1000])
def test_windows_and_alibi_follow_the_reference(window: int, alibi: bool, num_splits: int) -> None:
    q_TNH, inputs, spec = made_step([3, 20, 1], [9, 60, 150], heads=(2, 2), page_len=32)
    slopes = alibi_slopes(2).to(DEVICE) if alibi else None
    spec = replace(spec, window=window, alibi_slopes_N=slopes)
    assert_equals_reference(q_TNH, inputs, spec, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [2, 3, 16])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_any_number_of_splits_gives_what_the_reference_gives(
    kv: str | None, num_splits: int
) -> None:
    assert_equals_reference(*made_step(**DECODE, kv=kv), num_splits=num_splits)


@pytest.mark.parametrize("most_new", [None, 40, 64])
@pytest.mark.parametrize("rows", [16, 64])
def test_a_tile_finds_its_rows_whatever_the_host_knows(rows: int, most_new: int | None) -> None:
    """Tiles that begin and end inside a token, too: 6 heads share keys."""
    tiles = Tiling(rows=rows, keys=16, num_warps=4, num_stages=2)
    step = made_step([5, 1, 40, 2], [5, 30, 40, 77], heads=(6, 1))
    assert_equals_reference(*step, tiles=tiles, most_new=most_new)


@pytest.mark.parametrize("num_new", [2, 5, 9])
def test_drafts_are_verified_as_if_each_token_came_alone(num_new: int) -> None:
    step = made_step([num_new, num_new], [num_new, 150], heads=(16, 1), page_len=64)
    assert_equals_reference(*step, most_new=9, most_context=4096, num_splits=4)


def test_the_copy_engine_fetches_what_threads_fetch() -> None:
    tiles = Tiling(rows=64, keys=64, num_warps=4, num_stages=2, bulk=True)
    q_TNH, inputs, spec = made_step(**MIXED, page_len=128)
    for window in (None, 30):
        assert_equals_reference(q_TNH, inputs, replace(spec, window=window), tiles=tiles)


def test_queries_may_be_part_of_one_projection() -> None:
    q_TNH, inputs, spec = made_step(**MIXED)
    qkv_TXH = torch.cat([torch.randn_like(q_TNH), q_TNH, torch.randn_like(q_TNH)], 1)
    assert_equals_reference(qkv_TXH[:, 4:8], inputs, spec)


def test_a_sequence_that_brings_nothing_is_passed_over() -> None:
    q_TNH, inputs, spec = made_step([2, 1], [40, 20])
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
    q_TNH, inputs, spec = made_step([1], [5])
    assert len(paged_triton.paged_attention(q_TNH[:0], inputs.pages[0], inputs, spec)) == 0


@pytest.mark.parametrize(("head_dim", "page_len"), [(40, 16), (272, 16), (64, 8), (64, 48)])
def test_what_the_kernel_does_not_have_is_refused_with_a_remedy(
    head_dim: int, page_len: int
) -> None:
    step = made_step([1], [5], head_dim=head_dim, page_len=page_len)
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
    q_TNH, inputs, spec = made_step([2, 2], [1000, 900], (32, 2), 64, 64, torch.bfloat16, kv)
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
    assert_equals_reference(q_TNH, replace(inputs), spec, **bounds)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("step", [([1], [20_000]), ([700], [5000]), ([1, 300, 9], [3000, 300, 9])])
@pytest.mark.parametrize(("heads", "head_dim"), [((128, 8), 64), ((32, 8), 128), ((16, 8), 256)])
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_long_contexts_in_bfloat16_give_what_the_reference_gives(
    kv: str, heads: tuple[int, int], head_dim: int, step: tuple[list[int], list[int]]
) -> None:
    assert_equals_reference(*made_step(*step, heads, head_dim, 128, torch.bfloat16, kv))
