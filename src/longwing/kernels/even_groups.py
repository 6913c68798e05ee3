"""`even_groups`: a packed matrix whose groups are of any size, as one of equal groups in order.

Act-order leaves a rank's run of inputs with some of every group, 61 of one and 70 of the next. A
kernel that streams weights takes one scale for a fixed number of inputs. So inputs are sorted by
group, and each group is filled up with inputs whose weight is 0.

Shape key: K in features, N out features, G groups; E inputs of the result, U its groups.

The cost is what fills: with groups of 128 and two ranks a group has about 64 inputs and comes to
about 80, a quarter more bytes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longwing.kernels.wna16 import PackedWeight, pack, unpack

SIZES = (128, 64, 32)
"""Groups that a streamed cell knows, see `streamed.py`; of equal results the first is best."""

VALUES_AT_ONCE = 2**23
"""Weights repacked at once; each takes some 20 bytes while it is."""


def even_groups(weight: PackedWeight) -> tuple[PackedWeight, Tensor]:
    """The same matrix with its inputs in another order, and filled up; on the weight's device.

    Returns:
        The weight, (E, N) without a g_idx, and order_E: (E,) int64, which input of the given weight
        each of its inputs is. What fills has weight 0, whichever input it is given:
        x[:, order_E] @ result is x @ weight.
    """
    group_K = weight.group_of_row_K()
    counts_G = group_K.bincount(minlength=len(weight.scales_GN))
    size = min(SIZES, key=lambda size: int(_runs(counts_G, size).sum()) * size)
    runs_G = _runs(counts_G, size)
    group_U = torch.arange(len(counts_G), device=group_K.device).repeat_interleave(runs_G)
    group_E = group_U.repeat_interleave(size)
    # A group's inputs come first in its runs; the rest of the last run fills.
    starts_G = (runs_G.cumsum(0) - runs_G) * size
    place_E = torch.arange(len(group_E), device=group_K.device) - starts_G[group_E]
    real_E = place_E < counts_G[group_E]
    order_E = torch.zeros_like(group_E)
    order_E[real_E] = group_K.argsort(stable=True)
    zeros_UN = weight.zeros_GN[group_U]
    words = []
    step = max(VALUES_AT_ONCE // len(order_E), 1)
    for start in range(0, weight.out_features, step):
        columns = slice(start, start + step)
        q_EN = unpack(weight.qweight_WN[:, columns].contiguous(), weight.bits, 0)[order_E]
        zeros_EN = zeros_UN[:, columns].repeat_interleave(size, 0)
        words.append(pack(torch.where(real_E[:, None], q_EN, zeros_EN), weight.bits, 0))
    evened = replace(
        weight,
        group_size=size,
        qweight_WN=torch.cat(words, 1),
        zeros_GN=zeros_UN,
        scales_GN=weight.scales_GN[group_U],
        g_idx_K=None,
    )
    return evened, order_E


def _runs(counts_G: Tensor, size: int) -> Tensor:
    """(G,) how many groups of `size` each becomes."""
    return (counts_G + size - 1) // size
