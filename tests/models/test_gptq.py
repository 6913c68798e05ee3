"""GPTQ folders in every dialect, against dense models of the same values unpacked with numpy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from gptq_writer import write_gptq
from longwing.models import load_model
from tiny import COMMON

T = 12


def _config(family: str) -> PretrainedConfig:
    shape: dict[str, Any] = {**COMMON, "num_hidden_layers": 1, "hidden_size": 128}
    if family == "falcon":
        return FalconConfig(
            **shape,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            ffn_hidden_size=256,
        )
    if family == "falcon-rw":
        alibi = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
        return FalconConfig(**shape, num_attention_heads=4, ffn_hidden_size=256, **alibi)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(**shape, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)


def _check(folder: Path, judge: torch.nn.Module, unpack: bool) -> None:
    tokens_T = torch.randint(0, 320, (T,), generator=torch.Generator().manual_seed(1))
    model = load_model(folder, unpack=unpack)
    with torch.inference_mode():
        expected_TV = judge(tokens_T[None]).logits[0]
        actual_TV = model.logits(model(tokens_T, torch.arange(T)))
    assert expected_TV.std() > 0.1
    torch.testing.assert_close(actual_TV, expected_TV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("desc_act", [False, True], ids=["natural", "act-order"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_checkpoint_gives_the_logits_of_its_dense_values(
    bits: int, group_size: int, sym: bool, desc_act: bool, v1: bool, tmp_path: Path
) -> None:
    family = "falcon" if (bits + group_size + sym) % 2 else "llama"
    judge = write_gptq(
        _config(family),
        tmp_path,
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        v1=v1,
    )
    _check(tmp_path, judge, unpack=True)
    _check(tmp_path, judge, unpack=False)


@pytest.mark.parametrize("family", ["falcon", "llama"])
def test_file_named_by_autogptq_is_found(family: str, tmp_path: Path) -> None:
    judge = write_gptq(
        _config(family),
        tmp_path,
        bits=4,
        group_size=-1,
        desc_act=True,
        file="gptq_model-4bit--1g.safetensors",
    )
    _check(tmp_path, judge, unpack=True)


@pytest.mark.parametrize("unpack", [True, False])
@pytest.mark.parametrize("family", ["falcon-rw", "qwen2"])
def test_packed_layers_keep_the_biases_of_their_model(
    family: str, unpack: bool, tmp_path: Path
) -> None:
    judge = write_gptq(_config(family), tmp_path, bits=4)
    _check(tmp_path, judge, unpack=unpack)


def test_settings_inside_config_json_are_read(tmp_path: Path) -> None:
    judge = write_gptq(_config("llama"), tmp_path, bits=3, group_size=64, v1=False)
    block = json.loads((tmp_path / "quantize_config.json").read_text())
    (tmp_path / "quantize_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = block
    (tmp_path / "config.json").write_text(json.dumps(config))
    _check(tmp_path, judge, unpack=True)


def test_settings_as_scalar_tensors_inside_the_file_are_read(tmp_path: Path) -> None:
    judge = write_gptq(_config("falcon"), tmp_path, bits=4, group_size=32, desc_act=True)
    (tmp_path / "quantize_config.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["gptq_bits"] = torch.tensor(4)
    tensors["gptq_groupsize"] = torch.tensor(32)
    save_file(tensors, tmp_path / "model.safetensors")
    _check(tmp_path, judge, unpack=True)


@pytest.mark.parametrize("unpack", [True, False])
def test_biases_that_gptq_savers_added_are_applied(unpack: bool, tmp_path: Path) -> None:
    judge = write_gptq(_config("falcon"), tmp_path, bits=4)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.mlp.dense_h_to_4h"
    bias = torch.linspace(-1, 1, 256).half()
    tensors[f"{name}.bias"] = bias
    save_file(tensors, tmp_path / "model.safetensors")
    linear = judge.get_submodule(name)
    linear.bias = torch.nn.Parameter(bias.float())
    _check(tmp_path, judge, unpack=unpack)


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.word_embeddings.weight"])
def test_tied_falcon_loads_with_either_of_its_two_matrices(kept: str, tmp_path: Path) -> None:
    judge = write_gptq(_config("falcon"), tmp_path, bits=4)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[kept] = tensors.pop("transformer.word_embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.embedding.weight
    _check(tmp_path, judge, unpack=True)


def test_two_equal_matrices_under_a_tied_config_become_one(tmp_path: Path) -> None:
    write_gptq(_config("falcon"), tmp_path, bits=4)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.embedding.weight
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is not model.embedding.weight
