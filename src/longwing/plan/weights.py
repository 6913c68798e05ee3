"""The bytes of a model's weights, tensor kind by tensor kind, dense or GPTQ-packed.

Counted over the real module tree (built without storage), so that no formula by family can disagree
with what the loader will ask for.

Shape key: K in features, N out features, G quantisation groups.

The one idea: what is counted is the checkpoint's layout, tensor for tensor (the table in
`checkpoint/packed.py`): that is what is downloaded, and what quantised models are quoted by. Where
our own copy in memory is larger, the difference stands in the workspace, not here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from longwing.checkpoint import QuantConfig
from longwing.errors import ConfigError
from longwing.layers import Linear
from longwing.models import Decoder

SCALE_BYTES = 2
"""Scales are float16 on disk, and stay so in memory."""

G_IDX_BYTES = 4
"""One int32 an input row says which group it is in."""

_USUAL_GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of the weights, by kind; each tensor is in exactly one field.

    Attributes:
        qweight: packed matrices of the blocks, K * N * bits / 8 each.
        scales: G * N * 2 for each of them.
        zeros: their packed zero points, G * N * bits / 8 each.
        g_idx: their group indices, K * 4 each; written even where groups are in order.
        linears: the blocks' matrices where they are dense.
        embedding: the token embedding.
        head: the output projection where it is a tensor of its own; 0 where it is the embedding.
        norms_and_biases: everything else.
    """

    qweight: int = 0
    scales: int = 0
    zeros: int = 0
    g_idx: int = 0
    linears: int = 0
    embedding: int
    head: int
    norms_and_biases: int

    @property
    def packed(self) -> int:
        """qweight, scales and zeros: the size by which quantised models are usually quoted."""
        return self.qweight + self.scales + self.zeros

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.packed
            + self.g_idx
            + self.linears
            + self.embedding
            + self.head
            + self.norms_and_biases
        )


def weight_bytes(
    model: Decoder, quant: QuantConfig | None, value_bytes: int, head_bytes: int
) -> WeightBytes:
    """Count a model's weights.

    Args:
        model: the model; needs no storage.
        quant: how the blocks' matrices are packed (embedding, head and norms never are here); None
            is dense.
        value_bytes: bytes of one dense value.
        head_bytes: bytes of one value of the head; where this differs, a tied head becomes a copy.

    Raises:
        ConfigError: a layer's packed words would be half filled.
    """
    head = model.lm_head.in_features * model.lm_head.out_features
    embedding = model.embedding.weight.numel()
    blocks = sum(linear.in_features * linear.out_features for _, linear in block_linears(model))
    everything = sum(parameter.numel() for parameter in model.parameters())
    shared = model.config.tie_embeddings and head_bytes == value_bytes
    in_blocks = {"linears": blocks * value_bytes}
    if quant is not None:
        _check_words(model, quant)
        in_blocks = _packed_bytes(model, quant)
    return WeightBytes(
        **in_blocks,
        embedding=embedding * value_bytes,
        head=0 if shared else head * head_bytes,
        norms_and_biases=(everything - blocks - embedding - head) * value_bytes,
    )


def num_parameters(model: Decoder) -> int:
    """Parameters of the model; an embedding that is also the head counts once."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    shared = model.embedding.weight.numel() if model.config.tie_embeddings else 0
    return everything - shared


def block_linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The matrices that GPTQ packs: every linear but the output head."""
    for name, linear in model.linears():
        if linear is not model.lm_head:
            yield name, linear


def check_group_size(model: Decoder, quant: QuantConfig) -> None:
    """Refuse settings for a quantisation to come under which a layer would have a ragged group.

    A folder whose last groups are shorter loads, and is planned as it is. None is to be made that
    way, though: no fast kernel reads such groups; AutoGPTQ's asserts.

    Raises:
        ConfigError: names the first such layer, and the group sizes that do fit all of them.
    """
    for name, linear in block_linears(model):
        K = linear.in_features
        if quant.group_size != -1 and K % quant.group_size:
            raise ConfigError(
                f"group size {quant.group_size} does not divide the {K:,} input features of {name} "
                f"({K / quant.group_size:g} groups)",
                remedy=f"for this model use {_fitting(model)}",
            )


def _check_words(model: Decoder, quant: QuantConfig) -> None:
    """Refuse settings under which packed values would not fill whole words; no reader takes them.

    Raises:
        ConfigError: names the first such layer.
    """
    for name, linear in block_linears(model):
        for features, side in ((linear.in_features, "input"), (linear.out_features, "output")):
            if features * quant.bits % 32:
                raise ConfigError(
                    f"{name} has {features:,} {side} features; at {quant.bits} bits they do not "
                    "fill whole 32-bit words",
                    remedy="use another width, or leave the model dense",
                )


def _packed_bytes(model: Decoder, quant: QuantConfig) -> dict[str, int]:
    """Bytes of the packed tensors of all blocks, by field of `WeightBytes`."""
    total = dict.fromkeys(("qweight", "scales", "zeros", "g_idx"), 0)
    for _, linear in block_linears(model):
        K, N = linear.in_features, linear.out_features
        G = quant.num_groups(K)
        total["qweight"] += K * N * quant.bits // 8
        total["scales"] += G * N * SCALE_BYTES
        total["zeros"] += G * N * quant.bits // 8
        total["g_idx"] += K * G_IDX_BYTES
    return total


def _fitting(model: Decoder) -> str:
    """The usual group sizes that divide every layer, largest first, and -1."""
    inputs = {linear.in_features for _, linear in block_linears(model)}
    sizes = [size for size in _USUAL_GROUP_SIZES if all(K % size == 0 for K in inputs)]
    return ", ".join(str(size) for size in sizes) + (" or " if sizes else "") + "-1 (one group)"
