"""`load_model`: a folder to a model on a device, or an error before anything is allocated.

Order (cheapest refusal first): settings, then every header, then names, shapes and dtypes against
what the settings imply, whether a group can share it, and only then the data, tensor by tensor,
with its own checks as it passes.

The peak in host memory is one tensor above what the model itself keeps there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from longwing.checkpoint import Checkpoint, QuantConfig, check_part, read_packed
from longwing.errors import ConfigError, RequestError
from longwing.layers import Linear
from longwing.models.config import ModelConfig
from longwing.models.decoder import Decoder
from longwing.models.falcon import Falcon
from longwing.models.inventory import Inventory, take_inventory
from longwing.models.llama import Llama
from longwing.models.memory import out_of_memory
from longwing.models.sharding import split
from longwing.models.values import not_finite
from longwing.parallel import Group
from longwing.rope import RopeConfig

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    context: int | None = None,
    rope: RopeConfig | None = None,
    unpack: bool | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Decoder:
    """Load a model from a folder of safetensors, dense or GPTQ.

    Args:
        path: the folder.
        device: where the weights go.
        dtype: number type of dense weights and activations; None is the checkpoint's own on a GPU
            and float32 on a CPU.
        context: longest sequence to set up for, in tokens; None is what config.json claims.
        rope: RoPE settings in place of config.json's.
        unpack: turn packed weights into dense ones while loading; None does so on a CPU, where
            multiplying packed weights means unpacking them each time. Needs 32 / bits times the
            memory in float32.
        progress: called as bytes are read.
        group: the processes that load it together, each its own part and no more; None is this
            one alone. `device` is this rank's.

    Raises:
        CheckpointError: the folder, a file or a tensor is unusable; says which and why.
        ConfigError: the group's size does not divide the model.
    """
    device = find_device(device)
    checkpoint = Checkpoint.open(path)
    config = ModelConfig.from_hf(checkpoint.config)
    if rope is not None:
        config = with_rope(config, rope)
    model = empty_model(config, context)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    if group is not None:
        split(model, group)
        _check_parts(model, checkpoint, inventory)
    on_cpu = device.type == "cpu"
    if dtype is None:
        dtype = torch.float32 if on_cpu else DTYPES.get(config.dtype, torch.bfloat16)
    filler = Filler(
        model=model,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        unpack=on_cpu if unpack is None else unpack,
        progress=progress,
    )
    with out_of_memory(f"loading {path.name} onto {device}"):
        filler.fill(inventory)
    if progress is not None:
        progress(filler.total, filler.total)
    model.place_tables(device)
    return model.eval()


def _check_parts(model: Decoder, checkpoint: Checkpoint, inventory: Inventory) -> None:
    """Refuse a rank's part of the packed linears that could not be read by itself."""
    linears = dict(model.linears())
    for name in inventory.packed:
        shard = linears[name].shard
        if shard is not None:
            check_part(checkpoint, name, shard.in_features, shard.ins, shard.outs)


def empty_model(config: ModelConfig, context: int | None = None) -> Decoder:
    """The model without storage: its modules, names and shapes, on the meta device."""
    with torch.device("meta"):
        return ARCHITECTURES[config.family](config, config.context if context is None else context)


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name means; "auto" is a GPU if there is one.

    Raises:
        RequestError: this machine has no such device; says which there are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    have = ["cpu", *(f"cuda:{i}" for i in range(count))]
    if str(name) == "auto":
        return torch.device("cuda" if count else "cpu")
    if str(name) not in (*have, *(["cuda"] if count else [])):
        raise RequestError(f'device "{name}" is not here; there are auto, {", ".join(have)}')
    return torch.device(name)


def with_rope(config: ModelConfig, rope: RopeConfig) -> ModelConfig:
    """The same model under other RoPE settings.

    Raises:
        ConfigError: the model has no rotary positions.
    """
    if config.rope is None:
        raise ConfigError(
            f"RoPE method {rope.method} asked for, but this model uses ALiBi", file="config.json"
        )
    return replace(config, rope=rope)


class Filler:
    """Gives a storage-less model its tensors, one by one, all of them or one part's.

    Args:
        model: the model, on the meta device or partly filled.
        checkpoint: where the tensors are.
        device: where they go.
        dtype: number type of what is dense.
        unpack: make packed weights dense.
        progress: called with (bytes read, bytes in the checkpoint).
    """

    def __init__(
        self,
        *,
        model: Decoder,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        unpack: bool,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.unpack = unpack
        self.progress = progress
        self.done = 0
        stored = sum(info.nbytes for info in checkpoint.tensors.values())
        self.total = stored // model.group.size

    def fill(self, inventory: Inventory, part: str = "") -> None:
        """Read what the inventory names, within a part such as "model.layers.3." or everywhere."""
        packed = set(inventory.packed)
        for name, linear in self.model.linears():
            # A packed layer without settings is a problem of the inventory; none comes this far.
            if name in packed and name.startswith(part) and self.checkpoint.quant is not None:
                self._packed(name, linear, self.checkpoint.quant)
        for own, theirs in inventory.dense.items():
            if own.startswith(part):
                self._dense(own, theirs)
        if inventory.tied and not part:
            self._tie()

    def _dense(self, own: str, name: str) -> None:
        """One tensor or its part, cast and placed; refused when a value is not finite."""
        owner, _, leaf = own.rpartition(".")
        module = self.model.get_submodule(owner)
        shard = module.shard if isinstance(module, Linear) else None
        cut: Sequence[slice] | None = None
        if shard is not None and leaf == "weight":
            cut = shard.weight()
        elif shard is not None:
            if not shard.has_bias:
                return
            cut = (shard.bias(),)
        tensor = self.checkpoint.read(name, cut)
        self._advance(tensor.nbytes)
        cast = tensor.to(self.dtype)
        problem = not_finite(self.checkpoint, name, tensor, cast)
        if problem is not None:
            raise problem
        setattr(module, leaf, nn.Parameter(cast.to(self.device), requires_grad=False))

    def _packed(self, name: str, linear: Linear, quant: QuantConfig) -> None:
        """One packed linear, kept packed or made dense; its bias is dense and comes by itself."""
        shard = linear.shard
        if shard is None:
            ins, outs = linear.in_features, linear.out_features
            packed = read_packed(self.checkpoint, name, ins, outs, quant)
        else:
            packed = read_packed(
                self.checkpoint,
                name,
                shard.in_features,
                shard.out_features,
                quant,
                ins=shard.ins,
                outs=shard.outs,
            )
        self._advance(packed.nbytes)
        placed = packed.to(self.device)
        if self.unpack:
            linear.set_dense(placed, self.dtype)
        else:
            linear.set_packed(placed)

    def _tie(self) -> None:
        """Let head and embedding be one tensor, unless the folder holds two that differ."""
        head, shard = self.model.lm_head.weight, self.model.lm_head.shard
        embedding = self.model.embedding.weight
        if shard is not None:
            embedding = nn.Parameter(embedding[shard.outs], requires_grad=False)
        if head is None or (not head.is_meta and not torch.equal(head, embedding)):
            return
        self.model.lm_head.weight = embedding

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


ARCHITECTURES: dict[str, type[Decoder]] = {"falcon": Falcon, "llama": Llama}
"""The module that runs each family of `ModelConfig`."""
