"""`After`: what a product by streamed weights goes through on its way out.

Shape key: T tokens, N out features, padding counted.
"""

from dataclasses import dataclass

from torch import Tensor

from longwing.kernels.digits import Digits
from longwing.kernels.norm_fold import FoldedNorm, Scaled


@dataclass(frozen=True, kw_only=True)
class After:
    """See `packed_matmul`; scaled is where a sum leaves what the norms after it need, if any."""

    bias_N: Tensor | None = None
    norm: FoldedNorm | None = None
    act: str = ""
    more_TN: Tensor | None = None
    arrange: bool = False
    digits: Digits | None = None
    scaled: Scaled | None = None
