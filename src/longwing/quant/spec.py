"""`QuantSpec`: what is to be done to a model's linear layers, checked before any work.

Says nothing of calibration text or files. A field's help stands in its metadata, once:
command-line options can be made from it. To add a setting, add a field.
"""

import reprlib
from dataclasses import dataclass, field
from typing import Any

from longwing.errors import ConfigError
from longwing.kernels.wna16 import BITS

METHODS = ("rtn", "gptq", "gptaq", "qronos")
"""Round to nearest; error feedback; and two that also correct what earlier layers did wrong."""

GRIDS = ("minmax", "mse")

ROTATIONS = ("none", "heads", "full")
"""What is turned before quantising; `rotation.py` says how."""

_USUAL_GROUPS = (1024, 512, 256, 128, 64, 32)


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How to quantise; all but `rotate` is the solver's. Change it with `dataclasses.replace`.

    Raises:
        ConfigError: a value of the wrong type or out of bounds.
    """

    bits: int = _setting(4, "bits of one weight: 2, 3, 4 or 8")
    group_size: int = _setting(128, "input features that share a scale; -1: all of them")
    sym: bool = _setting(True, "fix the zero point at mid-range; most fast kernels need it")
    method: str = _setting(
        "qronos",
        "rtn: round to nearest; gptq: spread each rounding error over weights still to be rounded; "
        "gptaq and qronos: also make up for the drift of this layer's input since full precision, "
        "qronos better",
    )
    grid: str = _setting(
        "mse",
        "scales that cover the whole range (minmax), or that cost the least output error (mse)",
    )
    act_order: bool = _setting(True, "round the most excited input features first")
    static_groups: bool = _setting(
        True, "fit all scales before rounding, so that groups stay in natural order"
    )
    refits: int = _setting(
        0, "rounds of fitting all scales again, to the values that rounding met, and rounding anew"
    )
    sweeps: int = _setting(
        0,
        "turns of coordinate descent at the end: each scale, then each weight, given the others; "
        "at 2 bits one refit and two sweeps are worth their time",
    )
    damp_percent: float = _setting(
        0.05,
        "fraction of the Hessian's mean diagonal that is added to it; raised by itself where the "
        "factorisation fails",
    )
    correction: float = _setting(
        0.5,
        "share of the input drift that gptaq and qronos make up for, 0 to 1; all of it fits the "
        "calibration text best and others worse",
    )
    rotate: str = _setting(
        "none",
        "turn the dense model first, which changes nothing but how it rounds: full, for the Llama "
        "family, loses less at all bits, but adapters of the dense model no longer fit, and a tied "
        "output head becomes a matrix of its own; heads turns each head's values alone",
    )
    block_size: int = _setting(128, "columns rounded between two updates of the remaining ones")

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("method", self.method, METHODS)
        _check_choice("grid", self.grid, GRIDS)
        _check_choice("rotate", self.rotate, ROTATIONS)
        for name in ("sym", "act_order", "static_groups"):
            if type(getattr(self, name)) is not bool:
                raise _refusal(name, getattr(self, name), "true or false is needed")
        if type(self.group_size) is not int or not (self.group_size == -1 or self.group_size > 0):
            raise _refusal("group_size", self.group_size, "-1 or a number above 0 is needed")
        for name, least in (("refits", 0), ("sweeps", 0), ("block_size", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise _refusal(name, getattr(self, name), f"a number from {least} is needed")
        if not _is_number(self.damp_percent) or not 0 <= self.damp_percent < 1:
            raise _refusal("damp_percent", self.damp_percent, "0 to below 1 is needed")
        if not _is_number(self.correction) or not 0 <= self.correction <= 1:
            raise _refusal("correction", self.correction, "0 to 1 is needed")
        if self.correction != QuantSpec.correction and not self.needs_drift:
            raise _refusal("correction", self.correction, f"{self.method} corrects no drift")

    @property
    def desc_act(self) -> bool:
        """What `desc_act` must say in the folder: rows are in groups that are no runs of K."""
        permutes = self.act_order and self.method != "rtn"
        return permutes and not self.static_groups and self.group_size != -1

    @property
    def needs_drift(self) -> bool:
        """The method needs full-precision activations beside the quantised model's."""
        return self.method in ("gptaq", "qronos")

    def num_groups(self, in_features: int) -> int:
        """G of a layer with `in_features` inputs."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def check_layer(self, in_features: int, out_features: int) -> None:
        """Refuse a layer that these settings cannot hold; to be asked before any work.

        Args:
            in_features: K.
            out_features: N; zero points are packed along it when written to a file.

        Raises:
            ConfigError: the group size does not divide K, or K or N values of this width do not
                fill whole 32-bit words.
        """
        if self.group_size != -1 and in_features % self.group_size:
            fitting = [str(size) for size in _USUAL_GROUPS if in_features % size == 0]
            raise ConfigError(
                f"group size {self.group_size} does not divide {in_features} input features",
                remedy=f"take {' or '.join([*fitting, '-1'])}",
            )
        for features, side in ((in_features, "input"), (out_features, "output")):
            if features * self.bits % 32:
                raise ConfigError(
                    f"{features} {side} features of {self.bits} bits do not fill whole 32-bit "
                    "words, which is all that the format can hold",
                    remedy="leave this layer unquantised, or take other bits",
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    # True == 1 and 4.0 == 4: the type must match too.
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise _refusal(name, value, f"one of {', '.join(map(str, known))} is needed")


def _refusal(name: str, value: object, limit: str) -> ConfigError:
    return ConfigError(f"{name} is {reprlib.repr(value)}; {limit}")
