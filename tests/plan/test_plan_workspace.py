"""The planned workspace is no less than what the real modules hold, and not much more."""

from itertools import combinations_with_replacement

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
from longwing.plan import known_config, plan
from longwing.plan.workspace import (
    DENSE_SLICE,
    DEQUANTISE_BYTES,
    NUM_GRAPHS,
    activation_bytes,
    dense_slice_bytes,
    graphs_bytes,
    logits_bytes,
    mask_bytes,
    rope_table_bytes,
    runs_streamed,
)

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
    wna16_triton = pytest.importorskip("longwing.kernels.wna16_triton")
    assert wna16_triton.DENSE_SLICE == DENSE_SLICE
    model = empty_model(known_config("falcon-40b"))
    assert dense_slice_bytes(model, 2048, 2) == 16_384 * (8192 + 2048) * 2
    small = empty_model(config("llama"))
    assert dense_slice_bytes(small, 1, 2) == 704 * 257 * 2


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
