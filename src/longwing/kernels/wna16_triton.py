"""Multiplication by streamed weights on a GPU: which kernel, and cut how.

The meaning is `wna16.packed_matmul`. The layout is in `streamed.py`, the device code in
`wna16_device.py`. Imported only where there is Triton.

Shape key: T tokens, K in features, N out features (padding counted).

The one idea: few tokens stream the packed weights once, and time is bytes; many make a slice of
them dense and leave the rest to cuBLAS (`wna16_dense.py`). In between, tiles of 64 tokens stream
them again for each tile. How a launch is cut up is `wna16_cut.py`'s. For up to 8 tokens activations
are `Digits` where that pays (`wna16_cut.by_digits`): a product makes them of numbers in a small
launch, unless whoever made the numbers has left digits.

What is the same to the last bit: any run and the next; and, of a launch by itself with weights that
have no zero points, a row alone and in any batch of up to 8 tokens. Beside others 1 and 2 tokens
are cut otherwise than 3 to 8, and with zero points these are numbers. So between up to 2, 8, 16,
32, 256 and more tokens, sums differ as float32 sums in another order do, and so do norms that are
folded in for up to 8 (`norm_fold.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Self

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from longwing.kernels.digits import Activations, Digits
from longwing.kernels.fused_triton import as_digits
from longwing.kernels.launch import starts_early, take_all_shared
from longwing.kernels.norm_fold import FoldedNorm, Scaled
from longwing.kernels.streamed import (
    CELL_IN,
    CELL_OUT,
    TILE_OUT,
    StreamedWeight,
)
from longwing.kernels.wna16_after import After
from longwing.kernels.wna16_cut import (
    NARROW_TOKENS,
    STREAM_TOKENS,
    Beside,
    Cut,
    by_digits,
    choose_cut,
)
from longwing.kernels.wna16_dense import MAGIC, NUMBERS, multiply_dense
from longwing.kernels.wna16_device import multiply

ARRANGED = 32
"""Inputs that change places among each other for wide products (`fused_device.arranged`)."""


def packed_matmul(
    x_TK: Activations,
    weight: StreamedWeight,
    cut: Cut | None = None,
    *,
    bias_N: Tensor | None = None,
    norm: FoldedNorm | None = None,
    act: str = "",
    more_TN: Tensor | None = None,
    out_TN: Tensor | None = None,
    beside: Beside | None = None,
    digits: Digits | None = None,
    arranged: bool = False,
    arrange: bool = False,
) -> Tensor:
    """act(x @ weight + bias) + more, (T, K) -> (T, N), for a weight of one part; sums in float32.

    Where weights are streamed, all of it is one launch, rounded once.

    Args:
        x_TK: in the type that the weight was laid out for; digits where it `takes_digits`.
        weight: on the same device.
        cut: None for the one that shapes call for.
        bias_N: added first.
        norm: x_TK has yet to go through this norm, whose weights it has; for up to NARROW_TOKENS
            tokens, as digits. The norm's bias has to be in bias_N.
        act: an activation by config.json's name, see `fused_triton.ACTIVATIONS`; "" for none.
        more_TN: added last: a residual. May be out_TN.
        out_TN: where the result goes; rows may lie apart. None for a new tensor.
        beside: for a launch that runs beside others, see `choose_cut`.
        digits: where the result goes a second time; where this product is `by_digits` itself.
        arranged: x_TK lies in the order that `arranges` is about.
        arrange: the result is to.

    Raises:
        ValueError: shapes or types that do not match, or a weight of several parts.
    """
    if len(weight.parts) != 1:
        raise ValueError(f"a weight of {len(weight.parts)} parts: use packed_matmul_many")
    T = _num_tokens(x_TK)
    if out_TN is None:
        out_TN = _new(x_TK, T, weight.parts[0])
    for given_TN in (out_TN, more_TN):
        if given_TN is not None and (
            given_TN.shape != (T, weight.parts[0])
            or given_TN.dtype != x_TK.dtype
            or given_TN.stride(1) != 1
        ):
            raise ValueError(
                f"a result, or what to add, of {tuple(given_TN.shape)} in {given_TN.dtype}; "
                f"{(T, weight.parts[0])} in {x_TK.dtype} is needed, each row in one piece"
            )
    if T > NARROW_TOKENS and (norm is not None or digits is not None):
        what = "a folded norm" if norm is not None else "digits"
        raise ValueError(f"{what} of {T} tokens; it is for {NARROW_TOKENS} at most")
    if digits is not None:
        digits.check(T, weight.parts[0], x_TK.dtype)
    after = After(
        bias_N=bias_N, norm=norm, act=act, more_TN=more_TN, arrange=arrange, digits=digits
    )
    _multiply(x_TK, weight, cut, after, out_TN, beside=beside, arranged=arranged)
    return out_TN


def arranges(weight: StreamedWeight, num_tokens: int) -> bool:
    """Whether a product's input has to be brought into another order (`fused_device.arranged`).

    Whoever makes the input can write it so at no cost, which saves the product a copy.
    """
    wide = 0 < num_tokens <= STREAM_TOKENS and not by_digits(weight, num_tokens)
    return wide and weight.order_K is None and weight.in_features % ARRANGED == 0


def takes_digits(weight: StreamedWeight, num_tokens: int) -> bool:
    """Whether a product's input may come as digits, which spares it a launch that makes them."""
    return by_digits(weight, num_tokens) and weight.order_K is None


def packed_matmul_many(
    x_TK: Activations,
    weight: StreamedWeight,
    cut: Cut | None = None,
    *,
    bias_N: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One launch for weights that share an input.

    Args:
        x_TK: as for `packed_matmul`.
        weight: as for `packed_matmul`.
        cut: as for `packed_matmul`.
        bias_N: (N,), with padding between parts as the weight has it (`weight.starts`).

    Returns:
        For each part its (T, N): views of one tensor, their rows contiguous, not the whole.
    """
    starts = weight.starts
    out_TN = _new(x_TK, _num_tokens(x_TK), starts[-1])
    _multiply(x_TK, weight, cut, After(bias_N=bias_N), out_TN)
    return tuple(out_TN[:, at : at + part] for at, part in zip(starts, weight.parts, strict=False))


def _num_tokens(x_TK: Activations) -> int:
    return x_TK.num_tokens if isinstance(x_TK, Digits) else len(x_TK)


def _new(x_TK: Activations, num_tokens: int, num_outputs: int) -> Tensor:
    device = x_TK.steps_CT.device if isinstance(x_TK, Digits) else x_TK.device
    return torch.empty(num_tokens, num_outputs, dtype=x_TK.dtype, device=device)


def _multiply(
    x_TK: Activations,
    weight: StreamedWeight,
    cut: Cut | None,
    after: After,
    out_TN: Tensor,
    *,
    beside: Beside | None = None,
    arranged: bool = False,
) -> None:
    _check_input(x_TK, weight)
    T = len(out_TN)
    if cut is None and T > STREAM_TOKENS and isinstance(x_TK, Tensor):
        multiply_dense(weight.ordered(x_TK), weight, after, out_TN)
    elif T > 0:
        cut = cut or choose_cut(weight, T, beside)
        if cut.wide and (after.norm is not None or after.digits is not None):
            what = "a folded norm" if after.norm is not None else "digits to be left"
            raise ValueError(f"{what} by a product of {T} tokens that is not by digits itself")
        partial = out_TN
        if cut.splits > 1:
            shape = (cut.splits, T, weight.starts[-1])
            partial = out_TN.new_empty(shape, dtype=torch.float32)
        shared = _Shared(
            partial=partial, arrivals=weight.arrivals, first_split=0, all_splits=cut.splits
        )
        _launch(x_TK, weight, cut, after, out_TN, shared, arranged=arranged)


def _check_input(x_TK: Activations, weight: StreamedWeight) -> None:
    num_inputs = weight.num_inputs or weight.in_features
    given = x_TK.num_features if isinstance(x_TK, Digits) else x_TK.shape[1]
    if x_TK.dtype != weight.dtype or num_inputs != given:
        raise ValueError(
            f"input of {given} features in {x_TK.dtype}; the weight was laid out for "
            f"{num_inputs} in {weight.dtype}"
        )
    if isinstance(x_TK, Digits) and not takes_digits(weight, x_TK.num_tokens):
        raise ValueError(
            f"digits of {x_TK.num_tokens} tokens, which a weight of groups of {weight.group_size}, "
            f"with{'out' if weight.zeros is None else ''} zero points, its inputs in "
            f"{'their own' if weight.order_K is None else 'another'} order, does not take"
        )


class SumOfProducts:
    """x1 @ weight1 + x2 @ weight2 + … + more, each product launched when its input is there.

    Use as a context, so that a failure between two products does not spoil the sums after it.

    Where weights are streamed no launch waits for another's: whichever program is the last to reach
    a tile adds up what all have left, in a fixed order. Launches may be on different branches of a
    CUDA graph.

    Args:
        weights: of one part and one number of outputs; every one must be given its input once.
        more_TN: added last: a residual, or None.
        out_TN: where the result goes; may be more_TN.
        bias_N: of all together.
        norms_N: weights of the LayerNorms that follow, one or two, to be folded, where all of these
            products are `by_digits`.
        beside: how each is cut, where they run beside each other.

    Attributes:
        scaled: what those norms' products need, once all is added; None without norms.
    """

    def __init__(
        self,
        weights: Sequence[StreamedWeight],
        more_TN: Tensor | None,
        out_TN: Tensor,
        bias_N: Tensor | None = None,
        *,
        norms_N: Sequence[Tensor] = (),
        beside: Sequence[Beside] | None = None,
    ) -> None:
        self.weights, self.out_TN = weights, out_TN
        self.scaled: Scaled | None = None
        self._streams = 0 < len(out_TN) <= STREAM_TOKENS
        if self._streams:
            self._cuts = [
                choose_cut(weight, len(out_TN), one)
                for weight, one in zip_longest(weights, beside or ())
            ]
            if len({triton.cdiv(len(out_TN), cut.tokens) for cut in self._cuts}) > 1:
                raise ValueError("products of a sum are cut into different numbers of token tiles")
            if norms_N:
                if any(cut.wide for cut in self._cuts):
                    raise ValueError("norms are folded where all products of a sum are by digits")
                self.scaled = Scaled.like(out_TN, norms_N, TILE_OUT)
            self._starts = [0, *accumulate(cut.splits for cut in self._cuts)]
            shape = (self._starts[-1], len(out_TN), weights[0].starts[-1])
            self._partial = out_TN.new_empty(shape, dtype=torch.float32)
        self._after = After(bias_N=bias_N, more_TN=more_TN, scaled=self.scaled)
        self._after_first = After(more_TN=out_TN)
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Forget the programs of a sum that was not finished: the next one counts anew."""
        if kind is not None and self._streams:
            self.weights[0].arrivals.zero_()

    def add(self, index: int, x_TK: Activations, *, arranged: bool = False) -> None:
        """The product of a weight, by its place among them, and its input; see `packed_matmul`."""
        weight = self.weights[index]
        _check_input(x_TK, weight)
        if not self._streams:
            after = self._after_first if self._begun else self._after
            self._begun = True
            if isinstance(x_TK, Tensor) and len(x_TK):
                multiply_dense(weight.ordered(x_TK), weight, after, self.out_TN)
            return
        _launch(
            x_TK,
            weight,
            self._cuts[index],
            self._after,
            self.out_TN,
            _Shared(
                partial=self._partial,
                arrivals=self.weights[0].arrivals,
                first_split=self._starts[index],
                all_splits=self._starts[-1],
            ),
            arranged=arranged,
        )


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Where programs that share a tile leave their sums, and where those of this launch begin."""

    partial: Tensor
    arrivals: Tensor
    first_split: int
    all_splits: int


def _launch(
    x_TK: Activations,
    weight: StreamedWeight,
    cut: Cut,
    after: After,
    out_TN: Tensor,
    shared: _Shared,
    *,
    arranged: bool,
) -> None:
    x, steps_CT = _as_read(x_TK, weight, cut, arranged=arranged)
    T, K = len(out_TN), x.shape[1] if cut.wide else weight.in_features
    N, chunks = weight.starts[-1], weight.words.shape[1]
    groups, chunks_per_group = weight.cell_groups
    more_stride = 0 if after.more_TN is None else after.more_TN.stride(0)
    norm = after.norm
    stats, level_N, eps, input_tiles = None, None, 0.0, 1
    if norm is not None:
        stats, level_N, eps = norm.stats_ST2, norm.level_N, norm.eps
        input_tiles = len(stats)
    # Wide programs take so much room that those of the next launch would only be in their way.
    may_overlap = not cut.wide and starts_early(out_TN.device)
    early = may_overlap and shared.all_splits > cut.splits
    with torch.cuda.device_of(x):
        kernel = multiply[(N // TILE_OUT, cut.splits, triton.cdiv(T, cut.tokens))](
            *(x, steps_CT, weight.words, weight.scales_GN, weight.any_zeros),
            *(stats, level_N, after.bias_N, after.more_TN, out_TN, *_left(after)),
            *(shared.partial, shared.arrivals),
            *(T, K, N, shared.first_split, shared.all_splits),
            *(out_TN.shape[1], more_stride, out_TN.stride(0), chunks, chunks_per_group),
            *(MAGIC[out_TN.dtype], 2, eps, input_tiles),
            bits=weight.bits,
            number=NUMBERS[out_TN.dtype],
            groups=groups,
            sym=weight.zeros is None,
            even=K % CELL_IN == 0,
            act=after.act,
            arrange=after.arrange,
            lone=T == 1,
            STATS_BLOCK=triton.next_power_of_2(input_tiles),
            split_up=shared.all_splits > 1,
            R=TILE_OUT // CELL_OUT,
            tokens=cut.tokens,
            wide=cut.wide,
            stages=cut.stages,
            early=early,
            lets=may_overlap and after.act != "",
            launch_pdl=early,
            num_warps=TILE_OUT // CELL_OUT,
        )
        take_all_shared(kernel)


def _as_read(
    x_TK: Activations, weight: StreamedWeight, cut: Cut, *, arranged: bool
) -> tuple[Tensor, Tensor | None]:
    """Activations as the kernel reads them: digits and their steps, or numbers and none."""
    if not cut.wide:
        digits = x_TK if isinstance(x_TK, Digits) else as_digits(x_TK, weight.order_K)
        return digits.digits_3TK, digits.steps_CT
    if isinstance(x_TK, Digits):
        raise ValueError(f"digits for tiles of {cut.tokens} tokens; they are for tiles of 2 or 8")
    numbers_TK = weight.ordered(x_TK)
    if not arranged:
        numbers_TK = F.pad(numbers_TK, (0, -numbers_TK.shape[1] % ARRANGED))
        numbers_TK = numbers_TK.unflatten(1, (-1, 4, 2, 2, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1)
    return numbers_TK.contiguous(), None


def _left(after: After) -> tuple[Tensor | None, ...]:
    """What a product leaves for those that follow: digits, steps, norms' weights, statistics."""
    digits, scaled = after.digits, after.scaled
    if scaled is not None:
        weights_D = (*scaled.weights_D, None)[:2]
        return scaled.digits_X3TK, scaled.steps_XCT, *weights_D, scaled.stats_ST2
    if digits is not None:
        return digits.digits_3TK, digits.steps_CT, None, None, None
    return None, None, None, None, None
