"""The planned workspace is no less than what the real modules hold, and not much more."""

from itertools import combinations_with_replacement
from types import SimpleNamespace

import pytest
import torch
from live_bytes import LiveBytes
from tiny_models import config

from longwing.checkpoint import QuantConfig
from longwing.engine.graphs import MOST_TOKENS, DecodeGraphs
from longwing.engine.options import DEFAULTS
from longwing.engine.rotations import Rotations
from longwing.kernels import BITS, AttentionInputs, KVPages, PackedWeight, dequantize
from longwing.models import Decoder, empty_model
from longwing.plan import known_config, kv_bytes_per_token, plan
from longwing.plan.workspace import (
    CONTEXT_BYTES,
    DENSE_SLICE,
    DEQUANTISE_BYTES,
    LOSS_BYTES,
    NUM_GRAPHS,
    SLICE_ROWS,
    activation_bytes,
    dense_slice_bytes,
    graphs_bytes,
    logits_bytes,
    mask_bytes,
    rope_table_bytes,
    runs_streamed,
)

MIB, GIB = 2**20, 2**30
CHUNK = 64
UNMASKED = ["falcon, two norms", "falcon, one norm", "llama", "qwen2"]
MASKED = ["falcon, alibi and biases", "mistral, windowed"]
DTYPES = [torch.bfloat16, torch.float32]


def filled(kind: str, dtype: torch.dtype, context: int) -> Decoder:
    model = empty_model(config(kind), context).to_empty(device="cpu").to(dtype)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.place_tables(torch.device("cpu"))
    if model.rotary:
        model.rotary.table(context)
    return model


def held_by_last_chunk(model: Decoder, context: int, chunk: int) -> int:
    """Bytes held at the fullest moment while the last chunk of a prompt is read."""
    shape = (1, context, model.config.num_kv_heads, model.config.head_dim)
    pages = tuple(
        KVPages(
            keys_PBKH=torch.zeros(shape, dtype=model.dtype),
            values_PBKH=torch.zeros(shape, dtype=model.dtype),
        )
        for _ in range(model.config.num_layers)
    )
    with torch.inference_mode(), LiveBytes() as live:
        positions_T = torch.arange(context - chunk, context)
        rows = model.rotary.rows(context, positions_T) if model.rotary else (None, None)
        inputs = AttentionInputs(
            starts_S1=torch.tensor([0, chunk], dtype=torch.int32),
            context_lens_S=torch.tensor([context], dtype=torch.int32),
            page_tables_SM=torch.tensor([[0]], dtype=torch.int32),
            slots_T=positions_T,
            pages=pages,
            cos_TF=rows[0],
            sin_TF=rows[1],
        )
        model(torch.zeros(chunk, dtype=torch.int64), positions_T, inputs)
    return live.peak


@pytest.mark.parametrize("kind", UNMASKED + MASKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [CHUNK, 4 * CHUNK])
def test_a_chunk_holds_no_more_than_was_planned(kind, dtype, context):
    model = filled(kind, dtype, context)
    planned = activation_bytes(model.config, CHUNK, dtype.itemsize) + mask_bytes(
        model.config, CHUNK, context, dtype.itemsize
    )
    # A few tensors of one number a sequence (starts, lengths, page tables) are not planned for.
    assert held_by_last_chunk(model, context, CHUNK) <= planned + 64


@pytest.mark.parametrize("kind", UNMASKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_not_planned_far_above_what_is_held(kind, dtype):
    model = filled(kind, dtype, CHUNK)
    planned = activation_bytes(model.config, CHUNK, dtype.itemsize)
    assert planned < 1.3 * held_by_last_chunk(model, CHUNK, CHUNK)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_making_a_matrix_dense_holds_what_was_planned(bits, dtype, monkeypatch):
    K, N, tile = 512, 256, 2**14
    monkeypatch.setattr("longwing.kernels.wna16.DEQUANTISE_TILE", tile)
    weight = PackedWeight(
        bits=bits,
        group_size=128,
        qweight_WN=torch.zeros(K * bits // 32, N, dtype=torch.int32),
        zeros_GN=torch.ones(K // 128, N, dtype=torch.uint8),
        scales_GN=torch.ones(K // 128, N, dtype=torch.float16),
    )
    with LiveBytes() as live:
        dequantize(weight, dtype)
    planned = K * N * dtype.itemsize + DEQUANTISE_BYTES * tile
    assert live.peak == pytest.approx(planned, rel=0.05), (
        "kernels.dequantize has changed what it holds; change DEQUANTISE_BYTES with it"
    )


def test_a_slice_of_a_streamed_matrix_is_planned_as_the_kernels_cut_it():
    """128 Mi weights in whole tiles of 128 outputs, and their products."""
    wna16_dense = pytest.importorskip("longwing.kernels.wna16_dense")
    assert (wna16_dense.DENSE_SLICE, wna16_dense.SLICE_ROWS) == (DENSE_SLICE, SLICE_ROWS)
    model = empty_model(known_config("falcon-40b"))
    assert dense_slice_bytes(model, 2048, 2) == 16_384 * (8192 + 2048) * 2
    small = empty_model(config("llama"))
    assert dense_slice_bytes(small, 1, 2) == 768 * 257 * 2


def test_one_slice_of_a_streamed_matrix_is_dense_at_a_time(monkeypatch):
    """Two of Falcon-40B's would be 256 MiB more than is planned."""
    wna16_dense = pytest.importorskip("longwing.kernels.wna16_dense")
    T, K, N = 4, 512, 1024
    monkeypatch.setattr(wna16_dense, "DENSE_SLICE", N * K // 4)
    made = []

    def dequantize(weight, start, stop):
        made.append(stop - start)
        return torch.zeros(stop - start, K, dtype=torch.bfloat16)

    monkeypatch.setattr(wna16_dense, "dequantize", dequantize)
    weight = SimpleNamespace(starts=(0, N), in_features=K)
    x_TK, out_TN = (torch.zeros(T, size, dtype=torch.bfloat16) for size in (K, N))
    with LiveBytes() as live:
        wna16_dense.multiply_dense(x_TK, weight, wna16_dense.After(), out_TN)
    assert made == [SLICE_ROWS] * 4
    assert live.peak <= SLICE_ROWS * (K + T) * 2


def test_pages_of_all_layers_lose_nothing_much_to_a_gpus_allocator():
    """It hands out pieces of 10 MiB and more in whole 2 MiB."""
    model, num_pages, page_len = known_config("falcon-40b"), 195, 128
    shape = (num_pages, page_len, model.num_kv_heads, model.head_dim)
    with LiveBytes() as live:
        layers = KVPages.allocate_layers(model.num_layers, *shape, dtype="int8", device="meta")
    pieces = live.pieces
    assert len(layers) == model.num_layers
    assert sum(pieces) == sum(layer.nbytes for layer in layers)
    assert sum(pieces) == kv_bytes_per_token(model, "int8") * num_pages * page_len
    assert sum(-(-piece // (2 * MIB)) * 2 * MIB for piece in pieces) - sum(pieces) <= 8 * MIB


@pytest.mark.parametrize(
    ("num_pages", "reserved", "pages_rounded"),
    [
        # 4 bits, 24,576 tokens: in tensors and between them, when a step failed for a second slice.
        (195, 22.47 * GIB + 300.58 * MIB, 60 * (2 * 14 + 2) * MIB),
        # 3 bits, 100,000 tokens: the peak, less the second slice.
        (784, 24_643_633_152 - 2 * DENSE_SLICE, (60 * 2 * 50 + 20 * 20) * MIB),
    ],
)
def test_falcon_40b_has_room_left_under_24_gib_by_what_was_seen_on_an_h200(
    num_pages, reserved, pages_rounded
):
    """Seen where every layer's pages were pieces of their own, `pages_rounded` in all.

    They may have filled holes that loading left: of zero points, gone where they are all the same.
    """
    model = known_config("falcon-40b")
    holes = 64 * (9216 + 8192 + 32_768 + 4 * 8192) * 60
    pages = kv_bytes_per_token(model, "int8") * num_pages * 128
    limit = 24 * GIB - CONTEXT_BYTES - graphs_bytes(model, 1)
    assert reserved - pages_rounded + pages + holes + LOSS_BYTES / 2 < limit - 150 * MIB


def test_graphs_are_planned_for_every_shape_that_a_decoding_step_can_have():
    """A context of 24 K has five bounds, and drafts come from up to four sequences."""
    model = empty_model(known_config("falcon-40b"))
    pages = KVPages.allocate(1, 16, 1, 16, dtype="float32", device="cpu")
    drafted = DEFAULTS["cuda"]["max_draft"] + 1
    for most, planned in NUM_GRAPHS.items():
        graphs = DecodeGraphs(
            model, (pages,), context=24_576, most_sequences=most, rotations=Rotations(None)
        )
        shapes = set(graphs.usual_shapes())
        for num in range(1, min(most, DEFAULTS["cuda"]["draft_sequences"]) + 1):
            for new_lens in combinations_with_replacement(range(1, drafted + 1), num):
                shapes |= {graphs.padded(new_lens, longest) for longest in graphs.contexts}
        assert len(shapes) == planned, most
    assert most == MOST_TOKENS
    assert graphs_bytes(model.config, 64) == 38 * 60 * 116 * 1024 > 152 * 2**20
    assert graphs_bytes(model.config, 3) == graphs_bytes(model.config, 4)
    assert graphs_bytes(model.config, 1000) == graphs_bytes(model.config, 64)


@pytest.mark.parametrize(
    ("name", "group_size", "expected"),
    [
        ("falcon-40b", 128, True),
        ("falcon-40b", -1, True),
        ("falcon-40b", 16, False),
        ("falcon-7b", 64, True),
        ("falcon-7b", 128, False),
    ],
)
def test_what_the_kernels_have_no_form_for_is_planned_as_the_reference_runs_it(
    name, group_size, expected
):
    model = empty_model(known_config(name))
    quant = QuantConfig(bits=4, group_size=group_size)
    assert runs_streamed(model, quant, 2) is expected
    assert not runs_streamed(model, quant, 4)
    halves, floats = (
        plan(known_config(name), context=8192, quant=quant, dtype=dtype).workspace
        for dtype in ("bfloat16", "float32")
    )
    assert halves.mask == 0 < floats.mask
    assert (halves.unpacked_zeros == 0) is expected
    assert halves.dequantised < floats.dequantised
    assert floats.unpacked_zeros > 0


def test_logits_hold_what_was_planned():
    model = filled("llama", torch.bfloat16, CHUNK)
    hidden_TD = torch.zeros(3, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode(), LiveBytes() as live:
        model.logits(hidden_TD)
    assert live.peak == logits_bytes(model.config, batch=3, head_bytes=2)


def test_rope_tables_hold_what_was_planned():
    model = filled("llama", torch.bfloat16, context=100)
    held = sum(tensor.nbytes for tensor in model.rotary.table(100))
    assert held == rope_table_bytes(model.config, 100)
    assert rope_table_bytes(config("falcon, alibi and biases"), 100) == 0
