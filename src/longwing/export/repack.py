"""The same values in another packed form: wider, symmetric, in smaller groups. Exact.

Shape key: K in features, N out features, G groups, W 32-bit words.

The one idea: w = scale * (q - zero) depends on q - zero alone. A wider q can take the difference
with its zero point in the middle, and a group may be cut into equal parts that repeat its scale. So
a 3-bit or asymmetric model, for which most engines have lost their kernels, is a symmetric 4- or
8-bit model too, value for value; it is larger, and no better.
"""

import torch

from longwing.errors import ConfigError
from longwing.export.facts import tiles
from longwing.kernels import PackedWeight
from longwing.kernels.wna16 import pack


def repack(weight: PackedWeight, bits: int, group_size: int) -> PackedWeight:
    """The layer with symmetric zero points at `bits` and groups of `group_size`.

    Args:
        weight: the layer; with a g_idx its groups must stay as they are.
        bits: as wide as the layer's own width, or wider.
        group_size: the layer's own, or a size that divides it and K; -1 only if it is -1.

    Raises:
        ConfigError: the values do not fit, or the groups cannot be cut that way.
    """
    K, N = weight.in_features, weight.out_features
    own = K if weight.group_size == -1 else weight.group_size
    new = K if group_size == -1 else group_size
    if new != own and (weight.g_idx_K is not None or own % new or K % new):
        raise ConfigError(
            f"groups of {weight.group_size} cannot be cut into groups of {group_size}"
        )
    group_K, middle = weight.group_of_row_K(), 2 ** (bits - 1)
    qweight_WN = torch.empty(K * bits // 32, N, dtype=torch.int32)
    for rows, q_RN in tiles(weight.qweight_WN, weight.bits):
        zeros_RN = weight.zeros_GN[group_K[rows]].to(torch.int16)
        shifted_RN = q_RN.to(torch.int16) - zeros_RN + middle
        lowest, highest = int(shifted_RN.min()), int(shifted_RN.max())
        if lowest < 0 or highest >= 2**bits:
            raise ConfigError(
                f"values from {lowest - middle} to {highest - middle} scales do not fit {bits} "
                "symmetric bits"
            )
        words = slice(rows.start * bits // 32, rows.stop * bits // 32)
        qweight_WN[words] = pack(shifted_RN, bits, 0)
    scales_GN = weight.scales_GN
    if new != own:
        # Each new group lies inside one old group, the one of its first row.
        scales_GN = scales_GN[torch.arange(0, K, new) // own]
    zeros_GN = torch.full(scales_GN.shape, middle, dtype=torch.uint8)
    return PackedWeight(
        bits=bits,
        group_size=group_size,
        qweight_WN=qweight_WN,
        zeros_GN=zeros_GN,
        scales_GN=scales_GN.contiguous(),
        g_idx_K=weight.g_idx_K,
    )
