"""Which part of a linear each rank has, dense or GPTQ-packed: arithmetic on names and shapes.

    column-parallel  outputs are split     query_key_value, q/k/v_proj, up, gate
    row-parallel     inputs are split      dense, o_proj, down; partial sums are added over ranks
    head             the vocabulary is split, if it divides
    everything else  whole on every rank

Attention is split by KV heads: a rank has some of them, with all their query heads. Falcon's
`query_key_value` is laid out as K groups of [N / K queries, one key, one value], Llama's three
projections by heads in the same order, so in both a rank's part is one run of rows; and the output
projection's inputs are the query heads, in that order too.

Shape key: I in features, O out features, G quantisation groups, K KV heads, N query heads.

The one idea: with act-order a rank's input rows are of any groups, so it keeps *all* scales and
zero points, and its part of g_idx with the numbers as they are. (TGI's rule; an engine that slices
the scales as well answers nonsense, vLLM #7374.) Groups that the cut would split do the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

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


@dataclass(frozen=True, kw_only=True)
class PackedCut:
    """One rank's part of the tensors of a packed linear.

    Attributes:
        qweight: of (I * bits / 32, O).
        qzeros: of (G, O * bits / 32).
        scales: of (G, O).
        g_idx: of (I,).
        keeps_g_idx: the part of g_idx is needed, its numbers as they are; else the rank's rows are
            in order within the part, and no g_idx is.
    """

    qweight: tuple[slice, slice]
    qzeros: tuple[slice, slice]
    scales: tuple[slice, slice]
    g_idx: slice
    keeps_g_idx: bool


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


def cut_packed(shard: Shard, bits: int, group_size: int, *, act_order: bool) -> PackedCut:
    """The part of each packed tensor.

    Args:
        shard: the part of the linear.
        bits: of a value.
        group_size: inputs that share a scale; -1 is all.
        act_order: the layer's g_idx is not in order.

    Raises:
        ConfigError: the part's values do not fill whole 32-bit words.
    """
    ins = _in_words(shard.name, shard.ins, bits, "inputs")
    outs = _in_words(shard.name, shard.outs, bits, "outputs")
    num_groups = 1 if group_size == -1 else -(-shard.in_features // group_size)
    whole_input = shard.ins == slice(0, shard.in_features)
    groups, keeps = slice(0, num_groups), act_order
    if not (act_order or whole_input or group_size == -1):
        if shard.ins.start % group_size == 0 and shard.ins.stop % group_size == 0:
            groups = slice(shard.ins.start // group_size, shard.ins.stop // group_size)
        else:
            keeps = True
    return PackedCut(
        qweight=(ins, shard.outs),
        qzeros=(groups, outs),
        scales=(groups, shard.outs),
        g_idx=shard.ins,
        keeps_g_idx=keeps,
    )


def byte_runs(
    shape: Sequence[int], cut: Sequence[slice], itemsize: int
) -> Iterator[tuple[int, int]]:
    """Where a part of a stored tensor lies: (first byte, number of bytes), in order, as few as can.

    A part of the first dimension is one run; a part of the second is a run in every row.

    Args:
        shape: of the whole tensor, stored row after row.
        cut: a slice of step 1 for each dimension.
        itemsize: bytes of a number.
    """
    spans = [range(size)[piece] for size, piece in zip(shape, cut, strict=True)]
    if not all(len(span) for span in spans):
        return
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    # Whole dimensions at the end are of one run, and so is the part of the one before them.
    last = len(shape) - 1
    while last > 0 and len(spans[last]) == shape[last]:
        last -= 1
    if last < 0:
        yield 0, itemsize
        return
    length = len(spans[last]) * strides[last]
    for place in product(*spans[:last]):
        outer = sum(index * stride for index, stride in zip(place, strides, strict=False))
        yield outer + spans[last].start * strides[last], length


def _part(name: str, features: int, units: int, of: str, size: int, rank: int) -> slice:
    """The rank's run of features, which come as `units` equal units that are not to be split."""
    if units % size or features % units:
        raise ConfigError(
            f"{size} ranks do not divide the {units} {of} of {name}",
            remedy=f"use a number of GPUs that divides {units}",
        )
    part = features // size
    return slice(rank * part, (rank + 1) * part)


def _in_words(name: str, part: slice, bits: int, side: str) -> slice:
    """A run of packed values as a run of the words that hold them."""
    if part.start * bits % 32 or part.stop * bits % 32:
        raise ConfigError(
            f"{side} {part.start} to {part.stop} of {name} do not fill whole 32-bit words at "
            f"{bits} bits",
            remedy="use fewer GPUs a replica",
        )
    return slice(part.start * bits // 32, part.stop * bits // 32)
