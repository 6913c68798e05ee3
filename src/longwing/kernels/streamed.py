"""The layout in which a GPU streams 2/3/4/8-bit weights, and how to bring a `PackedWeight` into it.

A layout lives with its reader: the kernels are in `wna16_device.py` and `dense_device.py`, their
launches in `wna16_triton.py` and `wna16_dense.py`. This file needs neither Triton nor a GPU.

Shape key: T tokens, K in features, N out features, G groups, C chunks of 128 inputs.

The one idea: the tensor cores multiply as soon as a thread holds its fragment, so a weight is
stored where its thread will want it. Weights are the left operand (outputs are rows). A *cell* is
32 outputs by 128 inputs. Lane 4 g + t of a warp holds, of the rows g, g + 8, g + 16 and g + 24, the
inputs 32 s + 8 t + 4 u + 2 h + a (s < 4; u, h, a < 2). Those 32 values of a row fill `bits` words.
In each, four of one s and u lie at the same place of its four bytes 2 h + a: once all other bits
are masked out, they are the operand of an 8-bit tensor core. The two of one a, besides, are a
*pair* p = 4 s + 2 a + u in the halves h, which become two 16-bit numbers. A warp reads a cell as
`bits` loads of 16 bytes a lane, 512 in a row, and no weight changes lanes. Values are stored less
2**(bits - 1), as signed ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.kernels.even_groups import even_groups
from longwing.kernels.wna16 import PackedWeight, unpack

CELL_OUT = 32
"""Outputs of a cell: two tensor-core tiles of 16."""

CELL_IN = 128
"""Inputs of a cell."""

FINEST_GROUP = 32
"""The smallest group that a cell can be cut into."""

TILE_OUT = 128
"""Outputs of a program: one cell for each of four warps."""

TOKEN_TILES = 4
"""Tiles of tokens that a split launch can have."""

WEIGHTS_AT_ONCE = 2**23
"""Weights laid out at once; each takes some 30 bytes while it is."""


@dataclass(frozen=True, kw_only=True)
class StreamedWeight:
    """A quantised (K, N) matrix, or several side by side, ready to be streamed.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale here: K, or a multiple of CELL_IN, or 64 or 32.
        in_features: K, with what fills groups up (`even_groups.py`).
        parts: outputs of each matrix. Each begins at a tile, so N counts padding between them.
        dtype: of the activations.
        words: (N / 32, C, bits, 128) int32, cells as the file's head describes.
        scales_GN: 16-bit floats, as the checkpoint has them, rows by lanes (`_by_lane`); 0 where
            padded.
        zeros: (G, N / 4) int32, the zero points of a lane's four rows in one word; None when every
            zero point is the middle, 2**(bits - 1).
        order_K: the order that activations are brought into first; None for the natural one.
        num_inputs: of an activation, before that; None is K.
        arrivals: int32 zeros, by which the last program of a tile knows that it is. Every launch
            leaves zeros; so one weight must not be multiplied on two streams at a time.
    """

    bits: int
    group_size: int
    in_features: int
    parts: tuple[int, ...]
    dtype: torch.dtype
    words: Tensor
    scales_GN: Tensor
    zeros: Tensor | None
    order_K: Tensor | None
    arrivals: Tensor
    num_inputs: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a multiplication reads, activations aside."""
        tensors = (self.words, self.scales_GN, self.zeros, self.order_K)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def starts(self) -> tuple[int, ...]:
        """The row at which each part begins, and at last the end of all padding: N."""
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + math.ceil(part / TILE_OUT) * TILE_OUT)
        return tuple(starts)

    @property
    def cell_groups(self) -> tuple[int, int]:
        """Scales of a row in a cell, 0 for one in all; and chunks that share one."""
        if self.group_size == self.in_features:
            return 0, self.words.shape[1]
        if self.group_size < CELL_IN:
            return CELL_IN // self.group_size, 1
        return 1, self.group_size // CELL_IN

    @property
    def any_zeros(self) -> Tensor:
        """Zero points; without any, a tensor of their type that no kernel will read."""
        return self.words if self.zeros is None else self.zeros

    def ordered(self, x_TK: Tensor) -> Tensor:
        """Activations with their inputs in this weight's order."""
        return x_TK if self.order_K is None else x_TK.index_select(-1, self.order_K)


def fits(weight: PackedWeight) -> bool:
    """Whether `stream` can lay the weight out. What it cannot is left to the reference."""
    return _is_even(weight) or _can_be_even(weight)


def stream(parts: Sequence[PackedWeight], dtype: torch.dtype) -> StreamedWeight:
    """Lay out one matrix, or several of the same inputs, for activations of `dtype`.

    On the device where the weights lie. Once, at load: it reads values back to the host. One
    matrix may have unequal groups, which are filled up.

    Raises:
        ValueError: unequal groups of several matrices, too fine ones, parts that differ in format,
            or another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations are {dtype}; streamed weights take float16 or bfloat16")
    if len(parts) == 1 and not _is_even(parts[0]) and _can_be_even(parts[0]):
        evened, order_K = even_groups(parts[0])
        num_inputs = parts[0].in_features
        return replace(stream([evened], dtype), order_K=order_K, num_inputs=num_inputs)
    bits, K = parts[0].bits, parts[0].in_features
    group_size = math.gcd(*(_group_size(part) for part in parts))
    orders = [_input_order(part, group_size) for part in parts]
    if any((part.bits, part.in_features) != (bits, K) for part in parts):
        raise ValueError(f"stacked weights must all have {bits} bits and {K} inputs, as the first")
    if any(not _same(orders[0], order_K) for order_K in orders[1:]):
        raise ValueError("stacked weights must share their order of inputs (g_idx)")
    laid = [_lay_out(part, group_size, orders[0]) for part in parts]
    words, scales_GN, zeros_GN = (
        torch.cat(x, dim) for x, dim in zip(zip(*laid, strict=True), (0, 1, 1), strict=True)
    )
    symmetric = all(bool((part.zeros_GN == 1 << (bits - 1)).all()) for part in parts)
    if scales_GN.dtype not in (torch.float16, torch.bfloat16):
        scales_GN = scales_GN.to(dtype)
    return StreamedWeight(
        bits=bits,
        group_size=group_size,
        in_features=K,
        parts=tuple(part.out_features for part in parts),
        dtype=dtype,
        words=words,
        scales_GN=scales_GN,
        zeros=None if symmetric else zeros_GN.view(torch.int32),
        order_K=orders[0],
        arrivals=words.new_zeros(TOKEN_TILES * words.shape[0] * CELL_OUT // TILE_OUT),
    )


def stackable(parts: Sequence[PackedWeight]) -> bool:
    """Whether `stream` takes these together."""
    first = parts[0]
    if any((part.bits, part.in_features) != (first.bits, first.in_features) for part in parts):
        return False
    try:
        size = math.gcd(*(_group_size(part) for part in parts))
        orders = [_input_order(part, size) for part in parts]
    except ValueError:
        return False
    return all(_same(orders[0], order_K) for order_K in orders)


def take_outputs(weight: PackedWeight, order_N: Tensor) -> PackedWeight:
    """The same matrix with its outputs in another order."""
    return replace(
        weight,
        qweight_WN=weight.qweight_WN[:, order_N],
        zeros_GN=weight.zeros_GN[:, order_N],
        scales_GN=weight.scales_GN[:, order_N],
    )


def _is_even(weight: PackedWeight) -> bool:
    """Whether inputs come in equal groups that a cell can be cut into, in whatever order."""
    try:
        _input_order(weight, _group_size(weight))
    except ValueError:
        return False
    return True


def _can_be_even(weight: PackedWeight) -> bool:
    return weight.g_idx_K is not None and _own_group(weight) >= FINEST_GROUP


def _lay_out(
    weight: PackedWeight, group_size: int, order_K: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and zeros of one part, padded to whole tiles and chunks."""
    K, N = weight.in_features, weight.out_features
    pad_K, pad_N = -K % CELL_IN, -N % TILE_OUT
    repeats = _own_group(weight) // group_size
    groups = 1 if group_size == K else math.ceil((K + pad_K) / group_size)
    pad = (0, pad_N, 0, groups - K // group_size)
    scales_GN, zeros_GN = (
        _by_lane(F.pad(x.repeat_interleave(repeats, 0), pad))
        for x in (weight.scales_GN, weight.zeros_GN)
    )
    panels, chunks = (N + pad_N) // CELL_OUT, (K + pad_K) // CELL_IN
    words = weight.qweight_WN.new_empty(panels, chunks, weight.bits, 4 * CELL_OUT)
    step = max(WEIGHTS_AT_ONCE // (K + pad_K) // CELL_OUT, 1)
    for panel in range(0, panels, step):
        columns = slice(panel * CELL_OUT, (panel + step) * CELL_OUT)
        q_KN = unpack(weight.qweight_WN[:, columns].contiguous(), weight.bits, 0)
        q_KN = q_KN if order_K is None else q_KN[order_K]
        q_KN = F.pad(q_KN, (0, -q_KN.shape[1] % CELL_OUT, 0, pad_K))
        cells = _cells(q_KN.T, weight.bits)
        words[panel : panel + len(cells)] = cells
        if panel + len(cells) < min(panel + step, panels):  # nothing but padding is left
            words[panel + len(cells) :] = 0
    return words, scales_GN, zeros_GN


def _cells(q_NK: Tensor, bits: int) -> Tensor:
    """(N, K) values to (N / 32, C, bits, 128) words."""
    signed_NK = q_NK.to(torch.int32) ^ (1 << (bits - 1))
    q = signed_NK.reshape(-1, 4, 8, q_NK.shape[1] // CELL_IN, 4, 4, 2, 2, 2)
    # (panel, row of four, g, chunk, s, t, u, h, a) -> (panel, chunk, s a u, h, g t row of four).
    q = q.permute(0, 3, 4, 8, 6, 7, 2, 5, 1).flatten(6).flatten(2, 4)
    pairs = q[:, :, :, 0] | q[:, :, :, 1] << 16
    words = pairs.new_zeros(*pairs.shape[:2], bits, pairs.shape[-1])
    for pair, pieces in enumerate(places(bits)):
        for word, place, low, width in pieces:
            piece = (pairs[:, :, pair] >> low) & (((1 << width) - 1) * 0x10001)
            words[:, :, word] |= piece << place
    return words


def places(bits: int) -> list[list[tuple[int, int, int, int]]]:
    """For each of 16 pairs its pieces: (word, place in the half, lowest bit, width).

    Of the eight s, u of a byte, each word has as many as fit. With three bits that is two, and two
    bits are left over: of the words 0 and 2 the upper ones of s = 3, of word 1 their lowest.
    """
    pieces = []
    for pair in range(16):
        (s, a, u), per_byte = (pair // 4, pair // 2 % 2, pair % 2), 8 // bits
        word, within = divmod(2 * s + u, per_byte)
        if bits != 3:
            pieces.append([(word, 8 * a + within * bits, 0, bits)])
        elif s < 3:
            pieces.append([(word, 8 * a + 2 + 3 * within, 0, 3)])
        else:
            pieces.append([(2 * u, 8 * a, 1, 2), (1, 8 * a + u, 0, 1)])
    return pieces


def _by_lane(x_GN: Tensor) -> Tensor:
    """One number a row, in the order of lanes: rows g, g + 8, g + 16, g + 24 side by side."""
    return x_GN.unflatten(1, (-1, 4, 8)).transpose(2, 3).flatten(1).contiguous()


def _own_group(weight: PackedWeight) -> int:
    return weight.in_features if weight.group_size == -1 else weight.group_size


def _group_size(weight: PackedWeight) -> int:
    """The largest group that divides the weight's own and that a cell knows."""
    K, own = weight.in_features, _own_group(weight)
    size = own if own == K or own % CELL_IN == 0 else math.gcd(own, CELL_IN)
    if K % own or (size != K and size < FINEST_GROUP):
        raise ValueError(
            f"groups of {own} in {K} inputs; streamed weights need a divisor of the inputs that is "
            f"a multiple of {FINEST_GROUP}"
        )
    return size


def _input_order(weight: PackedWeight, group_size: int) -> Tensor | None:
    """(K,) the order of inputs that makes groups contiguous; None if they are."""
    if weight.g_idx_K is None or group_size == weight.in_features:
        return None
    own = _own_group(weight)
    g_idx_K = weight.g_idx_K.long()
    order_K = g_idx_K.argsort(stable=True)
    natural_K = torch.arange(len(order_K), device=order_K.device)
    if not torch.equal(g_idx_K[order_K], natural_K // own):
        raise ValueError(f"g_idx must share the inputs out in equal groups of {own}")
    return None if torch.equal(order_K, natural_K) else order_K


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
