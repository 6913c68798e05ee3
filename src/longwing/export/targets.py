"""What each engine loads, as data: `Target`, and the table of them.

Everything here was read in the engine's own loader at the version named, never measured; a verdict
is as old as that version. The rules that use the table are in `verdict.py`.

- vLLM: `layers/quantization/auto_gptq.py` and `gptq_utils.py`, `kernels/linear/mixed_precision/
  marlin.py` (shapes are padded), `layers/rotary_embedding/`, `models/falcon.py`, `models/llama.py`.
- SGLang, the released wheel: `layers/quantization/gptq/`, `kernels/jit/csrc/gemm/marlin/` (shapes
  are not padded), `layers/rotary_embedding/factory.py`, `models/` (no Falcon; windows not read),
  `models/transformers.py` (its way round refuses classes without attention back ends: Falcon's).
- transformers: `models/falcon`, `utils/quantization_config.py`, `modeling_rope_utils.py`; packed
  weights go through optimum and gptqmodel, which must be installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from longwing.models import ModelConfig


class Level(IntEnum):
    """How well a folder does in an engine; the worst of its findings decides."""

    LOADS = 0
    SLOWLY = 1
    NOT = 2

    @property
    def words(self) -> str:
        """For people."""
        return ("loads", "loads slowly", "does not load")[self]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about a folder that an engine's loader would notice, or should have.

    Attributes:
        level: LOADS for a remark.
        what: a sentence.
    """

    level: Level
    what: str


def remark(what: str) -> Finding:
    """Something to know."""
    return Finding(level=Level.LOADS, what=what)


def stop(what: str) -> Finding:
    """A reason not to load."""
    return Finding(level=Level.NOT, what=what)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine.

    Attributes:
        name: as on the command line.
        version: of which its loader was read.
        families: families of `ModelConfig` that it has.
        widths: bits that it multiplies with; symmetric ones only, if `fixed_zeros`.
        fixed_zeros: it never reads zero points, and takes the middle for granted.
        group_sizes: those its kernels know; None is any that divides K.
        act_order: it reads a g_idx that is not in order.
        tile: (k, n) pairs, one of which must divide a layer's (K, N); () if shapes are padded or
            do not matter.
        rope: methods that give the same rotations there, by the fields it reads. ntk is written as
            a plain base and needs no entry.
        fuses: q, k, v and gate, up become one matrix there, so their settings must agree.
    """

    name: str
    version: str
    families: tuple[str, ...]
    widths: tuple[int, ...]
    fixed_zeros: bool
    group_sizes: tuple[int, ...] | None
    act_order: bool
    tile: tuple[tuple[int, int], ...]
    rope: tuple[str, ...]
    fuses: bool

    def model_findings(self, config: ModelConfig) -> list[Finding]:
        """What its model classes do not build."""
        found = []
        if config.family not in self.families:
            found.append(f"{self.name} {self.version} has no model class for {config.model_type}")
        elif self.name != "transformers":
            found += _plain_classes(self, config)
        if self.name == "sglang" and config.family == "llama":
            found += _sglang_llama(config)
        return [stop(what) for what in found]


def _plain_classes(target: Target, config: ModelConfig) -> list[str]:
    """Settings that transformers' classes read and the engines' own classes do not."""
    found = []
    if config.family == "falcon" and config.mlp_size != 4 * config.hidden_size:
        found.append(
            f"{target.name} builds Falcon's MLP {4 * config.hidden_size:,} wide, four times the "
            f"model; this one is {config.mlp_size:,}"
        )
    usual = "gelu" if config.family == "falcon" else "silu"
    if config.activation != usual:
        found.append(
            f"{target.name} builds {config.model_type} with {usual}; this one has "
            f"{config.activation}"
        )
    windows = {window for window in config.windows if window is not None}
    if (
        target.name == "vllm"
        and config.model_type == "qwen2"
        and windows
        and None in config.windows
    ):
        found.append("vllm refuses qwen2 with a sliding window in some layers only")
    return found


def _sglang_llama(config: ModelConfig) -> list[str]:
    found = []
    if config.mlp_bias:
        found.append("sglang drops the biases of the MLP without a word")
    if any(window is not None and window < config.context for window in config.windows):
        found.append("sglang's class reads no sliding window: answers differ beyond it")
    return found


_STATIC_ROPE = ("default", "linear", "yarn", "llama3", "longrope")

TARGETS: Mapping[str, Target] = {
    "vllm": Target(
        name="vllm",
        version="0.33",
        families=("falcon", "llama"),
        widths=(4, 8),
        fixed_zeros=True,
        group_sizes=(128, 64, 32, -1),
        act_order=False,
        tile=(),
        rope=_STATIC_ROPE,
        fuses=True,
    ),
    "sglang": Target(
        name="sglang",
        version="0.5.23",
        families=("llama",),
        widths=(4, 8),
        fixed_zeros=True,
        group_sizes=(128, 64, 32, -1),
        act_order=True,
        tile=((128, 64), (64, 128)),
        rope=_STATIC_ROPE,
        fuses=True,
    ),
    "transformers": Target(
        name="transformers",
        version="5.23",
        families=("falcon", "llama"),
        widths=(2, 3, 4, 8),
        fixed_zeros=False,
        group_sizes=None,
        act_order=True,
        tile=(),
        rope=(*_STATIC_ROPE, "dynamic"),
        fuses=False,
    ),
}
"""By the name that --target takes."""
