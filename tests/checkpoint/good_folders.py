"""Good tiny model folders, dense and GPTQ, for the tests of this room to read and to spoil.

They are written with the safetensors library: our reader is not judged by our own writer.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from longwing.kernels.wna16 import pack

LAYERS = {
    "model.layers.0.mlp.up_proj": (64, 96),
    "model.layers.0.mlp.down_proj": (96, 64),
}
"""Layer name -> (in features, out features)."""


def dense_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(32, 64, generator=generator).half(),
        "model.norm.weight": torch.ones(64, dtype=torch.float16),
    }
    for name, (K, N) in LAYERS.items():
        tensors[f"{name}.weight"] = torch.randn(N, K, generator=generator).half()
    return tensors


def packed_layer(
    K: int, N: int, bits: int, group_size: int, seed: int, stored_GN: Tensor | None = None
) -> dict[str, Tensor]:
    """Suffix -> tensor of a random layer; `stored_GN` are the zero points as a file holds them."""
    generator = torch.Generator().manual_seed(seed)
    gs = K if group_size == -1 else group_size
    G = -(-K // gs)
    if stored_GN is None:
        stored_GN = torch.randint(0, 2**bits - 1, (G, N), generator=generator)
    return {
        "qweight": pack(torch.randint(0, 2**bits, (K, N), generator=generator), bits, 0),
        "qzeros": pack(stored_GN, bits, 1),
        "scales": (torch.rand(G, N, generator=generator) + 0.5).half(),
        "g_idx": (torch.arange(K) // gs).int(),
    }


def write_config(folder: Path, **more: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **more}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))


def write_dense(folder: Path) -> Path:
    write_config(folder)
    save_file(dense_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings(
    bits: int = 4, group_size: int = 32, checkpoint_format: str = "gptq", desc_act: bool = False
) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": desc_act,
        "checkpoint_format": checkpoint_format,
    }


def packed_tensors_of(bits: int = 4, group_size: int = 32) -> dict[str, Tensor]:
    """A whole GPTQ model's tensors: embedding and norm dense, the layers packed."""
    tensors = {name: t for name, t in dense_tensors().items() if "proj" not in name}
    for seed, (name, (K, N)) in enumerate(LAYERS.items()):
        for suffix, tensor in packed_layer(K, N, bits, group_size, seed).items():
            tensors[f"{name}.{suffix}"] = tensor
    return tensors


def write_packed(folder: Path, bits: int = 4, group_size: int = 32, **more: object) -> Path:
    """A GPTQ folder with its settings in both usual places."""
    quant = settings(bits, group_size, **more)  # type: ignore[arg-type]
    write_config(folder, quantization_config=quant)
    (folder / "quantize_config.json").write_text(json.dumps(quant))
    save_file(
        packed_tensors_of(bits, group_size),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
