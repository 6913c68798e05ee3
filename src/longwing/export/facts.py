"""`read_facts`: what a folder is, as far as another engine's loader would notice.

Reads settings, headers, zero points and group indices: a few per cent of a packed model, next to
nothing of a dense one. What engines make of the facts is `verdict.py`.

The one idea: a file's settings claim (`"sym": true`, `"desc_act": true`), its tensors decide. Fast
kernels never look at zero points or at group indices, they take the claim, and a false one costs
them nothing and the user his answers. So both are read here, layer by layer.

Shape key: K in features, N out features, G groups.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint import Checkpoint, QuantConfig, packed_names
from longwing.errors import ConfigError
from longwing.kernels.wna16 import DEQUANTISE_TILE, unpack
from longwing.models import Decoder, Inventory, ModelConfig, empty_model, take_inventory

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One packed linear, by its tensors.

    Attributes:
        in_features: K.
        out_features: N.
        bits: width of a value.
        group_size: rows of K that share a scale; -1 is all of them.
        lowest: no q - zero point is below this.
        highest: nor above this.
        symmetric: every zero point is 2^(bits - 1).
        holds_zero: some zero point is 0, which format gptq cannot say.
        in_order: row k is in group k // group_size, as if there were no g_idx.
        order: a digest of g_idx where it is not in order, else "".
        has_g_idx: the folder holds the tensor.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    lowest: int
    highest: int
    symmetric: bool
    holds_zero: bool
    in_order: bool
    order: str
    has_g_idx: bool

    @property
    def symmetric_bits(self) -> int | None:
        """The narrowest of 4 and 8 bits that holds the same values with zero points in the middle.

        Every 2- and 3-bit layer fits 4 bits, every 4-bit one 8: the scales stay, and so do all
        values, exactly. None where 8 bits with zero points off the middle do not fit.
        """
        for bits in (4, 8):
            if self.bits <= bits and -(2 ** (bits - 1)) <= self.lowest <= self.highest < 2 ** (
                bits - 1
            ):
                return bits
        return None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model folder whose headers hold what its config implies.

    Attributes:
        checkpoint: the folder.
        config: what config.json means.
        model: the model without storage.
        inventory: where each tensor comes from.
        packed: name -> PackedLayer.
        dense_linears: linears of the blocks that are not packed, in a folder where others are.
        tied: the engine may take the embedding for the head: config.json says so and it is true.
        spare_biases: biases of packed layers that config.json does not imply, all of them zero;
            early GPTQ savers wrote them.
        real_biases: such biases that are not zero.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    model: Decoder
    inventory: Inventory
    packed: Mapping[str, PackedLayer]
    dense_linears: tuple[str, ...]
    tied: bool
    spare_biases: tuple[str, ...]
    real_biases: tuple[str, ...]

    @property
    def settings(self) -> QuantConfig:
        """The quantisation settings of a folder that has packed layers.

        Raises:
            ConfigError: it has none.
        """
        if self.checkpoint.quant is None:
            raise ConfigError("this folder is dense: it has no quantisation settings")
        return self.checkpoint.quant


def read_facts(folder: Path, progress: Progress | None = None) -> Facts:
    """Open a folder and look at what its settings only claim.

    Raises:
        CheckpointError: the folder cannot be loaded here either; says why.
    """
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    model = empty_model(config)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    linears = dict(model.linears())
    packed = {}
    for done, name in enumerate(inventory.packed):
        if checkpoint.quant is not None:  # the inventory calls layers without settings a problem
            K = linears[name].in_features
            packed[name] = _packed_layer(checkpoint, checkpoint.quant, name, K)
        if progress is not None:
            progress(done + 1, len(inventory.packed))
    extra = [
        name
        for name in inventory.dense
        if name.endswith(".bias")
        and linears.get(name.removesuffix(".bias")) is not None
        and linears[name.removesuffix(".bias")].bias is None
    ]
    spare = tuple(name for name in extra if not bool(checkpoint.read(name).any()))
    return Facts(
        checkpoint=checkpoint,
        config=config,
        model=model,
        inventory=inventory,
        packed=packed,
        dense_linears=_dense_linears(model, inventory),
        tied=_tied(checkpoint, model, inventory),
        spare_biases=spare,
        real_biases=tuple(name for name in extra if name not in spare),
    )


def _dense_linears(model: Decoder, inventory: Inventory) -> tuple[str, ...]:
    if not inventory.packed:
        return ()
    inside = (name for name, linear in model.linears() if linear is not model.lm_head)
    return tuple(name for name in inside if name not in inventory.packed)


def _tied(checkpoint: Checkpoint, model: Decoder, inventory: Inventory) -> bool:
    """Whether head and embedding are one matrix: both may be there and equal, or only one."""
    head, embedding = "lm_head.weight", f"{model.EMBEDDING}.weight"
    if not inventory.tied:
        return False
    if head in checkpoint.tensors and embedding in checkpoint.tensors:
        return torch.equal(checkpoint.read(head), checkpoint.read(embedding))
    return True


def _packed_layer(checkpoint: Checkpoint, quant: QuantConfig, name: str, K: int) -> PackedLayer:
    """What one layer's zero points and group indices say."""
    names = packed_names(name)
    info, scales = checkpoint.tensors[names["qweight"]], checkpoint.tensors[names["scales"]]
    bits = info.shape[0] * 32 // K
    G, N = scales.shape
    group_size = quant.group_size
    if quant.num_groups(K) != G:  # a `dynamic` rule; the inventory has let it pass
        group_size = -1 if G == 1 else K // G
    has_g_idx = names["g_idx"] in checkpoint.tensors
    stored_GN = unpack(checkpoint.read(names["qzeros"]), bits, dim=1).to(torch.int16)
    zeros_GN = stored_GN if quant.checkpoint_format == "gptq_v2" else (stored_GN + 1) % 2**bits
    group_K = torch.arange(K) // (K if group_size == -1 else group_size)
    order = ""
    if has_g_idx:
        stored_K = checkpoint.read(names["g_idx"])
        if not torch.equal(stored_K.long(), group_K):
            order = hashlib.sha256(stored_K.numpy().tobytes()).hexdigest()
        group_K = stored_K.long()
    middle = 2 ** (bits - 1)
    lowest, highest = -int(zeros_GN.max()), 2**bits - 1 - int(zeros_GN.min())
    symmetric = lowest == -middle and highest == middle - 1
    if bits == 8 and not symmetric:
        lowest, highest = _span(checkpoint.read(names["qweight"]), bits, zeros_GN, group_K)
    return PackedLayer(
        in_features=K,
        out_features=N,
        bits=bits,
        group_size=group_size,
        lowest=lowest,
        highest=highest,
        symmetric=symmetric,
        holds_zero=not bool(zeros_GN.all()),
        in_order=not order,
        order=order,
        has_g_idx=has_g_idx,
    )


def _span(qweight_WN: Tensor, bits: int, zeros_GN: Tensor, group_K: Tensor) -> tuple[int, int]:
    """The least and the largest q - zero point that really occur. Reads the layer in tiles."""
    spans = []
    for rows, q_RN in tiles(qweight_WN, bits):
        centred_RN = q_RN.to(torch.int16) - zeros_GN[group_K[rows]]
        spans.append((int(centred_RN.min()), int(centred_RN.max())))
    return min(low for low, _ in spans), max(high for _, high in spans)


def tiles(qweight_WN: Tensor, bits: int) -> Iterator[tuple[slice, Tensor]]:
    """The values of a packed matrix, some rows at a time: (rows of K, values as uint8).

    Tiles are of whole words at every width: 32 rows or a multiple.
    """
    K, N = qweight_WN.shape[0] * 32 // bits, qweight_WN.shape[1]
    step = max(DEQUANTISE_TILE // N // 32, 1) * 32
    for start in range(0, K, step):
        rows = slice(start, min(start + step, K))
        words = slice(rows.start * bits // 32, rows.stop * bits // 32)
        yield rows, unpack(qweight_WN[words], bits, 0)
