"""Adapters of a tiny model in peft's files, strong enough to change its greedy answers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint.adapter import AdapterConfig, write_adapter
from longwing.layers.lora import adaptable
from longwing.models import load_model


def write_random_adapter(
    folder: Path,
    model: Path,
    *,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = (),
    settings: Mapping[str, object] | None = None,
) -> Path:
    """A random adapter of the blocks' linears whose names end so; () is every one of them.

    Args:
        folder: where it goes; made.
        model: the folder of the model that it is for.
        seed: draws it.
        rank: of the adapter.
        targets: ends of the names of the linears that it adapts; () is all of the blocks'.
        settings: entries of config.json that it was tuned under.
    """
    loaded = load_model(model)
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.7 / shape[1] ** 0.5)

    layers = {
        name: (matrix(rank, linear.in_features), matrix(linear.out_features, rank))
        for name, linear in adaptable(loaded)
        if (name.endswith(targets) if targets else name.startswith(loaded.BLOCKS))
    }
    names = tuple(sorted({name.rpartition(".")[2] for name in layers}))
    folder.mkdir(parents=True)
    config = AdapterConfig(rank=rank, alpha=2.0 * rank, targets=names)
    write_adapter(folder, config, layers, settings or {}, {})
    return folder
