"""A LayerNorm taken into the products on both sides of it, so that it is no launch of its own.

With mean m and deviation s of a token's hidden state x, and a norm of weight w and bias b,

    LayerNorm(x) @ W = ((x w) @ W - m (w @ W)) / s + b @ W

so whoever makes x leaves x w as well, and what m and s are made of (`Scaled`); the product is of
x w; and its way out, where m and s are needed at last, does the rest (`FoldedNorm`). Beside the
norm itself x w is rounded once, as the norm's result would be.

Shape key: T tokens, D model dim (the inputs of W), N its outputs, padding counted, X norms of one
token (Falcon-40B's attention and MLP have one each), S tiles of a token's D numbers, each of which
one program of the product before has made.

The one idea: for few tokens a norm is 4 microseconds in which nothing else can run, since all that
follows waits for it, in each of 60 blocks; and all it needs from the whole token is two numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from longwing.kernels.digits import BLOCK, NUM_DIGITS, Digits
from longwing.kernels.streamed import take_outputs
from longwing.kernels.wna16 import PackedWeight, dequantize

OUTPUTS_AT_ONCE = 2048
"""Outputs whose weights are made dense at once: 64 MiB in float32 for 8,192 inputs."""


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Hidden states under the weights of the norms that follow, not yet normed.

    Attributes:
        weights_D: of each of X norms, one or two.
        digits_X3TK: x times each, rounded, as the digits of `Digits`.
        steps_XCT: float32, and their steps.
        stats_ST2: float32 sums of each tile of x, and sums of its squares.
        dtype: of x.
    """

    weights_D: tuple[Tensor, ...]
    digits_X3TK: Tensor
    steps_XCT: Tensor
    stats_ST2: Tensor
    dtype: torch.dtype

    @classmethod
    def like(cls, hidden_TD: Tensor, weights_D: Sequence[Tensor], tile: int) -> Self:
        """Room for what becomes of hidden states of that shape, of which a program makes `tile`.

        Raises:
            ValueError: not one norm or two.
        """
        if len(weights_D) not in (1, 2):
            raise ValueError(f"{len(weights_D)} norms of one token: one or two can be folded")
        T, D = hidden_TD.shape
        X, blocks = len(weights_D), -(-D // BLOCK)
        return cls(
            weights_D=tuple(weights_D),
            digits_X3TK=hidden_TD.new_empty(X, NUM_DIGITS, T, blocks * BLOCK, dtype=torch.int8),
            steps_XCT=hidden_TD.new_empty(X, blocks, T, dtype=torch.float32),
            stats_ST2=hidden_TD.new_empty(-(-D // tile), T, 2, dtype=torch.float32),
            dtype=hidden_TD.dtype,
        )

    @property
    def digits(self) -> tuple[Digits, ...]:
        """Under each norm's weights."""
        return tuple(
            Digits(
                num_features=len(self.weights_D[0]),
                dtype=self.dtype,
                digits_3TK=digits_3TK,
                steps_CT=steps_CT,
            )
            for digits_3TK, steps_CT in zip(self.digits_X3TK, self.steps_XCT, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class FoldedNorm:
    """What the way out of a product needs, where its input was not normed.

    Attributes:
        stats_ST2: of the input, see `Scaled`.
        level_N: (N,) float32, w @ W.
        eps: of the norm.
    """

    stats_ST2: Tensor
    level_N: Tensor
    eps: float


def through(packed: PackedWeight, *inputs_K: Tensor) -> tuple[Tensor, ...]:
    """(N,) float32 products of a packed matrix and some single rows, exact but for float32 sums.

    Args:
        packed: the matrix.
        inputs_K: rows of K numbers: a norm's weight, a norm's bias.
    """
    rows_RK = torch.stack([row_K.float() for row_K in inputs_K]).to(packed.qweight_WN.device)
    order_N = torch.arange(packed.out_features, device=rows_RK.device)
    pieces = [
        rows_RK @ dequantize(take_outputs(packed, some_N), torch.float32)
        for some_N in order_N.split(OUTPUTS_AT_ONCE)
    ]
    return tuple(torch.cat(pieces, 1))
