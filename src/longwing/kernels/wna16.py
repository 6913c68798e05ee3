"""The packed layout of 2/3/4/8-bit weights: pack, unpack, dequantise, multiply.

This file holds what GPTQ checkpoints mean by `qweight`, and the reference multiplication on it; it
knows nothing of files, tensor names or zero-point dialects (those are `checkpoint/packed.py`).

Shape key: K in features, N out features, G quantisation groups, T tokens, W 32-bit words, R rows
of a tile.

The one idea: along the packed axis the values form a little-endian bit stream, value k at bits
[k * bits, (k + 1) * bits), cut into 32-bit words. For 2, 4 and 8 bits no value crosses a word; for
3 bits, 32 values fill 3 words exactly and values 10 and 21 of each 32 straddle two. That one rule
is bit-identical to what AutoGPTQ writes with its per-width cases.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
"""The widths the layout knows."""


DEQUANTISE_TILE = 2**22
"""Values made dense at once: small enough to bound the memory, large enough to keep a GPU busy."""


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A quantised (K, N) matrix as it lies in memory.

    w[k, n] = scales[g, n] * (q[k, n] - zeros[g, n]), where g is the group of row k.

    Attributes:
        bits: width of one value: 2, 3, 4 or 8.
        group_size: rows of K that share a scale; -1 is one group over all of K.
        qweight_WN: (K * bits / 32, N) int32, values packed along K.
        zeros_GN: (G, N) uint8, the true zero points.
        scales_GN: (G, N) floating point.
        g_idx_K: (K,) int32, the group of each row; None when it is k // group_size.
    """

    bits: int
    group_size: int
    qweight_WN: Tensor
    zeros_GN: Tensor
    scales_GN: Tensor
    g_idx_K: Tensor | None = None

    @property
    def in_features(self) -> int:
        """K, from the packed rows."""
        return self.qweight_WN.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight_WN.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        tensors = (self.qweight_WN, self.zeros_GN, self.scales_GN, self.g_idx_K)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weight on a device."""
        return replace(
            self,
            qweight_WN=self.qweight_WN.to(device),
            zeros_GN=self.zeros_GN.to(device),
            scales_GN=self.scales_GN.to(device),
            g_idx_K=None if self.g_idx_K is None else self.g_idx_K.to(device),
        )

    def group_of_row_K(self) -> Tensor:
        """(K,) int64: the group of each input row, whether stored or implied."""
        if self.g_idx_K is not None:
            return self.g_idx_K.long()
        rows_K = torch.arange(self.in_features, device=self.qweight_WN.device)
        return torch.zeros_like(rows_K) if self.group_size == -1 else rows_K // self.group_size


def pack(values: Tensor, bits: int, dim: int) -> Tensor:
    """Pack small integers into 32-bit words along `dim`.

    Args:
        values: integers in [0, 2**bits); higher bits are cut off.
        bits: 2, 3, 4 or 8.
        dim: the axis to pack; its length times `bits` must be a multiple of 32.

    Returns:
        int32, `dim` shortened to length * bits / 32.

    Raises:
        ValueError: the axis does not fill whole words.
    """
    length = values.shape[dim]
    if length * bits % 32:
        raise ValueError(f"{length} values of {bits} bits do not fill whole 32-bit words")
    # One period is the shortest run that fills whole words: 32 values of 3 bits, else one word.
    period = 32 if bits == 3 else 32 // bits
    stream = values.movedim(dim, -1).long().unflatten(-1, (-1, period)) & (2**bits - 1)
    words = stream.new_zeros((*stream.shape[:-1], period * bits // 32))
    for k in range(period):
        word, shift = divmod(k * bits, 32)
        words[..., word] |= stream[..., k] << shift
        if shift + bits > 32:
            words[..., word + 1] |= stream[..., k] >> (32 - shift)
    words &= 0xFFFFFFFF
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.flatten(-2).movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Undo `pack`: int32 words to uint8 values in [0, 2**bits) along `dim`.

    Raises:
        ValueError: 3-bit words that do not come in threes.
    """
    period = 32 if bits == 3 else 32 // bits
    words_per_period = period * bits // 32
    if words.shape[dim] % words_per_period:
        raise ValueError(f"{words.shape[dim]} words of 3-bit values are not a multiple of 3")
    stream = words.movedim(dim, -1).unflatten(-1, (-1, words_per_period))
    values = torch.empty((*stream.shape[:-1], period), dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for k in range(period):
        word, shift = divmod(k * bits, 32)
        # An arithmetic shift smears the sign; the mask takes the smear off where bits reach bit 31.
        low = stream[..., word] >> shift
        if shift + bits > 32:
            low_bits = 32 - shift
            low = (low & (2**low_bits - 1)) | (stream[..., word + 1] << low_bits)
        values[..., k] = (low & mask).to(torch.uint8)
    return values.flatten(-2).movedim(-1, dim)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dense (K, N) matrix in `dtype`; the products are formed in float32.

    Cost: the result, and about 16 bytes for each of the DEQUANTISE_TILE values in work at once.
    """
    K, N = weight.in_features, weight.out_features
    group_K = weight.group_of_row_K()
    dense_KN = torch.empty(K, N, dtype=dtype, device=weight.qweight_WN.device)
    rows = max(DEQUANTISE_TILE // N // 32, 1) * 32
    for start in range(0, K, rows):
        stop = min(start + rows, K)
        words = slice(start * weight.bits // 32, stop * weight.bits // 32)
        q_RN = unpack(weight.qweight_WN[words], weight.bits, 0)
        group_R = group_K[start:stop]
        # q - zero lies in [-255, 255]: exact in int16, where uint8 would wrap.
        centred_RN = q_RN.to(torch.int16) - weight.zeros_GN[group_R].to(torch.int16)
        dense_KN[start:stop] = centred_RN.float() * weight.scales_GN[group_R].float()
    return dense_KN


def packed_matmul(x_TK: Tensor, weight: PackedWeight) -> Tensor:
    """X @ dequantised weight, (T, K) -> (T, N), in x's dtype.

    The reference and the CPU path: dequantises the whole matrix, then multiplies. Memory: one dense
    (K, N) in x's dtype while it runs.
    """
    return x_TK @ dequantize(weight, x_TK.dtype)
