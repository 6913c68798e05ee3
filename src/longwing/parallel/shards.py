"""Which part of a linear each rank has: arithmetic on names and shapes.

    column-parallel  outputs are split     query_key_value, q/k/v_proj, up, gate
    row-parallel     inputs are split      dense, o_proj, down; partial sums are added over ranks
    head             the vocabulary is split, if it divides
    everything else  whole on every rank

Attention is split by KV heads: a rank has some of them, with all their query heads. Falcon's
`query_key_value` is laid out as K groups of [N / K queries, one key, one value], Llama's three
projections by heads in the same order, so in both a rank's part is one run of rows; and the output
projection's inputs are the query heads, in that order too.

What a part of a linear is among the tensors of a file, packed ones too, is `checkpoint/parts.py`.

Shape key: I in features, O out features, K KV heads, N query heads.

The one idea: a matrix cut by outputs and one cut by inputs, one after the other, need one sum over
the ranks at the end and nothing in between.
"""

from dataclasses import dataclass

from longwing.errors import ConfigError

ATTENTION_COLUMNS = ("query_key_value", "q_proj", "k_proj", "v_proj")
ATTENTION_ROWS = ("dense", "o_proj")
MLP_COLUMNS = ("dense_h_to_4h", "gate_proj", "up_proj")
MLP_ROWS = ("dense_4h_to_h", "down_proj")
HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of one linear.

    Attributes:
        name: the module's.
        in_features: of the whole linear.
        out_features: likewise.
        ins: the inputs it has.
        outs: the outputs it makes.
        sums: its outputs are part of a sum over all ranks.
        has_bias: it adds the linear's bias, if there is one; of ranks whose outputs are summed,
            only the first does.
    """

    name: str
    in_features: int
    out_features: int
    ins: slice
    outs: slice
    sums: bool
    has_bias: bool

    def weight(self) -> tuple[slice, slice]:
        """The part of a dense (O, I) weight."""
        return self.outs, self.ins

    def bias(self) -> slice:
        """The part of an (O,) bias, where it has one."""
        return self.outs


def shard_linear(
    name: str, in_features: int, out_features: int, num_kv_heads: int, size: int, rank: int
) -> Shard:
    """The part of rank `rank` of `size`.

    Args:
        name: the module, e.g. "transformer.h.0.self_attention.query_key_value".
        in_features: I.
        out_features: O.
        num_kv_heads: K; for attention's own layers.
        size: ranks.
        rank: from 0.

    Raises:
        ConfigError: the ranks do not divide the KV heads, or the MLP's width.
    """
    leaf = name.rpartition(".")[2]
    ins, outs = slice(0, in_features), slice(0, out_features)
    sums = False
    if leaf in ATTENTION_COLUMNS:
        outs = _part(name, out_features, num_kv_heads, "key/value heads", size, rank)
    elif leaf in MLP_COLUMNS:
        outs = _part(name, out_features, out_features, "outputs", size, rank)
    elif leaf in ATTENTION_ROWS:
        sums, ins = True, _part(name, in_features, num_kv_heads, "key/value heads", size, rank)
    elif leaf in MLP_ROWS:
        sums, ins = True, _part(name, in_features, in_features, "inputs", size, rank)
    elif leaf == HEAD and out_features % size == 0:
        outs = _part(name, out_features, out_features, "tokens", size, rank)
    return Shard(
        name=name,
        in_features=in_features,
        out_features=out_features,
        ins=ins,
        outs=outs,
        sums=sums,
        has_bias=not sums or rank == 0,
    )


def _part(name: str, features: int, units: int, of: str, size: int, rank: int) -> slice:
    """The rank's run of features, which come as `units` equal units that are not to be split."""
    if units % size or features % units:
        raise ConfigError(
            f"{size} ranks do not divide the {units} {of} of {name}",
            remedy=f"use a number of GPUs that divides {units}",
        )
    part = features // size
    return slice(rank * part, (rank + 1) * part)
