"""One config.json for each method, as found in the wild, for the tests beside this file."""

from dataclasses import dataclass
from typing import Any

from longwing.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class Example:
    head_dim: int
    max_position: int
    theta: float
    scaling: dict[str, Any]
    lengths: tuple[int, ...]
    """Served lengths worth comparing, on both sides of every border."""

    @property
    def new(self) -> dict[str, Any]:
        """config.json's entries in the dialect of transformers 5."""
        return {"rope_parameters": {"rope_theta": self.theta, **self.scaling}}

    @property
    def old(self) -> dict[str, Any]:
        """The same in the dialect before it."""
        return {"rope_theta": self.theta, "rope_scaling": self.scaling}

    def config(self, raw: dict[str, Any] | None = None) -> RopeConfig:
        raw = self.new if raw is None else raw
        return RopeConfig.from_hf(raw, head_dim=self.head_dim, max_position=self.max_position)


_SHORT = [1.0 + 0.01 * i for i in range(48)]
_LONG = [1.0 + 0.9 * i for i in range(48)]
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _yarn(max_position: int = 131072, **more: Any) -> Example:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return Example(
        head_dim=128,
        max_position=max_position,
        theta=1e6,
        scaling=scaling | more,
        lengths=(1, 131072),
    )


def _longrope(**more: Any) -> Example:
    return Example(
        head_dim=96,
        max_position=131072,
        theta=1e4,
        scaling={
            "rope_type": "longrope",
            "short_factor": _SHORT,
            "long_factor": _LONG,
            "original_max_position_embeddings": 4096,
            **more,
        },
        lengths=(1, 4096, 4097, 131072),
    )


def _plain(lengths: tuple[int, ...] = (1, 2048, 24576), **scaling: Any) -> Example:
    return Example(head_dim=64, max_position=2048, theta=1e4, scaling=scaling, lengths=lengths)


EXAMPLES: dict[str, Example] = {
    "default": _plain(rope_type="default"),
    "linear": _plain(rope_type="linear", factor=4),
    "dynamic": _plain((1, 2048, 2049, 3000, 24576), rope_type="dynamic", factor=2.0),
    "dynamic, factor 1": _plain((1, 2048, 2049, 12001), rope_type="dynamic", factor=1.0),
    "yarn": _yarn(),
    "yarn, max_position unmultiplied": _yarn(max_position=32768),
    "yarn, fractional borders": _yarn(truncate=False, beta_fast=24.0, beta_slow=2.0),
    "yarn, own attention": _yarn(attention_factor=1.25),
    "yarn, mscale": _yarn(mscale=1.0, mscale_all_dim=0.707),
    "llama3": Example(
        head_dim=128,
        max_position=131072,
        theta=5e5,
        scaling={"rope_type": "llama3", **_LLAMA3},
        lengths=(1, 131072),
    ),
    "longrope": _longrope(),
    "longrope, own factor": _longrope(factor=16.0),
    "longrope, own attention": _longrope(attention_factor=1.1),
}
"""What transformers knows too."""

OURS: dict[str, Example] = {
    "ntk": _plain(rope_type="ntk", alpha=4.0),
    "falconlite": Example(
        head_dim=64,
        max_position=24576,
        theta=1e4,
        scaling={"rope_type": "falconlite", "original_max_position_embeddings": 2048},
        lengths=(1, 2048, 2049, 24576),
    ),
}
"""What it does not."""

ALL = EXAMPLES | OURS
