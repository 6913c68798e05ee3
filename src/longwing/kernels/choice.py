"""Which form of a kernel runs: Triton's, or the reference in PyTorch. By the tensors, in one place.

On a GPU, numbers of 16 bits go through Triton, wherever it has the shape; float32 goes through the
reference, which is what float32 is asked for. One environment variable overrides that:
LONGWING_KERNELS=reference for a GPU's results without Triton, =triton to have Triton on the CPU too
(through its interpreter, for tests).

Triton is imported when first chosen: a CPU needs none.
"""

import os

import torch
from torch import Tensor

from longwing.kernels.pages import KVPages

_HALVES = (torch.float16, torch.bfloat16)


def is_for_triton(x: Tensor) -> bool:
    """Whether Triton's form runs where it does the same to the last bit, in any number type."""
    word = os.environ.get("LONGWING_KERNELS", "auto")
    return word != "reference" and (x.is_cuda or word == "triton")


def chooses_triton(x: Tensor) -> bool:
    """Whether activations like these go through Triton."""
    return x.dtype in _HALVES and is_for_triton(x)


def attends_in_triton(q_TNH: Tensor, pages: KVPages) -> bool:
    """Whether attention over these pages does; heads and pages of odd sizes do not."""
    head_dim, page_len = q_TNH.shape[-1], pages.page_len
    fits = head_dim % 16 == 0 and head_dim <= 256 and page_len >= 16
    return fits and page_len & (page_len - 1) == 0 and chooses_triton(q_TNH)
