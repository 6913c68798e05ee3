"""How a GGUF file spells rotary positions, turned into what config.json says of them.

llama.cpp has three spellings: a base alone; `rope.scaling.*` keys for linear and yarn; and a tensor
`rope_freqs.weight` of one divisor a pair, which is how Llama 3.1's method is stored: its parameters
are lost, and are found again here by trying the published ones. What cannot be said in config.json
without guessing is refused.

Shapes: F frequencies, half of the head dimension.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from longwing.convert.gguf_file import GgufFile
from longwing.errors import ConfigError
from longwing.rope import RopeConfig, frequencies

ROPE_FREQS = "rope_freqs.weight"

LLAMA3_TRAINED_LEN = 8192
"""With low and high of 1 and 4: what every published Llama 3.1 to 3.3 states; factors vary."""

MAX_CONTEXT = 2**24

# Settings that change the arithmetic in a way config.json cannot say alike, and where they do not.
_NEUTRAL: Mapping[str, float] = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.alpha": 0.0,
    "rope.scale_linear": 1.0,
}

KEYS = frozenset(
    {
        *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "context_length"),
        *_NEUTRAL,
    }
)
"""The keys read here, without the architecture in front."""


def rope_settings(file: GgufFile, architecture: str, head_dim: int) -> dict[str, object]:
    """The rotary entries of config.json, in both dialects, max_position_embeddings among them.

    Raises:
        ConvertError: heads rotate in part only, a method other than linear, yarn or Llama 3.1's, or
            a value out of bounds.
    """
    prefix = architecture + "."
    rotary_dim = file.integer(prefix + "rope.dimension_count", low=1, high=4096, default=head_dim)
    if rotary_dim != head_dim:
        raise file.refusal(
            f"is {rotary_dim}, but heads have {head_dim} dimensions; heads that rotate only in "
            "part are not supported",
            part=prefix + "rope.dimension_count",
        )
    for key, neutral in _NEUTRAL.items():
        value = file.number(prefix + key, low=-1e30, high=1e30, default=neutral)
        if value != neutral:
            raise file.refusal(f"is {value:g}; only {neutral:g} is supported", part=prefix + key)
    try:
        rope = _from_keys(file, prefix, head_dim)
        return (_from_divisors(file, rope) if ROPE_FREQS in file.tensors else rope).to_hf()
    except ConfigError as fault:
        raise file.refusal(f"its rotary settings are not acceptable: {fault}") from fault


def _from_keys(file: GgufFile, prefix: str, head_dim: int) -> RopeConfig:
    context = file.integer(prefix + "context_length", low=1, high=MAX_CONTEXT)
    theta = file.number(prefix + "rope.freq_base", low=1, high=1e15, default=10000.0)
    factor = file.number(prefix + "rope.scaling.factor", low=0, high=1e6, default=0.0)
    # llama.cpp's own defaults: a factor without a type is linear, and a factor of 0 means none.
    method = file.text(prefix + "rope.scaling.type", default="linear")
    if method == "none" or (method == "linear" and factor in (0, 1)):
        return RopeConfig(
            method="default", head_dim=head_dim, theta=theta, trained_len=context, max_len=context
        )
    if method == "linear":
        return RopeConfig(
            method="linear",
            head_dim=head_dim,
            theta=theta,
            trained_len=context,
            max_len=_stretched(context, factor),
            factor=factor,
        )
    if method == "yarn":
        key = prefix + "rope.scaling.original_context_length"
        trained_len = file.integer(key, low=1, high=MAX_CONTEXT, default=context)
        fast, slow = prefix + "rope.scaling.yarn_beta_fast", prefix + "rope.scaling.yarn_beta_slow"
        return RopeConfig(
            method="yarn",
            head_dim=head_dim,
            theta=theta,
            trained_len=trained_len,
            max_len=_stretched(trained_len, factor),
            factor=factor,
            beta_fast=file.number(fast, low=0, high=1e6, default=32.0),
            beta_slow=file.number(slow, low=0, high=1e6, default=1.0),
        )
    raise file.refusal(
        f"is {method!r}; none, linear and yarn are supported", part=prefix + "rope.scaling.type"
    )


def _stretched(trained_len: int, factor: float) -> int:
    """Whole tokens; the tiny addend keeps 1000 * 2.2 from ending below 2200."""
    return int(trained_len * factor + 1e-6)


def _from_divisors(file: GgufFile, plain: RopeConfig) -> RopeConfig:
    """The llama3 settings whose frequencies are those of `plain` over the tensor's divisors."""
    entry = file.tensors[ROPE_FREQS]
    if plain.method != "default":
        raise file.refusal(f"comes with {plain.method} scaling, one too many", part=ROPE_FREQS)
    if entry.shape != (plain.head_dim // 2,):
        raise file.refusal(
            f"has shape {entry.shape}; ({plain.head_dim // 2},) is needed", part=ROPE_FREQS
        )
    divisor_F = file.read(entry, torch.float32).double()
    if bool((divisor_F == 1).all()):
        return plain
    # The slowest pair is slowed by the whole factor, as far as any is.
    factor = divisor_F[-1].item()
    candidate = RopeConfig(
        method="llama3",
        head_dim=plain.head_dim,
        theta=plain.theta,
        trained_len=LLAMA3_TRAINED_LEN,
        max_len=plain.max_len,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    if not _same(divisor_F, plain, candidate):
        raise file.refusal(
            "slows pairs in a way that Llama 3.1's method, with its published borders, does not",
            part=ROPE_FREQS,
            remedy="convert from the original model's folder instead",
        )
    return candidate


def _same(divisor_F: Tensor, plain: RopeConfig, candidate: RopeConfig) -> bool:
    """Whether `candidate` gives the divisors in the file, which are float32."""
    plain_F, _ = frequencies(plain, plain.max_len)
    slowed_F, _ = frequencies(candidate, candidate.max_len)
    return torch.allclose(plain_F / slowed_F, divisor_F, rtol=1e-5, atol=0)
