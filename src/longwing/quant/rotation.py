"""A dense model turned so that it computes the same and quantises better, and stays in its format.

Outliers cost a quantiser most: one large weight or feature sets the scale of its whole group. A
rotation spreads it over many. Where a linear map's output goes through nothing but sums before the
next one reads it, a rotation can be put into the one's rows and its inverse into the other's
columns, and the files, the config and every engine stay as they are. There are two such places:

    heads     values to output projection. Attention mixes tokens, not channels of a head, so each
              head's values may be turned, for any number of KV heads.
    full      heads, and the residual stream: embedding, all that read it and all that write to it.
              RMSNorm commutes with a rotation once its gain has moved into the linears that follow;
              LayerNorm, which takes a mean over channels, does not. (QuaRot, arXiv:2404.00456.)

Shape key: D model dim, H head dim, K KV heads, N query heads.

The one idea: the turned model is a `Checkpoint` like any other, whose `read` turns a tensor as it
passes. Who walks through a model block by block turns it block by block, and knows nothing of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
from torch import Tensor

from longwing.checkpoint import Checkpoint
from longwing.errors import ConfigError
from longwing.models import ARCHITECTURES, Decoder, ModelConfig

HEAD = "lm_head.weight"

_LARGEST = 64
"""Side of the largest Hadamard factor: products of small ones cost a fraction of a whole matrix."""

_ROWS = 8192
"""Rows turned at once: an embedding's copies are large."""


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """Which linears of a block stand where; `readers` of the residual with the norm before each."""

    value: str
    out: str
    readers: Mapping[str, str]
    writers: tuple[str, ...]


_ROLES = {
    "llama": _Roles(
        value="self_attn.v_proj",
        out="self_attn.o_proj",
        readers={
            **dict.fromkeys(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"
            ),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        },
        writers=("self_attn.o_proj", "mlp.down_proj"),
    ),
    # Its LayerNorms allow no turn of the stream.
    "falcon": _Roles(
        value="self_attention.query_key_value", out="self_attention.dense", readers={}, writers=()
    ),
}


def rotated(checkpoint: Checkpoint, how: str) -> Checkpoint:
    """The same model, turned: "none", "heads" or "full" (QuantSpec.rotate).

    Nothing is read yet. A full turn gives a model with tied embeddings a head of its own, because
    the final norm's gain moves into it.

    Raises:
        ConfigError: a full turn of a model with LayerNorm.
    """
    if how == "none":
        return checkpoint
    config = ModelConfig.from_hf(checkpoint.config)
    check_rotation(config, how)
    roles = _ROLES[config.family]
    own = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    if how == "heads":
        return RotatedCheckpoint(**own, roles=roles, model=config, stream=None)
    embedding = f"{ARCHITECTURES[config.family].EMBEDDING}.weight"
    for name, other in ((HEAD, embedding), (embedding, HEAD)):
        if name not in checkpoint.tensors:
            for table in ("tensors", "shards"):
                own[table] = MappingProxyType({**own[table], name: own[table][other]})
    own["config"] = {**checkpoint.config, "tie_word_embeddings": False}
    stream = mixing(config.hidden_size)
    return RotatedCheckpoint(**own, roles=roles, model=config, stream=stream)


def check_rotation(config: ModelConfig, how: str) -> None:
    """Refuse what a model does not allow; to be asked before any work.

    Raises:
        ConfigError: a full turn of a model with LayerNorm.
    """
    if how == "full" and not _ROLES[config.family].readers:
        raise ConfigError(
            f"a full rotation needs RMSNorm, and {config.family} models have LayerNorm",
            remedy="take heads or none",
        )


@dataclass(frozen=True, kw_only=True)
class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are turned as they are read; make it with `rotated`.

    Attributes:
        roles: what the linears of a block are.
        model: the settings of the model.
        stream: factors of the residual stream's rotation; None leaves the stream alone.
    """

    roles: _Roles
    model: ModelConfig
    stream: tuple[Tensor, ...] | None

    def read(self, name: str, cut: Sequence[slice] | None = None) -> Tensor:
        """As `Checkpoint.read`, turned in float32 or wider and rounded to the tensor's own dtype.

        Holds three copies of the tensor in float32 while it works, also for a part of it.
        """
        names = self._names
        tensor = self._stored(name)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        owner, _, leaf = name.rpartition(".")
        if owner.startswith(f"{names.BLOCKS}."):
            index, _, part = owner.removeprefix(f"{names.BLOCKS}.").partition(".")
            wide = self._in_block(wide, part, leaf, f"{names.BLOCKS}.{index}.")
        elif self.stream is not None and owner == names.NORM:
            wide = torch.ones_like(wide)
        elif self.stream is not None and owner == names.EMBEDDING:
            wide = turn(wide, self.stream)
        elif self.stream is not None and name == HEAD:
            wide = turn(wide * self._stored(f"{names.NORM}.weight").to(wide), self.stream)
        turned = wide.to(tensor.dtype)
        return (turned if cut is None else turned[tuple(cut)]).contiguous()

    @property
    def _names(self) -> type[Decoder]:
        """The family, whose attributes say what its parts are called."""
        return ARCHITECTURES[self.model.family]

    def _stored(self, name: str) -> Tensor:
        """As the file has it. A tied model's one matrix is both embedding and head."""
        file = self.shards[name]
        if name in file.tensors:
            return file.read(name)
        return file.read(HEAD if name != HEAD else f"{self._names.EMBEDDING}.weight")

    def _in_block(self, wide: Tensor, part: str, leaf: str, prefix: str) -> Tensor:
        """One tensor of a block: the stream's turn first, then the heads'."""
        roles = self.roles
        if self.stream is not None:
            if part in roles.readers.values():
                return torch.ones_like(wide)
            if part in roles.readers and leaf == "weight":
                gain = self._stored(f"{prefix}{roles.readers[part]}.weight").to(wide)
                wide = turn(wide * gain, self.stream)
            if part in roles.writers:
                wide = turn(wide.T, self.stream).T if wide.ndim > 1 else turn(wide, self.stream)
        heads = hadamard(self.model.head_dim)
        if part == roles.value:
            wide = turn_values(wide, self.model, heads)
        if part == roles.out and leaf == "weight":
            by_head = wide.unflatten(1, (-1, self.model.head_dim))
            wide = turn(by_head, heads).flatten(1)
        return wide


def turn_values(wide: Tensor, model: ModelConfig, heads: tuple[Tensor, ...]) -> Tensor:
    """Turn the rows (or the bias) that make values: the last head of each KV head's group.

    In Falcon's fused layout a group is [N / K queries, key, value]; elsewhere it is the value.
    """
    groups = wide.unflatten(0, (model.num_kv_heads, -1, model.head_dim)).clone()
    value = groups[:, -1]
    groups[:, -1] = turn(value.transpose(1, -1), heads).transpose(1, -1)
    return groups.flatten(0, 2)


def turn(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """X @ (factors[0] ⊗ factors[1] ⊗ …), along the last axis; some rows at a time."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    for some, target in zip(rows.split(_ROWS), out.split(_ROWS), strict=True):
        part = some.unflatten(1, [len(factor) for factor in factors] or [1])
        for axis, factor in enumerate(factors, start=1):
            part = (part.movedim(axis, -1) @ factor.to(part)).movedim(-1, axis)
        target.copy_(part.flatten(1))
    return out.view(x.shape)


def hadamard(size: int) -> tuple[Tensor, ...]:
    """An orthogonal matrix of this size by its factors: Hadamard's, and one of the odd rest."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    factors = [_any_orthogonal(odd)] if odd > 1 else []
    power = size // odd
    while power > 1:
        side = min(power, _LARGEST)
        factors.append(_sylvester(side))
        power //= side
    return tuple(factors)


def mixing(size: int) -> tuple[Tensor, ...]:
    """`hadamard` with signs that a fixed seed throws, so that no common pattern meets its own."""
    generator = torch.Generator().manual_seed(size)
    return tuple(
        (2 * torch.randint(0, 2, (len(factor), 1), generator=generator) - 1) * factor
        for factor in hadamard(size)
    )


def _sylvester(size: int) -> Tensor:
    """(size, size) float64, entries ±size⁻½; size is a power of two."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) * 0.5**0.5
    return H


def _any_orthogonal(size: int) -> Tensor:
    """(size, size) float64, the same on every call: the Q of a random matrix's QR."""
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    Q: Tensor = torch.linalg.qr(normal)[0]
    return Q
