"""GPTQ layers between file and memory: both zero-point dialects, groups, overrides, round trips.

The judge of packed words is Python's own big integers: a row of words is one little-endian number.
"""

import dataclasses
import json
from pathlib import Path

import good_folders
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longwing.checkpoint import (
    Checkpoint,
    QuantConfig,
    TensorInfo,
    check_packed,
    packed_names,
    packed_tensors,
    read_packed,
    write_tensor_file,
)
from longwing.errors import CheckpointError
from longwing.kernels.wna16 import PackedWeight, dequantize, pack

WIDTHS = [2, 3, 4, 8]


def write_layer(folder: Path, layer: dict[str, Tensor], **quant: object) -> Checkpoint:
    """A folder of one packed layer, "up"."""
    good_folders.write_config(folder, quantization_config={"desc_act": False, **quant})
    save_file({f"up.{suffix}": t for suffix, t in layer.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def read_layer(checkpoint: Checkpoint, K: int, N: int) -> PackedWeight:
    return read_packed(checkpoint, "up", K, N, checkpoint.quant)


def fields(words: Tensor, bits: int) -> list[int]:
    """Values of one row of words, by integer arithmetic alone."""
    stream = int.from_bytes(words.contiguous().numpy().tobytes(), "little")
    return [(stream >> bits * k) & (2**bits - 1) for k in range(len(words) * 32 // bits)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_version_1_zeros_are_stored_plus_one_field_by_field(tmp_path, bits):
    """All stored values in one row, maxq among them: it becomes 0 and carries into no neighbour."""
    N = 256
    stored_GN = torch.stack([torch.arange(N) % 2**bits, torch.full((N,), 2**bits - 1)])
    layer = good_folders.packed_layer(64, N, bits, 32, seed=0, stored_GN=stored_GN)
    checkpoint = write_layer(tmp_path, layer, bits=bits, group_size=32)
    zeros_GN = read_layer(checkpoint, 64, N).zeros_GN
    assert zeros_GN.dtype == torch.uint8
    for g in range(2):
        stored = fields(layer["qzeros"][g], bits)
        assert zeros_GN[g].tolist() == [(value + 1) % 2**bits for value in stored]
    assert not zeros_GN[1].any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_version_2_zeros_are_taken_as_they_are(tmp_path, bits):
    stored_GN = torch.arange(256).reshape(2, 128) % 2**bits
    layer = good_folders.packed_layer(64, 128, bits, 32, seed=0, stored_GN=stored_GN)
    checkpoint = write_layer(tmp_path, layer, bits=bits, group_size=32, checkpoint_format="gptq_v2")
    zeros_GN = read_layer(checkpoint, 64, 128).zeros_GN
    assert [row.tolist() for row in zeros_GN] == [fields(row, bits) for row in layer["qzeros"]]


def test_golden_words_of_3_and_4_bits(tmp_path):
    words = torch.tensor([[0x88FAC688, 0xC688FAC6, 0xFAC688FA]]).to(torch.uint32)
    layer = good_folders.packed_layer(32, 32, 3, -1, seed=0)
    layer["qzeros"] = words.view(torch.int32)
    checkpoint = write_layer(tmp_path, layer, bits=3, group_size=-1)
    assert read_layer(checkpoint, 32, 32).zeros_GN[0].tolist() == [(k + 1) % 8 for k in range(32)]
    layer = good_folders.packed_layer(32, 8, 4, -1, seed=0)
    layer["qzeros"] = torch.tensor([[0x76543210]], dtype=torch.int32)
    checkpoint = write_layer(tmp_path, layer, bits=4, group_size=-1)
    assert read_layer(checkpoint, 32, 8).zeros_GN[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [-1, 16, 48])
def test_dequantised_layer_is_scale_times_q_minus_zero(tmp_path, bits, group_size):
    K, N = 96, 64
    layer = good_folders.packed_layer(K, N, bits, group_size, seed=1)
    weight = read_layer(write_layer(tmp_path, layer, bits=bits, group_size=group_size), K, N)
    assert weight.g_idx_K is None
    q_KN = torch.tensor([fields(column, bits) for column in layer["qweight"].T]).T
    zeros_GN = (torch.tensor([fields(row, bits) for row in layer["qzeros"]]) + 1) % 2**bits
    group_K = layer["g_idx"].long()
    wanted_KN = layer["scales"].float()[group_K] * (q_KN - zeros_GN[group_K])
    assert torch.equal(dequantize(weight, torch.float32), wanted_KN)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_layer_we_write_reads_back_bit_for_bit(tmp_path, bits, checkpoint_format, act_order):
    K, N = 64, 32
    generator = torch.Generator().manual_seed(bits)
    lowest = 1 if checkpoint_format == "gptq" else 0
    weight = PackedWeight(
        bits=bits,
        group_size=32,
        qweight_WN=pack(torch.randint(0, 2**bits, (K, N), generator=generator), bits, 0),
        zeros_GN=torch.randint(lowest, 2**bits, (2, N), generator=generator).to(torch.uint8),
        scales_GN=torch.rand(2, N, generator=generator).bfloat16() + 1,
        g_idx_K=(torch.randperm(K, generator=generator) // 32).int() if act_order else None,
    )
    quant = QuantConfig(
        bits=bits, group_size=32, desc_act=act_order, checkpoint_format=checkpoint_format
    )
    good_folders.write_config(tmp_path, quantization_config=quant.to_hf())
    written = packed_tensors(weight, checkpoint_format)
    write_tensor_file(
        tmp_path / "model.safetensors", {f"up.{suffix}": t for suffix, t in written.items()}
    )
    read = read_layer(Checkpoint.open(tmp_path), K, N)
    for field in dataclasses.fields(PackedWeight):
        ours, theirs = getattr(read, field.name), getattr(weight, field.name)
        same = torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
        assert same, field.name


def packed_weight(bits: int, zero: int) -> PackedWeight:
    return PackedWeight(
        bits=bits,
        group_size=-1,
        qweight_WN=torch.zeros(bits, 32, dtype=torch.int32),
        zeros_GN=torch.full((1, 32), zero, dtype=torch.uint8),
        scales_GN=torch.ones(1, 32),
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_true_zero_of_0_is_not_written_in_version_1(bits):
    with pytest.raises(CheckpointError, match=r"32 zero points are 0.*gptq_v2"):
        packed_tensors(packed_weight(bits, 0), "gptq")
    assert not packed_tensors(packed_weight(bits, 0), "gptq_v2")["qzeros"].any()


def test_zeros_and_formats_that_cannot_be_are_not_written():
    with pytest.raises(CheckpointError, match="does not fit 4 bits"):
        packed_tensors(packed_weight(4, 16), "gptq_v2")
    with pytest.raises(CheckpointError, match="marlin"):
        packed_tensors(packed_weight(4, 8), "marlin")


def test_a_missing_g_idx_means_the_plain_order(tmp_path):
    layer = good_folders.packed_layer(64, 32, 4, 32, seed=0)
    del layer["g_idx"]
    checkpoint = write_layer(tmp_path, layer, bits=4, group_size=32, desc_act=True)
    weight = read_layer(checkpoint, 64, 32)
    assert weight.g_idx_K is None
    assert torch.equal(weight.group_of_row_K(), torch.arange(64) // 32)


def test_act_order_is_kept_only_where_it_says_something(tmp_path):
    layer = good_folders.packed_layer(64, 32, 4, 32, seed=0)
    checkpoint = write_layer(tmp_path / "a", layer, bits=4, group_size=32, desc_act=True)
    assert read_layer(checkpoint, 64, 32).g_idx_K is None
    layer["g_idx"] = layer["g_idx"].flip(0)
    checkpoint = write_layer(tmp_path / "b", layer, bits=4, group_size=32, desc_act=True)
    assert torch.equal(read_layer(checkpoint, 64, 32).g_idx_K, layer["g_idx"])


def test_act_order_without_groups_costs_nothing(tmp_path):
    """Falcon-40B-Instruct GPTQ: group -1 and desc_act; its g_idx is all zero."""
    layer = good_folders.packed_layer(64, 32, 4, -1, seed=0)
    checkpoint = write_layer(tmp_path, layer, bits=4, group_size=-1, desc_act=True)
    weight = read_layer(checkpoint, 64, 32)
    assert weight.g_idx_K is None
    assert weight.group_size == -1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_floating_type_are_kept(tmp_path, dtype):
    layer = good_folders.packed_layer(64, 32, 4, 32, seed=0)
    layer["scales"] = layer["scales"].to(dtype)
    checkpoint = write_layer(tmp_path, layer, bits=4, group_size=32)
    assert read_layer(checkpoint, 64, 32).scales_GN.dtype == dtype


def test_the_smallest_scale_above_zero_is_accepted(tmp_path):
    layer = good_folders.packed_layer(64, 32, 4, 32, seed=0)
    layer["scales"][0, 0] = 6e-8
    assert layer["scales"][0, 0] > 0
    read_layer(write_layer(tmp_path, layer, bits=4, group_size=32), 64, 32)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_scale_of_zero_loads_as_weights_of_zero(tmp_path, zero):
    """What other tools write for a column so small that its scale underflows in float16."""
    layer = good_folders.packed_layer(64, 32, 4, 32, seed=0)
    layer["scales"][1, 5] = zero
    weight = read_layer(write_layer(tmp_path, layer, bits=4, group_size=32), 64, 32)
    dense_KN = dequantize(weight, torch.float32)
    assert not dense_KN[32:, 5].any()
    assert dense_KN[:32, 5].any()


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (2, 16), (3, 64), (4, -1), (4, 32)])
def test_dynamic_rules_let_each_layer_show_its_own_width(tmp_path, bits, group_size):
    layer = good_folders.packed_layer(64, 32, bits, group_size, seed=0)
    rule = {"+:up": {"bits": bits, "group_size": group_size}}
    checkpoint = write_layer(tmp_path, layer, bits=4, group_size=32, dynamic=rule)
    weight = read_layer(checkpoint, 64, 32)
    assert weight.bits == bits
    # One group of 64 rows of 64 is told in two ways.
    assert weight.group_size in (group_size, -1 if group_size == 64 else group_size)
    assert torch.equal(weight.group_of_row_K(), layer["g_idx"].long())


def test_without_dynamic_rules_another_width_is_an_error(tmp_path):
    layer = good_folders.packed_layer(64, 32, 8, 32, seed=0)
    checkpoint = write_layer(tmp_path, layer, bits=4, group_size=32, dynamic={"-:other": {}})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: up\.qweight: has shape"):
        read_layer(checkpoint, 64, 32)


def test_the_structural_check_lists_every_fault_and_needs_no_data():
    def info(dtype: torch.dtype, *shape: int) -> TensorInfo:
        return TensorInfo(dtype=dtype, shape=shape, offset=0, nbytes=0)

    infos = {
        "qweight": info(torch.int32, 9, 32),
        "qzeros": info(torch.int64, 2, 4),
        "scales": info(torch.float16, 3, 32),
        "g_idx": info(torch.int32, 64),
        "bias": info(torch.float16, 31),
    }
    quant = QuantConfig(bits=4, group_size=32)
    errors = check_packed(infos, "up", 64, 32, quant, {"scales": "b.safetensors"})
    assert [error.tensor for error in errors] == ["up.qweight", "up.qzeros", "up.scales", "up.bias"]
    assert errors[2].file == "b.safetensors"
    assert [error.tensor for error in check_packed({}, "up", 64, 32, quant)] == [
        "up.qweight",
        "up.qzeros",
        "up.scales",
    ]


@pytest.mark.parametrize(("K", "N", "bits"), [(36, 32, 2), (48, 32, 3), (64, 36, 4), (64, 30, 8)])
def test_features_that_do_not_fill_words_are_refused(K, N, bits):
    infos = {
        suffix: TensorInfo(dtype=torch.int32, shape=(1, 1), offset=0, nbytes=4)
        for suffix in ("qweight", "qzeros", "scales")
    }
    errors = check_packed(infos, "up", K, N, QuantConfig(bits=bits, group_size=-1))
    assert ["fill whole" in str(error) for error in errors] == [True]


def test_the_names_of_a_layer_are_its_name_and_a_suffix():
    assert packed_names("h.0.dense")["g_idx"] == "h.0.dense.g_idx"
    assert list(packed_names("a")) == ["qweight", "qzeros", "scales", "g_idx", "bias"]


def test_a_layer_whose_parts_lie_in_two_shards_is_read(packed, tmp_path):
    """A shard border may run between qweight and scales; a fault names the right file."""
    tensors = load_file(packed / "model.safetensors")
    first = {name: t for name, t in tensors.items() if name.endswith(".qweight")}
    second = {name: t for name, t in tensors.items() if name not in first}
    second["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")
    (packed / "model.safetensors").unlink()
    weight_map = {}
    for file, group in (("a.safetensors", first), ("b.safetensors", second)):
        save_file(group, packed / file)
        weight_map.update(dict.fromkeys(group, file))
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(packed)
    read_packed(checkpoint, "model.layers.0.mlp.down_proj", 96, 64, checkpoint.quant)
    with pytest.raises(CheckpointError, match=r"^b\.safetensors: .*up_proj\.scales"):
        read_packed(checkpoint, "model.layers.0.mlp.up_proj", 64, 96, checkpoint.quant)
