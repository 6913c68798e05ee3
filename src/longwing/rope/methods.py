"""One pure function per extension method: (settings, served length) -> (frequencies, scale).

Left to `tables`: positions, cos and sin. Each function holds its formula and its source; METHODS
at the foot is what config.json's `rope_type` chooses from.

Symbols as in the papers: d rotary dimensions, b base, s factor, L served length, L0 trained length.
Shapes: F frequencies, d / 2 of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from longwing.rope.config import RopeConfig


def frequencies(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """What the method of `cfg` makes of a sequence served at `length` tokens.

    Returns:
        inv_freq_F: (F,) float64 on the CPU, radians per token.
        attention_scale: multiplies cos and sin, so logits grow by its square.
    """
    return METHODS[cfg.method](cfg, length)


def default(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Plain RoPE: pair i turns by b^(-2i/d) a token (Su et al., arXiv:2104.09864)."""
    return _geometric(cfg.theta, cfg.head_dim), 1.0


def linear(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Position interpolation: every pair slowed by s (Chen et al., arXiv:2306.15595)."""
    return _geometric(cfg.theta, cfg.head_dim) / cast(float, cfg.factor), 1.0


def ntk(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Static NTK: base b * alpha^(d/(d-2)) at every length (bloc97, r/LocalLLaMA)."""
    return _geometric(cfg.base_at(length), cfg.head_dim), 1.0


def dynamic(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Dynamic NTK: base b * (s L/L0 - (s-1))^(d/(d-2)) beyond L0 (emozilla, r/LocalLLaMA)."""
    return _geometric(cfg.base_at(length), cfg.head_dim), 1.0


def falconlite(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """FalconLite's dynamic NTK: base b * (L / (alpha L0))^(d/(d-2)) beyond L0.

    With alpha 0.25 the base jumps fourfold one token past L0; that is the published formula. Its
    habit of changing the base at every decoded token is not reproduced. Source: awslabs/
    extending-the-context-length-of-open-source-llms, falconlite/script/layers.py, lines 365-449.
    """
    return _geometric(cfg.base_at(length), cfg.head_dim), 1.0


def yarn(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """YaRN: slow pairs slowed by s, fast ones kept, a blend between (arXiv:2309.00071).

    The attention scale is 0.1 ln s + 1; or the ratio of two such terms, which mscale and
    mscale_all_dim weigh; or attention_factor. Leaving it out costs accuracy, silently.
    """
    s = cast(float, cfg.factor)
    low, high = cfg.yarn_borders()
    pair_F = torch.arange(cfg.head_dim // 2, dtype=torch.float64, device="cpu")
    slowed_F = ((pair_F - low) / max(high - low, 0.001)).clamp(0, 1)
    theta_F = _geometric(cfg.theta, cfg.head_dim)
    scale = cfg.attention_factor
    if scale is None:
        top, bottom = cfg.mscale or 1.0, cfg.mscale_all_dim or 0.0
        scale = (0.1 * top * math.log(s) + 1) / (0.1 * bottom * math.log(s) + 1)
    return theta_F * (1 - slowed_F) + theta_F / s * slowed_F, float(scale)


def llama3(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Llama 3.1: pairs turning under low times in L0 slowed by s, over high kept, a blend between.

    The blend is linear in the number of turns (arXiv:2407.21783, and the published configs).
    """
    low, high = cast(float, cfg.low_freq_factor), cast(float, cfg.high_freq_factor)
    theta_F = _geometric(cfg.theta, cfg.head_dim)
    turns_F = cfg.trained_len * theta_F / (2 * math.pi)
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return theta_F * kept_F + theta_F / cast(float, cfg.factor) * (1 - kept_F), 1.0


def longrope(cfg: RopeConfig, length: int) -> tuple[Tensor, float]:
    """LongRoPE: a divisor per pair, from one list up to L0, from another beyond (arXiv:2402.13753).

    The attention scale sqrt(1 + ln s / ln L0), or attention_factor, holds on both sides of L0.
    """
    divisors = cfg.short_factor if length <= cfg.trained_len else cfg.long_factor
    divisor_F = torch.tensor(divisors, dtype=torch.float64, device="cpu")
    scale = cfg.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(cast(float, cfg.factor)) / math.log(cfg.trained_len))
    return _geometric(cfg.theta, cfg.head_dim) / divisor_F, float(scale)


def _geometric(base: float, head_dim: int) -> Tensor:
    """base^(-2i/d) for i = 0 ... d/2 - 1, (F,) float64."""
    exponent_F = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    return float(base) ** -exponent_F


METHODS: Mapping[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": default,
    "linear": linear,
    "ntk": ntk,
    "dynamic": dynamic,
    "falconlite": falconlite,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
}
