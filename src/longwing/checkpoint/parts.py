"""A part of a stored tensor: where its bytes lie, and which parts a GPTQ layer's tensors have.

Several processes that share a model read a part each, and no byte besides. Which inputs and outputs
of a linear are whose is not decided here (`parallel/shards.py`).

Shape key: I in features, O out features, G quantisation groups.

The one idea: with act-order a run of inputs is of any groups, so its part keeps *all* scales and
zero points, and a run of g_idx with the numbers as they are. (TGI's rule; an engine that slices the
scales as well answers nonsense, vLLM #7374.) Groups that the cut would split do the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from longwing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PackedCut:
    """One part of the tensors of a packed linear.

    Attributes:
        qweight: of (I * bits / 32, O).
        qzeros: of (G, O * bits / 32).
        scales: of (G, O).
        g_idx: of (I,).
        keeps_g_idx: the part of g_idx is needed, its numbers as they are; else the part's inputs
            are in order within it, and no g_idx is.
    """

    qweight: tuple[slice, slice]
    qzeros: tuple[slice, slice]
    scales: tuple[slice, slice]
    g_idx: slice
    keeps_g_idx: bool


def cut_packed(
    name: str,
    in_features: int,
    ins: slice,
    outs: slice,
    bits: int,
    group_size: int,
    *,
    act_order: bool,
) -> PackedCut:
    """The part of each packed tensor that some inputs and outputs need.

    Args:
        name: the layer, for messages.
        in_features: of the whole layer.
        ins: the part's inputs, a run with both ends given.
        outs: its outputs, likewise.
        bits: of a value.
        group_size: inputs that share a scale; -1 is all.
        act_order: the layer's g_idx is not in order.

    Raises:
        ConfigError: the part's values do not fill whole 32-bit words.
    """
    in_words = _in_words(name, ins, bits, "inputs")
    out_words = _in_words(name, outs, bits, "outputs")
    num_groups = 1 if group_size == -1 else -(-in_features // group_size)
    groups, keeps = slice(0, num_groups), act_order
    if not (act_order or ins == slice(0, in_features) or group_size == -1):
        if ins.start % group_size == 0 and ins.stop % group_size == 0:
            groups = slice(ins.start // group_size, ins.stop // group_size)
        else:
            keeps = True
    return PackedCut(
        qweight=(in_words, outs),
        qzeros=(groups, out_words),
        scales=(groups, outs),
        g_idx=ins,
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


def _in_words(name: str, part: slice, bits: int, side: str) -> slice:
    """A run of packed values as a run of the words that hold them."""
    if part.start * bits % 32 or part.stop * bits % 32:
        raise ConfigError(
            f"{side} {part.start} to {part.stop} of {name} do not fill whole 32-bit words at "
            f"{bits} bits",
            remedy="use fewer GPUs a replica",
        )
    return slice(part.start * bits // 32, part.stop * bits // 32)
