"""`split`: a model without storage made into one rank's part of it.

Which part of a linear is whose says `parallel/shards.py`; here linears become that small, attention
keeps its own heads' slopes, and blocks learn whom to add their sums with. What comes after, loading
and the faster forms, sees a smaller model whose linears know what they are a part of.

Whole on every rank: the embedding, the norms, and the biases of what is not summed. A bias of a sum
is the first rank's alone. A head that is tied is a view of its rows of the embedding.
"""

import math
from dataclasses import replace

from longwing.errors import ConfigError
from longwing.layers import Attention
from longwing.models.config import ModelConfig
from longwing.models.decoder import Decoder
from longwing.models.falcon import FalconBlock
from longwing.models.llama import LlamaBlock
from longwing.parallel import Group, shard_linear


def check_split(config: ModelConfig, size: int) -> None:
    """Refuse a number of ranks that a model cannot be shared out to.

    Raises:
        ConfigError: it divides not both the key/value heads and the MLP's width; names the numbers
            that do.
    """
    heads, width = config.num_kv_heads, config.mlp_size
    if heads % size == 0 and width % size == 0:
        return
    sizes = [n for n in range(1, heads + 1) if math.gcd(heads, width) % n == 0]
    what = f"{heads} key/value head{'s' * (heads > 1)} and an MLP {width:,} wide"
    remedy = f"use {', '.join(map(str, sizes))} of them"
    if sizes == [1]:
        remedy = "run a whole copy of it on each GPU instead"
    raise ConfigError(
        f"{size} ranks cannot share a model of {what}, each with equal parts of both",
        file="config.json",
        remedy=remedy,
    )


def split(model: Decoder, group: Group) -> None:
    """Make a model this rank's part, in place; it is on the meta device and stays there.

    Raises:
        ConfigError: as `check_split`.
    """
    check_split(model.config, group.size)
    if group.size == 1:
        model.group = group
        return
    K = model.config.num_kv_heads
    for name, linear in model.linears():
        linear.take_part(
            shard_linear(name, linear.in_features, linear.out_features, K, group.size, group.rank)
        )
    for module in model.modules():
        if isinstance(module, FalconBlock | LlamaBlock):
            module.group = group
        elif isinstance(module, Attention) and module.spec.alibi_slopes_N is not None:
            own_N = group.shard_of(module.spec.alibi_slopes_N, 0)
            module.spec = replace(module.spec, alibi_slopes_N=own_N)
    model.group = group
