"""GPTQ checkpoints written and read with numpy alone, independently of longwing's packing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from tiny import make_model

LINEARS = (
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack along the last axis: a little-endian bit stream in int32 words."""
    planes = (values[..., None] >> np.arange(bits)) & 1
    stream = planes.reshape(*values.shape[:-1], -1).astype(np.uint8)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Undo `pack_bits`."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*words.shape[:-1], -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def dequantise(tensors: dict[str, torch.Tensor], name: str, bits: int, v1: bool) -> torch.Tensor:
    """The dense (out, in) float32 weight of a packed linear, from its definition."""
    part = {s: tensors[f"{name}.{s}"].numpy() for s in ("qweight", "qzeros", "scales", "g_idx")}
    q_NK = unpack_bits(part["qweight"].T, bits)
    zeros_GN = unpack_bits(part["qzeros"], bits)
    if v1:
        zeros_GN = (zeros_GN + 1) % 2**bits
    g_K = part["g_idx"]
    scales_GN = part["scales"].astype(np.float32)
    dense_NK = (q_NK - zeros_GN[g_K].T).astype(np.float32) * scales_GN[g_K].T
    return torch.from_numpy(dense_NK)


def settings(bits: int, group_size: int, sym: bool, desc_act: bool, v1: bool) -> dict[str, Any]:
    """quantize_config.json as AutoGPTQ and GPTQModel write it."""
    return {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": desc_act,
        "static_groups": False,
        "sym": sym,
        "true_sequential": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if v1 else "gptq_v2",
    }


def write_gptq(
    config: PretrainedConfig,
    folder: Path,
    *,
    bits: int,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    v1: bool = True,
    seed: int = 0,
    file: str = "model.safetensors",
) -> torch.nn.Module:
    """Write a random GPTQ checkpoint; returns transformers' dense model of the same values."""
    rng = np.random.default_rng(seed)
    model = make_model(config, seed)
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name in [n for n in tensors if n.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in LINEARS:
            N, K = tensors.pop(name).shape
            tensors |= {
                f"{layer}.{suffix}": torch.from_numpy(np.ascontiguousarray(array))
                for suffix, array in _random(rng, K, N, bits, group_size, sym, desc_act, v1).items()
            }
    model.config.save_pretrained(folder)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "quantize_config.json").write_text(
        json.dumps(settings(bits, group_size, sym, desc_act, v1))
    )
    _fill(model, load_file(folder / file), bits, v1)
    return model


def _random(
    rng: np.random.Generator,
    K: int,
    N: int,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    v1: bool,
) -> dict[str, np.ndarray]:
    G = 1 if group_size == -1 else K // group_size
    zeros = np.full((G, N), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (G, N))
    g_idx = np.arange(K) // (K if group_size == -1 else group_size)
    if desc_act:
        g_idx = rng.permutation(g_idx)
    scales = rng.uniform(0.5, 1.5, (G, N)) * 2.0 ** (1 - bits) * K**-0.5
    return {
        "qweight": pack_bits(rng.integers(0, 2**bits, (N, K)), bits).T,
        "qzeros": pack_bits(zeros - 1 if v1 else zeros, bits),
        "scales": scales.astype(np.float16),
        "g_idx": g_idx.astype(np.int32),
    }


def _fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor], bits: int, v1: bool) -> None:
    """Give the dense model the checkpoint's values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.qweight" in tensors:
                parameter.copy_(dequantise(tensors, layer, bits, v1))
            elif name in tensors:
                parameter.copy_(tensors[name].float())
