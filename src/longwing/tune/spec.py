"""`TuneSpec`: the settings of a tuning run, checked once; and the learning rate that follows."""

import math
from dataclasses import dataclass, field

from longwing.errors import RequestError

MAX_CONTEXT = 2**24


@dataclass(frozen=True, kw_only=True)
class TuneSpec:
    """How to tune. Each field's help says what it is; the model's own matters stand elsewhere.

    Raises:
        RequestError: a value out of its range, or two that contradict each other.
    """

    full: bool = field(
        default=False, metadata={"help": "Train all weights; without it, a LoRA adapter."}
    )
    rank: int = field(default=16, metadata={"help": "LoRA: rank of the adapter."})
    alpha: float = field(
        default=32.0, metadata={"help": "LoRA: its output is scaled by alpha / rank."}
    )
    targets: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "LoRA: layers to adapt, by the last part of their name (query_key_value); "
            "repeatable. Without it: every linear of every block."
        },
    )
    batch: int = field(default=8, metadata={"help": "Rows an optimiser step is made of."})
    row: int = field(
        default=0,
        metadata={
            "help": "Tokens of a row, which documents are packed into; 0 is the context. One row "
            "is in the model at a time."
        },
    )
    epochs: float = field(default=1.0, metadata={"help": "Times to go through the data."})
    steps: int = field(
        default=0, metadata={"help": "Optimiser steps to stop after; 0: as epochs say."}
    )
    lr: float = field(
        default=0.0,
        metadata={"help": "Peak learning rate; 0: 2e-4 for an adapter, 1e-5 for all weights."},
    )
    warmup: int = field(default=20, metadata={"help": "Steps in which the rate rises to its peak."})
    final_lr: float = field(
        default=0.1, metadata={"help": "What is left of the peak at the end of the cosine."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices alone."})
    clip: float = field(
        default=1.0, metadata={"help": "Longest gradient; longer ones are cut. 0: never."}
    )
    prompt_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of a prompt's tokens in the loss, beside 1 for an answer's."},
    )
    save_every: int = field(
        default=50, metadata={"help": "Steps between two saves of the state, to go on from."}
    )
    seed: int = field(default=0, metadata={"help": "Orders the data, and begins the adapter."})

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "rank": (1, 4096),
            "alpha": (1e-6, 1e6),
            "batch": (1, 2**16),
            "row": (0, MAX_CONTEXT),
            "epochs": (1e-6, 1e6),
            "steps": (0, 2**31),
            "lr": (0, 1),
            "warmup": (0, 2**31),
            "final_lr": (0, 1),
            "weight_decay": (0, 10),
            "clip": (0, 1e6),
            "prompt_weight": (0, 1),
            "save_every": (1, 2**31),
            "seed": (0, 2**63),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                flag = name.replace("_", "-")
                raise RequestError(f"{flag} is {value}; it must lie between {low:g} and {high:g}")
        if self.full and self.targets:
            raise RequestError("targets choose what an adapter adapts; with full there is none")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, the default filled in."""
        return self.lr or (1e-5 if self.full else 2e-4)

    def lr_at(self, step: int, num_steps: int) -> float:
        """The learning rate of step 0 … num_steps - 1: a line up, then half a cosine down."""
        warmup = min(self.warmup, num_steps)
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        part = (step - warmup) / max(num_steps - warmup, 1)
        falling = 0.5 * (1 + math.cos(math.pi * part))
        return self.peak_lr * (self.final_lr + (1 - self.final_lr) * falling)
