"""`merge`: an adapter folded into dense weights, after which no reader needs to know of it.

Shape key: I in features, O out features, R rank.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint import Checkpoint
from longwing.checkpoint.adapter import Adapter
from longwing.checkpoint.derived import with_settings, write_derived
from longwing.errors import CheckpointError
from longwing.layers.lora import check_fits
from longwing.models import ModelConfig, empty_model, take_inventory


def merge(source: Path, adapter: Path, target: Path, *, overwrite: bool = False) -> Path:
    """Write the model with W + scale * B A in the place of each adapted W, in W's number type.

    The sum is formed in float32. One tensor is in memory at a time. RoPE settings that the adapter
    was tuned under are written too.

    Args:
        source: a dense model folder.
        adapter: the adapter's folder.
        target: the folder to make.
        overwrite: replace a model folder that is there.

    Raises:
        CheckpointError: the base is packed, the adapter is of another model, a sum does not fit the
            number type, or a folder cannot be read or written.
    """
    checkpoint = Checkpoint.open(source)
    found = Adapter.open(adapter)
    if checkpoint.quant is not None:
        raise CheckpointError(
            f"is {checkpoint.quant.bits}-bit GPTQ, and folding an adapter into packed weights "
            "would round them a second time",
            file=str(source),
            remedy="merge into the dense model it was made from and quantize that, or serve it "
            "beside the adapter (--adapter)",
        )
    raw = with_settings(checkpoint.config, found.settings) if found.settings else None
    config = ModelConfig.from_hf(raw or checkpoint.config)
    model = empty_model(config)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in model.linears()}
    check_fits(found, shapes)
    adapted = {}
    for layer in found.layers:
        if f"{layer}.weight" not in inventory.dense:
            raise CheckpointError(
                "is the embedding's matrix too, which an adapter of the head must not change",
                file=str(source),
                tensor=layer,
                remedy="serve the model beside the adapter (--adapter)",
            )
        adapted[inventory.dense[f"{layer}.weight"]] = layer
    write_derived(
        target,
        checkpoint,
        raw or checkpoint.config,
        tensors=_tensors(checkpoint, found, adapted),
        context=config.context,
        note=_note(checkpoint.path.name, found),
        meta={"merged": {"model": checkpoint.path.name, "adapter": found.path.name}},
        overwrite=overwrite,
    )
    return target


def _tensors(
    checkpoint: Checkpoint, adapter: Adapter, adapted: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, with the adapter's share where it has one."""
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        layer = adapted.get(name)
        yield name, tensor if layer is None else _sum(tensor, name, adapter, layer)


def _sum(weight_OI: Tensor, name: str, adapter: Adapter, layer: str) -> Tensor:
    """W + scale * B A, in W's number type."""
    A_RI, B_OR = (side.float() for side in adapter.layers[layer])
    sum_OI = torch.addmm(weight_OI.float(), B_OR, A_RI, alpha=adapter.config.scale)
    merged_OI = sum_OI.to(weight_OI.dtype)
    if not bool(torch.isfinite(merged_OI).all()):
        raise CheckpointError(
            f"holds values beyond {weight_OI.dtype} once the adapter is added", tensor=name
        )
    return merged_OI


def _note(name: str, adapter: Adapter) -> str:
    return (
        f"## Tuned\n\n{name} with the LoRA adapter {adapter.path.name} (rank "
        f"{adapter.config.rank}, alpha {adapter.config.alpha:g}) folded into its weights by "
        "`longwing merge`.\n"
    )
