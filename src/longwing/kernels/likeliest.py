"""`likeliest`: the token with the highest logit of each row, and whether a row has one at all.

Plain PyTorch, and the CPU's form; `step_triton.py` has the same as one launch.

Shape key: S rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longwing.kernels.choice import is_for_triton


class Likeliest(NamedTuple):
    """Of each row.

    Attributes:
        max_S: (S,) float32, the highest logit. Of a row that is not usable, any number.
        chosen_S2: (S, 2) int64: the token it belongs to, of equals the first; and 1 if the row is
            usable, that is, if it holds neither nan nor +inf and allows a token; else 0. The token
            is below V in any case.
    """

    max_S: Tensor
    chosen_S2: Tensor


def likeliest(logits_SV: Tensor) -> Likeliest:
    """The likeliest token of each row of (S, V) logits, in any floating-point type."""
    in_float32 = logits_SV.dtype != torch.float64
    if is_for_triton(logits_SV) and in_float32 and logits_SV.stride(1) == 1:
        from longwing.kernels import step_triton

        return step_triton.likeliest(logits_SV)
    max_S, id_S = logits_SV.max(dim=-1)  # nan, too, is a maximum
    return Likeliest(max_S.float(), torch.stack((id_S, max_S.isfinite().long()), dim=1))
