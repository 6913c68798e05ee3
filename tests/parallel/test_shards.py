"""Every rank's part put side by side, or added up, is the whole again; on paper and from files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longwing.checkpoint import TensorFile, packed_tensors, write_tensor_file
from longwing.checkpoint.parts import PackedCut, byte_runs, cut_packed
from longwing.errors import ConfigError
from longwing.kernels import PackedWeight, dequantize, pack, unpack
from longwing.models import ModelConfig, empty_model
from longwing.parallel import Shard, shard_linear
from longwing.plan import known_config

SIZES = (1, 2, 4)
LINEARS = {
    # leaf: (inputs, outputs); a tiny Falcon and a Llama, 4 KV heads and 8 query heads, 16 wide
    "query_key_value": (128, (8 + 2 * 4) * 16),
    "dense": (128, 128),
    "dense_h_to_4h": (128, 512),
    "dense_4h_to_h": (512, 128),
    "q_proj": (128, 128),
    "k_proj": (128, 64 * 2),
    "v_proj": (128, 64 * 2),
    "o_proj": (128, 128),
    "gate_proj": (128, 512),
    "up_proj": (128, 512),
    "down_proj": (512, 128),
    "lm_head": (128, 320),
}


def shards_of(leaf: str, size: int, num_kv_heads: int = 4) -> list[Shard]:
    return [
        shard_linear(f"h.0.{leaf}", *LINEARS[leaf], num_kv_heads, size, rank)
        for rank in range(size)
    ]


def cut_of(shard: Shard, bits: int, group_size: int, *, act_order: bool = False) -> PackedCut:
    whole, ins, outs = shard.in_features, shard.ins, shard.outs
    return cut_packed(shard.name, whole, ins, outs, bits, group_size, act_order=act_order)


def put_together(parts: list[Tensor], shards: list[Shard]) -> Tensor:
    """What a column-parallel layer's ranks gather, or a row-parallel one's add up."""
    if shards[0].sums:
        return torch.stack(parts).sum(0)
    return parts[0] if shards[0].outs == shards[-1].outs else torch.cat(parts, -1)


@pytest.mark.parametrize("leaf", LINEARS)
@pytest.mark.parametrize("size", SIZES)
def test_dense_parts_multiply_to_the_whole_product(leaf: str, size: int) -> None:
    torch.manual_seed(0)
    K, N = LINEARS[leaf]
    weight_NK = torch.randn(N, K, dtype=torch.float64)
    bias_N, x_TK = torch.randn(N, dtype=torch.float64), torch.randn(3, K, dtype=torch.float64)
    shards = shards_of(leaf, size)
    parts = []
    for shard in shards:
        out_TN = x_TK[:, shard.ins] @ weight_NK[shard.weight()].T
        parts.append(out_TN + bias_N[shard.bias()] if shard.has_bias else out_TN)
    torch.testing.assert_close(put_together(parts, shards), x_TK @ weight_NK.T + bias_N)


def random_packed(K: int, N: int, bits: int, group_size: int, act_order: bool) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    G = 1 if group_size == -1 else -(-K // group_size)
    g_idx_K = torch.arange(K, dtype=torch.int32) // (K if group_size == -1 else group_size)
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=pack(torch.randint(0, 2**bits, (K, N), generator=generator), bits, 0),
        zeros_GN=torch.randint(1, 2**bits, (G, N), generator=generator).to(torch.uint8),
        scales_GN=torch.rand((G, N), generator=generator).half() + 0.5,
        g_idx_K=g_idx_K[torch.randperm(K, generator=generator)] if act_order else None,
    )


def part_of(tensors: dict[str, Tensor], cut: PackedCut, bits: int, group_size: int) -> PackedWeight:
    """One rank's layer from the parts of a file's tensors (format gptq)."""
    stored_GN = unpack(tensors["qzeros"][cut.qzeros].contiguous(), bits, 1).int()
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=tensors["qweight"][cut.qweight].contiguous(),
        zeros_GN=((stored_GN + 1) % 2**bits).to(torch.uint8),
        scales_GN=tensors["scales"][cut.scales],
        g_idx_K=tensors["g_idx"][cut.g_idx] if cut.keeps_g_idx else None,
    )


@pytest.mark.parametrize("leaf", [leaf for leaf in LINEARS if leaf != "lm_head"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "act_order"), [(32, False), (32, True), (128, False), (-1, False)]
)
def test_packed_parts_dequantise_to_the_whole_matrix(
    leaf: str, bits: int, group_size: int, act_order: bool
) -> None:
    """Groups of 128 are wider than a rank's 32 inputs: there the scales stay whole."""
    K, N = LINEARS[leaf]
    weight = random_packed(K, N, bits, group_size, act_order)
    tensors, whole_KN = packed_tensors(weight, "gptq"), dequantize(weight, torch.float32)
    for size in SIZES:
        found_KN = torch.full_like(whole_KN, float("nan"))
        for shard in shards_of(leaf, size):
            cut = cut_of(shard, bits, group_size, act_order=act_order)
            part = part_of(tensors, cut, bits, group_size)
            found_KN[shard.ins, shard.outs] = dequantize(part, torch.float32)
            whole_scales = cut.scales[0] == slice(0, len(weight.scales_GN))
            assert not (act_order and not whole_scales)
        assert torch.equal(found_KN, whole_KN)


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-180b", "falcon2-11b"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_published_falcons_split_into_equal_parts_at_4_bits(name: str, size: int) -> None:
    config = known_config(name)
    total = 0
    for layer, linear in empty_model(config).linears():
        for rank in range(size):
            shard = shard_linear(
                layer, linear.in_features, linear.out_features, config.num_kv_heads, size, rank
            )
            if layer != "lm_head":
                cut_of(shard, 4, 128)
            total += (shard.ins.stop - shard.ins.start) * (shard.outs.stop - shard.outs.start)
    parts = sum(
        linear.in_features * linear.out_features for _, linear in empty_model(config).linears()
    )
    assert total == parts


def test_falcon_s_groups_of_heads_stay_together() -> None:
    """Rank 1 of 2 of the 40B has KV heads 4 to 7, each after its 16 query heads, 64 wide."""
    config = known_config("falcon-40b")
    qkv = shard_linear("x.query_key_value", 8192, 9216, config.num_kv_heads, 2, 1)
    out = shard_linear("x.dense", 8192, 8192, config.num_kv_heads, 2, 1)
    assert qkv.outs == slice(4 * 18 * 64, 8 * 18 * 64)
    assert out.ins == slice(4 * 16 * 64, 8 * 16 * 64)


def test_only_the_first_of_summed_ranks_adds_the_bias() -> None:
    assert [shard.has_bias for shard in shards_of("dense", 4)] == [True, False, False, False]
    assert all(shard.has_bias for shard in shards_of("query_key_value", 4))


@pytest.mark.parametrize(
    ("leaf", "K", "N", "kv_heads", "why"),
    [
        ("query_key_value", 4544, 4672, 1, "do not divide the 1 key/value heads"),
        ("dense_h_to_4h", 128, 511, 8, "do not divide the 511 outputs"),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(
    leaf: str,
    K: int,
    N: int,
    kv_heads: int,
    why: str,
) -> None:
    with pytest.raises(ConfigError, match=why):
        shard_linear(leaf, K, N, kv_heads, 2, 0)


def test_parts_that_end_inside_a_word_are_refused() -> None:
    shard = shard_linear("x.down_proj", 48, 64, 4, 2, 1)
    with pytest.raises(ConfigError, match="whole 32-bit words at 3 bits"):
        cut_of(shard, 3, -1)


def test_a_head_that_does_not_divide_is_whole_everywhere() -> None:
    shard = shard_linear("lm_head", 128, 321, 4, 2, 1)
    assert shard.outs == slice(0, 321)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_runs_of_bytes_are_those_of_the_slice(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    cut = []
    for extent in shape:
        start = data.draw(st.integers(0, extent))
        cut.append(slice(start, data.draw(st.integers(start, extent))))
    whole = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    raw = whole.tobytes()
    runs = list(byte_runs(shape, cut, 2))
    found = b"".join(raw[first : first + length] for first, length in runs)
    assert found == np.ascontiguousarray(whole[tuple(cut)]).tobytes()
    assert runs == sorted(runs)


@pytest.mark.parametrize("leaf", ["query_key_value", "dense_4h_to_h"])
def test_a_rank_reads_its_part_of_a_file_and_no_more(
    leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_packed(*LINEARS[leaf], 4, 32, act_order=False)
    tensors = packed_tensors(weight, "gptq")
    write_tensor_file(tmp_path / "model.safetensors", tensors)
    file = TensorFile.open(tmp_path / "model.safetensors")
    num_read = 0

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal num_read
        num_read += (count := preadv(descriptor, buffers, offset))
        return count

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    for shard in shards_of(leaf, 4):
        cut = cut_of(shard, 4, 32)
        for name, piece in (
            ("qweight", cut.qweight),
            ("qzeros", cut.qzeros),
            ("scales", cut.scales),
        ):
            assert torch.equal(file.read(name, piece), tensors[name][piece])
    assert num_read == sum(tensors[name].nbytes for name in ("qweight", "qzeros", "scales"))


def test_the_names_are_those_of_the_models() -> None:
    """No linear of a supported model but the head is left whole by mistake."""
    for raw in (
        {"model_type": "llama", "intermediate_size": 128},
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 4},
    ):
        common = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
        config = ModelConfig.from_hf({**common, "num_attention_heads": 4, "eos_token_id": 1, **raw})
        for name, linear in empty_model(config).linears():
            shard = shard_linear(name, linear.in_features, linear.out_features, 4, 2, 1)
            assert shard.ins.start or shard.outs.start, name
