"""Write a model folder of a real model's exact shape with random GPTQ weights, to time it.

    python bench/make_folder.py falcon-40b OUT --bits 4 --group-size 128 --tokenizer FALCON
    python bench/make_folder.py path/to/config.json OUT --bits 3 --tokenizer path/to/model

The shape is a name that `longwing plan` knows, or a config.json. Every packed word is random, which
is some weight or other; zero points are the middle; scales keep a product's size near its input's,
so that activations stay finite through all layers. Nothing is reused from layer to layer. Random
bytes are made on the GPU if there is one, and all files are written at once. The tokenizer is a
folder with tokenizer.json, or with falcon_tokenizer.json.xz, which is unpacked.

Text by such a model is nonsense, and soon repeats itself: it says how fast, never how good.
"""

import argparse
import json
import lzma
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint import QuantConfig, new_folder, packed_names, packed_tensors
from longwing.checkpoint.folder import INDEX
from longwing.checkpoint.tensor_file import write_tensor_file
from longwing.kernels import PackedWeight
from longwing.layers import Linear
from longwing.models import Decoder, ModelConfig, empty_model
from longwing.plan import KNOWN, check_group_size
from longwing.plan.weights import block_linears

EMBEDDING = 0.02
"""Standard deviation of embeddings, as models are initialised with."""

SHARD_BYTES = 3_000_000_000
"""Of a file; all files are made at once, so the host needs memory for the whole model."""

Maker = Callable[[], dict[str, Tensor]]
"""Makes some tensors, by name."""


def packed(name: str, linear: Linear, quant: QuantConfig, device: str) -> dict[str, Tensor]:
    """A random (K, N) matrix whose products are about as large as what they are given."""
    K, N = linear.in_features, linear.out_features
    groups = quant.num_groups(K)
    words = torch.randint(
        -(2**31), 2**31, (K * quant.bits // 32, N), dtype=torch.int32, device=device
    )
    # Integers spread evenly over 2**bits values have a deviation of 2**bits / sqrt(12).
    unit = 12**0.5 / 2**quant.bits / K**0.5
    scales_GN = (0.5 + torch.rand(groups, N, device=device)) * unit
    weight = PackedWeight(
        bits=quant.bits,
        group_size=quant.group_size,
        qweight_WN=words.cpu(),
        zeros_GN=torch.full((groups, N), 2 ** (quant.bits - 1), dtype=torch.uint8),
        scales_GN=scales_GN.half().cpu(),
        g_idx_K=None,
    )
    names = packed_names(name)
    made = packed_tensors(weight, quant.checkpoint_format)
    return {names[suffix]: tensor for suffix, tensor in made.items()}


def dense(name: str, shape: torch.Size, device: str) -> dict[str, Tensor]:
    """An embedding, a norm or a bias."""
    value = torch.randn(shape, dtype=torch.bfloat16, device=device)
    if len(shape) == 1:
        value = 0.1 * value + (0 if name.endswith(".bias") else 1)
    else:
        value = EMBEDDING * value
    return {name: value.cpu()}


def makers(model: Decoder, quant: QuantConfig, device: str) -> Iterator[tuple[int, Maker]]:
    """For every matrix or vector of the model its bytes, about, and how to make its tensors."""
    in_blocks = dict(block_linears(model))
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if layer in in_blocks and kind == "weight":
            yield (
                parameter.numel() * quant.bits // 8,
                partial(packed, layer, in_blocks[layer], quant, device),
            )
        elif name != "lm_head.weight" or not model.config.tie_embeddings:
            yield parameter.numel() * 2, partial(dense, name, parameter.shape, device)


def shards(makers: Iterable[tuple[int, Maker]]) -> list[list[Maker]]:
    """The makers in files of about SHARD_BYTES."""
    files: list[list[Maker]] = []
    room = 0
    for nbytes, maker in makers:
        if nbytes > room:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(maker)
        room -= nbytes
    return files


def write_shard(file: Path, makers: Sequence[Maker]) -> dict[str, str]:
    """Make and write one file; tensor name -> file name."""
    tensors = {name: tensor for maker in makers for name, tensor in maker().items()}
    write_tensor_file(file, tensors, {"format": "pt"})
    return dict.fromkeys(tensors, file.name)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """tokenizer.json and what describes it; Falcon's end of text is named if nothing else does."""
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    else:
        text = lzma.decompress((source / "falcon_tokenizer.json.xz").read_bytes())
        (folder / "tokenizer.json").write_bytes(text)
    settings = source / "tokenizer_config.json"
    words = settings.read_text() if settings.is_file() else '{"eos_token": "<|endoftext|>"}'
    (folder / "tokenizer_config.json").write_text(words)


def write(
    raw: dict[str, object], folder: Path, quant: QuantConfig, tokenizer: Path, device: str
) -> None:
    """Write the folder; it appears when it is whole."""
    config = ModelConfig.from_hf(raw)
    model = empty_model(config)
    check_group_size(model, quant)
    torch.manual_seed(0)
    with new_folder(folder, overwrite=True) as partial_folder:
        settings = {**raw, "quantization_config": quant.to_hf()}
        (partial_folder / "config.json").write_text(json.dumps(settings, indent=2))
        copy_tokenizer(tokenizer, partial_folder)
        files = shards(makers(model, quant, device))
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        paths = [
            partial_folder / (name if len(files) > 1 else "model.safetensors") for name in names
        ]
        with ThreadPoolExecutor() as pool:
            weight_map = {
                k: v for part in pool.map(write_shard, paths, files) for k, v in part.items()
            }
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (partial_folder / INDEX).write_text(json.dumps(index))


def main() -> None:
    """Write one folder and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", help=f"a config.json, or {', '.join(KNOWN)}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, help="blocks, if not all")
    parser.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()
    known = KNOWN.get(args.shape.lower())
    raw = dict(json.loads(Path(args.shape).read_text()) if known is None else known)
    if args.layers:
        raw["num_hidden_layers"] = args.layers
    quant = QuantConfig(bits=args.bits, group_size=args.group_size)
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write(raw, args.folder, quant, args.tokenizer, device)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {size / 1e9:.2f} GB in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
