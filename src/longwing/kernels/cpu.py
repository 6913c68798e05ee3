"""What a CPU multiplies by: weights laid out once for the fast kernels that PyTorch brings.

Three forms, each made from plain or packed weights, each with `matmul` from (T, K) to (T, N):

- `DenseWeight`: float32 or bfloat16, blocked by oneDNN for its own use.
- `Int4Weight`: 2, 3 or 4 bits in groups, four bits a weight; bfloat16 in, float32 sums.
- `Int8Weight`: 8 bits with one scale an output, activations rounded to 8 bits for each token.

They are for inference and cannot be taken back. Their meaning is `x @ weight.T`, to which tests
hold them; what each is good for was measured (bench/cpu_decode.py).

Shape key: T tokens, K in features, N out features, G quantisation groups.

The one idea: a decode step reads every weight once, so bytes are time, until there are so many
tokens that unpacking costs more than reading. `NARROW_TOKENS` is where the two cross.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.kernels.wna16 import PackedWeight, unpack

NARROW_TOKENS = 4
"""Up to this many tokens 4-bit weights are multiplied faster than bfloat16 ones."""

GROUP_SIZES = (256, 128, 64, 32)
"""Groups that the 4-bit kernel knows."""

OUTPUTS_MULTIPLE = 16
"""Outputs that the 4-bit kernel works on at once; others are padded with zeros."""

BATCH_HINT = 8
"""Tokens that oneDNN is told to expect when it chooses a layout; any number works."""


SMALLEST = torch.finfo(torch.float32).tiny
"""Scale of a row of zeros: one that it can be divided by."""


LOW_DIGIT = 254
"""Steps of the second digit in one of the first, of which a rounding leaves half at most."""


class DenseWeight:
    """A (N, K) matrix in float32 or bfloat16, as oneDNN wants it where PyTorch has oneDNN.

    Up to five times as fast as `F.linear` in float32 at a few tokens, and the same to rounding.
    """

    def __init__(self, weight_NK: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        weight_NK = weight_NK.detach().to(dtype).contiguous()
        self.nbytes = weight_NK.nbytes
        self._blocked = offers_blocked(dtype)
        self._weight = _blocked(weight_NK) if self._blocked else weight_NK

    def matmul(self, x_TK: Tensor) -> Tensor:
        """(T, K) of any floating type -> (T, N) in the weight's."""
        x_TK = x_TK.to(self.dtype)
        return _linear(x_TK, self._weight) if self._blocked else F.linear(x_TK, self._weight)


class Int4Weight:
    """A packed matrix of 2, 3 or 4 bits, widened to 4: w = (q - 8) * scale + offset.

    Narrower values are moved so that their middle is 8, so symmetric weights need no offset. Exact
    but for the kernel's taking scale and offset in bfloat16, each off by at most 2**-9 of itself.
    """

    def __init__(self, parts: Sequence[PackedWeight], rows: Tensor | None = None) -> None:
        """Lay out matrices that share their input, as if stacked along N.

        Args:
            parts: same K; `fits` each of them, with the same order of inputs.
            rows: (N,) order of the stacked outputs; None leaves it.
        """
        first = parts[0]
        K = first.in_features
        self.group_size = _group_size(first)
        order_K = _input_order(first)
        self._columns = order_K
        q_NK = torch.cat(
            [unpack(part.qweight_WN, part.bits, 0).T + (8 - _middle(part)) for part in parts]
        )
        scales_NG = torch.cat([part.scales_GN.T for part in parts]).bfloat16()
        # Middle - zero is exact in bfloat16; its product with the scale is rounded once.
        above_NG = torch.cat([_middle(part) - part.zeros_GN.T.to(torch.int16) for part in parts])
        offsets_NG = above_NG.bfloat16() * scales_NG
        if order_K is not None:
            q_NK = q_NK[:, order_K]
        if rows is not None:
            q_NK, scales_NG, offsets_NG = q_NK[rows], scales_NG[rows], offsets_NG[rows]
        self.out_features = len(q_NK)
        pad = -self.out_features % OUTPUTS_MULTIPLE
        groups = K // self.group_size
        both_GN2 = torch.stack((scales_NG, offsets_NG), -1).transpose(0, 1)
        both_GN2 = both_GN2.repeat_interleave(groups // len(both_GN2), 0)
        self._scales_and_offsets = F.pad(both_GN2, (0, 0, 0, pad)).contiguous()
        q_NK = F.pad(q_NK.to(torch.int32), (0, 0, 0, pad)).contiguous()
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1)
        self._pad = pad
        self.nbytes = self._weight.nbytes + self._scales_and_offsets.nbytes

    @staticmethod
    def fits(weight: PackedWeight) -> bool:
        """Whether this form can hold the matrix, on a CPU that has a kernel for it."""
        if weight.bits == 8 or not offers_int4() or _group_size(weight) == 0:
            return False
        return weight.g_idx_K is None or _input_order(weight) is not None

    def matmul(self, x_TK: Tensor) -> Tensor:
        """(T, K) of any floating type -> (T, N) bfloat16."""
        if self._columns is not None:
            x_TK = x_TK.index_select(1, self._columns)
        out_TN = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TK.bfloat16().contiguous(), self._weight, self.group_size, self._scales_and_offsets
        )
        return out_TN[:, : self.out_features] if self._pad else out_TN


class Int8Weight:
    """A (N, K) matrix rounded to 8 bits, one scale an output; for an output head.

    Each token's activations are two 8-bit digits, a rounding and what it left over: one alone
    gave a KL of 0.0095 (WikiText, SmolLM2-135M), both 0.0015, and the second costs almost no time,
    since the weights are read once. Sums are integers, exact.
    """

    def __init__(self, weight_NK: Tensor) -> None:
        weight_NK = weight_NK.detach().float()
        self._scales_N = (weight_NK.abs().amax(1) / 127).clamp_min(SMALLEST)
        self._zeros_N = torch.zeros(len(weight_NK), dtype=torch.int32)
        q_NK = (weight_NK / self._scales_N[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(q_NK, None)
        self.nbytes = q_NK.nbytes + self._scales_N.nbytes + self._zeros_N.nbytes

    def matmul(self, x_TK: Tensor) -> Tensor:
        """(T, K) of any floating type -> (T, N) float32."""
        scales_T1 = (x_TK.float().abs().amax(1, keepdim=True) / 127).clamp_min_(SMALLEST)
        x_TK = x_TK / scales_T1
        high_TK = x_TK.round()
        low_TK = (x_TK - high_TK).mul_(LOW_DIGIT).round_()
        # Unsigned around 128: the signed kernel of oneDNN is a thousand times slower.
        digits = torch.cat((high_TK, low_TK)).add_(128).to(torch.uint8)
        high_TN, low_TN = torch.ops.onednn.qlinear_pointwise(
            digits,
            1.0,
            128,
            self._weight,
            self._scales_N,
            self._zeros_N,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).chunk(2)
        return high_TN.add_(low_TN, alpha=1 / LOW_DIGIT).mul_(scales_T1)


@dataclass(frozen=True, kw_only=True)
class CpuWeight:
    """A matrix in up to two forms, the number of tokens choosing.

    Attributes:
        narrow: for up to NARROW_TOKENS tokens; None without one.
        wide: for more; None leaves all to `narrow`, at a quarter of the memory and of the speed.
        bias_N: added to either's result.
    """

    narrow: Int4Weight | None = None
    wide: DenseWeight | Int8Weight | None = None
    bias_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.narrow is None and self.wide is None:
            raise ValueError("a CpuWeight needs one form at least")

    @property
    def nbytes(self) -> int:
        """Bytes of both forms."""
        return sum(form.nbytes for form in (self.narrow, self.wide) if form is not None)

    def matmul(self, x_TK: Tensor) -> Tensor:
        """X @ weight.T + bias, (T, K) -> (T, N), in the type of the form."""
        form = self.narrow if len(x_TK) <= NARROW_TOKENS or self.wide is None else self.wide
        out_TN = (form or self.wide).matmul(x_TK)  # type: ignore[union-attr]
        return out_TN if self.bias_N is None else out_TN + self.bias_N


@cache
def offers_blocked(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this type, and as fast as the type promises."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not fast_bfloat16():
        return False
    x_TK, weight_NK = torch.ones(2, 32, dtype=dtype), torch.ones(16, 32, dtype=dtype)
    try:
        return bool((_linear(x_TK, _blocked(weight_NK)) == 32).all())
    except (AttributeError, RuntimeError):  # built without it, or not for this processor
        return False


@cache
def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by itself: AVX512_BF16 or AMX."""
    return any(_processor_has(name) for name in ("avx512_bf16", "amx_tile"))


@cache
def offers_int4() -> bool:
    """Whether PyTorch brings a vectorised 4-bit kernel for this processor: AVX2 or AVX-512.

    Elsewhere the same function exists, some 20 times slower.
    """
    has_function = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return has_function and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@cache
def offers_int8() -> bool:
    """Whether the processor sums 8-bit products by itself: VNNI, through oneDNN."""
    has_function = hasattr(torch.ops.onednn, "qlinear_pointwise")
    return has_function and torch.backends.mkldnn.is_available() and _processor_has("vnni")


def _processor_has(name: str) -> bool:
    """PyTorch's answer on a feature; its questions have no public name yet."""
    question = getattr(torch.cpu, f"_is_{name}_supported", None)
    return question is not None and bool(question())


def _blocked(weight_NK: Tensor) -> Tensor:
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, BATCH_HINT)
    return blocked


def _linear(x_TK: Tensor, blocked_NK: Tensor) -> Tensor:
    out_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, blocked_NK, None, "none", [], "")
    return out_TN


def _middle(weight: PackedWeight) -> int:
    """The value halfway up, which is the zero point of symmetric weights."""
    return 1 << (weight.bits - 1)


def _group_size(weight: PackedWeight) -> int:
    """The largest group of the kernel that divides the weight's own; 0 if none does."""
    own = weight.in_features if weight.group_size == -1 else weight.group_size
    if weight.in_features % own:
        return 0
    return next((size for size in GROUP_SIZES if own % size == 0), 0)


def _input_order(weight: PackedWeight) -> Tensor | None:
    """(K,) the order of inputs that makes groups contiguous; None if stored so, or unequal."""
    if weight.g_idx_K is None:
        return None
    own = weight.in_features if weight.group_size == -1 else weight.group_size
    order_K = weight.g_idx_K.long().argsort(stable=True)
    natural_K = torch.arange(weight.in_features) // own
    return order_K if torch.equal(weight.g_idx_K.long()[order_K], natural_K) else None
