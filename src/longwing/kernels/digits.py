"""`Digits`: activations of a few tokens as whole numbers, for products by 8-bit tensor cores.

Shape key: T tokens, K features, C blocks of 128 features, the last one padded with zeros.

A block of a token is whole numbers of 22 bits and a sign, times one power of two: the largest of
its numbers decides. Each whole number is three signed digits to the base 256. So bfloat16 is exact
down to 2**-14 of the block's largest number, and float16 to 2**-11; what is smaller is rounded to
2**-22 of that. Digits times whole weights are added up exactly.

The one idea: eight columns are the least that a tensor core multiplies by, and one token has but
one; as digits it fills three, at no cost. And weights need not become 16-bit numbers first, which
is most of what a GPU has to do in a product for one token (`wna16_bytes.py`).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

BLOCK = 128
"""Features that share a power of two: a cell's inputs, and a tile's outputs."""

NUM_DIGITS = 3

WHOLE_BITS = 22
"""Of the whole numbers, without the sign."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Activations of a few tokens.

    Attributes:
        num_features: K, without padding.
        dtype: of the numbers.
        digits_3TK: int8, (3, T, 128 C), the lowest digit first.
        steps_CT: float32, what 1 of a block's whole numbers is.
    """

    num_features: int
    dtype: torch.dtype
    digits_3TK: Tensor
    steps_CT: Tensor

    @classmethod
    def room(
        cls, num_tokens: int, num_features: int, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """Room for so many, not yet written."""
        blocks = -(-num_features // BLOCK)
        shape = (NUM_DIGITS, num_tokens, blocks * BLOCK)
        return cls(
            num_features=num_features,
            dtype=dtype,
            digits_3TK=torch.empty(shape, dtype=torch.int8, device=device),
            steps_CT=torch.empty(blocks, num_tokens, dtype=torch.float32, device=device),
        )

    @classmethod
    def room_like(cls, x_TK: Tensor) -> Self:
        """Room for the digits of x."""
        return cls.room(x_TK.shape[0], x_TK.shape[1], x_TK.dtype, x_TK.device)

    @classmethod
    def of(cls, x_TK: Tensor) -> Self:
        """What the kernels make of finite x; the reference."""
        made = cls.room_like(x_TK)
        blocks, num_tokens = made.steps_CT.shape
        x_TCB = x_TK.new_zeros(num_tokens, blocks * BLOCK, dtype=torch.float64)
        x_TCB[:, : x_TK.shape[1]] = x_TK
        x_TCB = x_TCB.view(num_tokens, blocks, BLOCK)
        largest_TC = x_TCB.abs().amax(2)
        exponents_TC = (largest_TC.frexp().exponent - WHOLE_BITS).where(largest_TC > 0, -118)
        steps_TC = torch.ones_like(largest_TC).ldexp(exponents_TC.clamp(min=-118))
        whole_TCB = (x_TCB / steps_TC[..., None]).round().long()
        for digit_TCB in made.digits_3TK.view(NUM_DIGITS, num_tokens, blocks, BLOCK):
            digit_TCB.copy_(whole_TCB.to(torch.int8))
            whole_TCB = (whole_TCB + 128) >> 8
        made.steps_CT.copy_(steps_TC.T)
        return made

    def check(self, num_tokens: int, num_features: int, dtype: torch.dtype) -> None:
        """See that this is room for such numbers.

        Raises:
            ValueError: it is for others.
        """
        own = (self.num_tokens, self.num_features, self.dtype)
        if own != (num_tokens, num_features, dtype):
            raise ValueError(
                f"room for digits of {own[0]} x {own[1]} numbers in {own[2]}; "
                f"{num_tokens} x {num_features} in {dtype} are to go there"
            )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.digits_3TK.shape[1]

    def values(self) -> Tensor:
        """(T, K) float64: the numbers that these stand for."""
        weights_3 = 256.0 ** torch.arange(NUM_DIGITS, device=self.digits_3TK.device)
        whole_TK = (self.digits_3TK.double() * weights_3[:, None, None]).sum(0)
        whole_TCB = whole_TK.unflatten(1, (-1, BLOCK))
        return (whole_TCB * self.steps_CT.T[..., None]).flatten(1)[:, : self.num_features]


Activations = Tensor | Digits
"""(T, K): numbers, or for a few tokens their digits."""
