"""`RopeConfig`: rotary settings, checked once, read from config.json and written back to it.

What the settings do to frequencies is left to `methods`.

The idea to know before reading on: config.json has two dialects. transformers 5 writes an object
`rope_parameters`; before it there were `rope_scaling` and a top-level `rope_theta`. Programs differ
in which they heed, so a file with both must say the same twice, and we write both. What is not
understood is refused, never skipped: a setting skipped here is a model that is worse, silently.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from longwing.errors import ConfigError

LONGEST = 2**30
"""No length above this is believed; it keeps every formula finite, with room to spare."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The rotary settings of one model. `MEANING` says what each field means.

    `max_len` follows the habits of config.json's readers: trained_len * factor for linear, dynamic
    and yarn; max_position_embeddings for the others. It is what the settings claim, not a limit:
    `ladder` serves what it is asked to, and `explain` says when that goes beyond the claim.

    A parameter that the method does not use must stay None. What `DEFAULTS` holds is filled in, so
    that two configs which mean the same are equal.

    Raises:
        ConfigError: a value is missing, unused, out of bounds or at odds with another.
    """

    method: str
    head_dim: int
    theta: float
    trained_len: int
    max_len: int
    factor: float | None = None
    alpha: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_method(self.method)
        for name, value in DEFAULTS.get(self.method, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if _check_count("head_dim", self.head_dim, high=4096) % 2:
            raise _refusal("head_dim", self.head_dim, "it must be even")
        _check_count("trained_len", self.trained_len)
        _check_count("max_len", self.max_len)
        _check_number("theta", self.theta)
        needs, may = PARAMETERS[self.method]
        for name in _EVERY_PARAMETER:
            value = getattr(self, name)
            if value is None:
                if name in needs:
                    raise _refusal(name, None, f"{self.method} needs it")
            elif name not in needs + may:
                uses = ", ".join(needs + may) or "theta"
                raise _refusal(name, value, f"{self.method} does not use it, only {uses}")
            else:
                _check_parameter(name, value, num_pairs=self.head_dim // 2)
        _check_together(self)

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, object],
        *,
        head_dim: int,
        max_position: int,
        default_theta: float = 10000.0,
    ) -> "RopeConfig":
        """Read the rotary settings out of a whole config.json. A null counts as absent.

        Args:
            raw: the parsed config.json.
            head_dim: dimensions of one head, all of which rotate.
            max_position: the file's max_position_embeddings, or the family's default.
            default_theta: the base if the file names none.

        Raises:
            ConfigError: as the class does; or a field is unknown, stated twice with different
                values, nested per layer type, or asks for heads that rotate only in part.
        """
        for key, value in raw.items():
            known = key in (*_DIALECTS, *_TOP_LEVEL) or value in (None, _NEUTRAL.get(key))
            if key.startswith(("rope_", "rotary_")) and not known:
                raise _refusal(key, value, "longwing does not know it")
        readings = [
            cls(**_parse(settings, head_dim, max_position, default_theta))
            for settings in _dialects(raw)
        ]
        new, old = readings[0], readings[-1]
        differing = [f"{name} ({a} / {b})" for name, a, b in _differences(new, old)]
        if differing:
            raise ConfigError(
                "rope_parameters / rope_scaling with rope_theta differ in " + ", ".join(differing),
                remedy="programs differ in which they read: make them equal, or remove one",
            )
        return new

    def to_hf(self) -> dict[str, Any]:
        """The entries of config.json that say this, in both dialects; `from_hf` reads them back.

        max_position_embeddings is among them: dynamic is measured from it, others are served up to
        it. ntk is written the way vLLM and SGLang read it (`dynamic` with `alpha`); falconlite goes
        by longwing's own name, which other programs refuse.

        Raises:
            ConfigError: config.json cannot say max_len (e.g. dynamic with another than
                trained_len * factor).
        """
        from_trained = self.method in ("linear", "dynamic")
        max_position = self.trained_len if from_trained else self.max_len
        rope: dict[str, Any] = {"rope_type": "dynamic" if self.method == "ntk" else self.method}
        for name in _EVERY_PARAMETER:
            value = getattr(self, name)
            if isinstance(value, tuple):
                rope[name] = [float(divisor) for divisor in value]
            elif value is not None:  # transformers complains of whole numbers
                rope[name] = value if isinstance(value, bool) else float(value)
        if self.method in _STATES_ORIGINAL or self.trained_len != max_position:
            rope["original_max_position_embeddings"] = self.trained_len
        old = None if self.method == "default" else {"type": rope["rope_type"], **rope}
        out: dict[str, Any] = {
            "max_position_embeddings": max_position,
            "rope_theta": float(self.theta),
            "rope_parameters": {**rope, "rope_theta": float(self.theta)},
            "rope_scaling": old,  # with `type` too, the only name that readers of 2023 know
        }
        if self.method == "longrope":  # transformers 4 looks for this one at the top only
            out["original_max_position_embeddings"] = self.trained_len
        back = self.from_hf(out, head_dim=self.head_dim, max_position=max_position)
        if back != self:
            limit = f"config.json can only say {back.max_len} for {self.method} at this factor"
            raise _refusal("max_len", self.max_len, limit)
        return out

    def base_at(self, length: int) -> float:
        """The base for a sequence served at `length` tokens: theta, unless the method moves it.

        The methods that move it (ntk, dynamic, falconlite) do nothing else, so method `default`
        with this theta gives the same frequencies: that is how one length is baked into a file for
        programs that know no extension.
        """
        b, d, L, L0 = self.theta, self.head_dim, length, self.trained_len
        if self.method == "ntk":
            stretch = cast(float, self.alpha)
        elif self.method == "dynamic" and L > L0:
            s = cast(float, self.factor)
            stretch = s * L / L0 - (s - 1)
        elif self.method == "falconlite" and L > L0:
            stretch = L / (cast(float, self.alpha) * L0)
        else:
            return float(b)
        return float(b * stretch ** (d / (d - 2)))

    def yarn_borders(self) -> tuple[float, float]:
        """The pairs between which yarn blends: they turn beta_fast and beta_slow times in L0."""
        b, d, L0 = self.theta, self.head_dim, self.trained_len

        def pair_turning(times: float) -> float:
            return d * math.log(L0 / (2 * math.pi * times)) / (2 * math.log(b))

        low = pair_turning(cast(float, self.beta_fast))
        high = pair_turning(cast(float, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, d - 1)


# What config.json may say about rotation.

_DIALECTS = ("rope_parameters", "rope_scaling")
_TOP_LEVEL = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
_STATES_ORIGINAL = ("yarn", "llama3", "longrope", "falconlite")

# Fields that change the arithmetic, and the one value at which they do not (SmolLM2 has it).
_NEUTRAL: Mapping[str, object] = {"rope_interleaved": False, "rope_interleave": False}

# Fields that change nothing: with `finetuned` YaRN's authors note whether weights were tuned.
_HARMLESS = ("finetuned",)


def _dialects(raw: Mapping[str, object]) -> list[dict[str, object]]:
    """The settings by each dialect present, top-level fields folded in; nulls left out."""
    beside = {key: raw[key] for key in _TOP_LEVEL if raw.get(key) is not None}
    found = []
    for dialect in _DIALECTS:
        inner = raw.get(dialect)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise _refusal(dialect, inner, 'it must be an object such as {"rope_type": "default"}')
        for key, value in inner.items():
            if isinstance(value, Mapping):
                limit = "settings per layer type are not supported: all layers must rotate alike"
                raise _refusal(f"{dialect}.{key}", value, limit)
            if None not in (value, beside.get(key)) and value != beside[key]:
                limit = f"{key} beside {dialect} is {reprlib.repr(beside[key])}: make them equal"
                raise _refusal(f"{dialect}.{key}", value, limit)
        found.append(beside | {key: value for key, value in inner.items() if value is not None})
    return found or [beside]


def _parse(
    settings: Mapping[str, object], head_dim: int, max_position: int, default_theta: float
) -> dict[str, Any]:
    """The fields of a RopeConfig by one dialect; the dataclass goes on to check their values."""
    for key, value in settings.items():
        if key not in _FIELDS:
            raise _refusal(key, value, "longwing does not know it")
    whole = settings.get("partial_rotary_factor", 1)
    if whole is True or whole != 1:
        raise _refusal("partial_rotary_factor", whole, "only whole heads rotate: it must be 1")
    method = _parse_method(settings)
    name = "original_max_position_embeddings"
    # FalconLite keeps 2048 in its code, not in its config.json.
    otherwise = 2048 if method == "falconlite" else max_position
    trained_len = _check_count(name, settings.get(name, otherwise))
    if method == "dynamic" and trained_len != max_position:
        limit = (
            f"dynamic is measured from max_position_embeddings ({max_position}): make them equal"
        )
        raise _refusal(name, trained_len, limit)
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in settings.items()
        if key in _EVERY_PARAMETER
    }
    if method in ("yarn", "longrope") and name in settings:
        given.setdefault("factor", max_position / trained_len)  # Phi-3 and DeepSeek leave it out
    max_len = max_position
    if method in ("linear", "dynamic", "yarn") and "factor" in given:
        # The tiny addend undoes the rounding of the division above.
        max_len = int(trained_len * _check_number("factor", given["factor"]) + 1e-6)
    theta = settings.get("rope_theta", default_theta)
    lengths = {"trained_len": trained_len, "max_len": max_len}
    return {"method": method, "head_dim": head_dim, "theta": theta, **lengths, **given}


def _differences(one: RopeConfig, other: RopeConfig) -> list[tuple[str, str, str]]:
    """(field, value, value) wherever two configs differ, values shortened."""
    pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in fields(RopeConfig))
    return [(name, reprlib.repr(a), reprlib.repr(b)) for name, a, b in pairs if a != b]


def _parse_method(settings: Mapping[str, object]) -> str:
    """The method that `rope_type` and its older name `type` agree on; without both, default."""
    named = [settings[key] for key in ("rope_type", "type") if key in settings] or ["default"]
    new, old = (_check_method("longrope" if x == "su" else x) for x in (named[0], named[-1]))
    if new != old:
        raise _refusal("rope_type", new, f"its older name, type, is {old!r}: make them equal")
    # vLLM and SGLang: `dynamic` with `alpha` is the static method, whatever its name says.
    return "ntk" if new == "dynamic" and "alpha" in settings else new


def _check_method(value: object) -> str:
    if not isinstance(value, str) or value not in PARAMETERS:
        raise _refusal("rope_type", value, f"it must be one of {', '.join(PARAMETERS)}")
    return value


def _check_number(name: str, value: object) -> float:
    low, high = _LIMITS[name]
    # The comparison refuses NaN, infinity and integers too large for a float as well.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _refusal(name, value, f"it must be a number from {low} to {high:,.0f}")
    return value


def _check_count(name: str, value: object, low: int = 2, high: int = LONGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refusal(name, value, f"it must be a whole number from {low} to {high:,}")
    return value


def _check_parameter(name: str, value: object, num_pairs: int) -> None:
    if name == "truncate":
        if not isinstance(value, bool):
            raise _refusal(name, value, "it must be true or false")
    elif name in ("short_factor", "long_factor"):
        if not isinstance(value, tuple) or len(value) != num_pairs:
            raise _refusal(name, value, f"it must be a list of {num_pairs} numbers")
        for number in value:
            _check_number(name, number)
    else:
        _check_number(name, value)


def _check_together(cfg: RopeConfig) -> None:
    """Refuse values that are fine one by one, but not beside each other."""
    if cfg.method in ("ntk", "dynamic", "falconlite") and cfg.head_dim == 2:
        raise _refusal("head_dim", 2, f"{cfg.method} needs 4 or more, for its d/(d-2)")
    if cfg.method in ("ntk", "falconlite") and cfg.base_at(cfg.trained_len + 1) <= 1:
        raise _refusal("alpha", cfg.alpha, f"theta {cfg.theta} would become a base of 1 or less")
    low, high = cfg.low_freq_factor, cfg.high_freq_factor
    if low is not None and high is not None and low >= high:
        raise _refusal("low_freq_factor", low, f"it must be below high_freq_factor ({high})")
    if cfg.method == "yarn":
        _check_yarn(cfg)


def _check_yarn(cfg: RopeConfig) -> None:
    if cast(float, cfg.beta_fast) < cast(float, cfg.beta_slow):
        limit = f"it must not be below beta_slow ({cfg.beta_slow})"
        raise _refusal("beta_fast", cfg.beta_fast, limit)
    if (cfg.mscale is None) != (cfg.mscale_all_dim is None):
        name = "mscale_all_dim" if cfg.mscale is None else "mscale"
        limit = "mscale and mscale_all_dim work only together: set both or neither"
        raise _refusal(name, getattr(cfg, name), limit)
    if cfg.mscale is not None and cfg.attention_factor is not None:
        raise _refusal("mscale", cfg.mscale, "attention_factor overrides it: set one of the two")
    low, high = cfg.yarn_borders()
    if low > high:  # here transformers' blend runs backwards, and the paper has none
        limit = f"at theta {cfg.theta} no pair turns between beta_slow and beta_fast times in it"
        raise _refusal("trained_len", cfg.trained_len, limit)


def _refusal(name: str, value: object, limit: str) -> ConfigError:
    """What, the value, the limit; and as remedy what the setting is for, if longwing knows."""
    shown = "missing" if value is None else reprlib.repr(value)
    label = name if name.startswith("rope_") else f"rope {name}"
    unknown = "it may change how positions rotate, so it is not ignored; remove it if it does not"
    meaning = MEANING.get(name.rpartition(".")[2], unknown)
    return ConfigError(f"{label} is {shown}, but {limit}", remedy=meaning)


# Registries.

MEANING: Mapping[str, str] = {
    "rope_type": "rope_type is the method that extends the context",
    "head_dim": "head_dim is how many dimensions of a head rotate, in pairs",
    "theta": "theta is the base: pair i turns by theta^(-2i/head_dim) radians a token",
    "trained_len": "trained_len is the length in tokens the model was trained at",
    "original_max_position_embeddings": "it is the length in tokens the model was trained at",
    "max_len": "max_len is the longest context in tokens that these settings claim",
    "factor": "factor is how many times trained_len the context becomes (not the same as alpha)",
    "alpha": "alpha (not the same as factor) stretches the base: ntk multiplies by it, falconlite"
    " divides by it, so there a smaller one stretches more",
    "attention_factor": "attention_factor multiplies cos and sin, in place of the method's rule",
    "beta_fast": "pairs that turn beta_fast times or more within trained_len are left alone",
    "beta_slow": "pairs that turn beta_slow times or less within trained_len are slowed by factor",
    "mscale": "mscale weighs ln(factor) in the numerator of the attention scale",
    "mscale_all_dim": "mscale_all_dim weighs ln(factor) in its denominator",
    "truncate": "truncate rounds the borders of the blend outwards to whole pairs",
    "low_freq_factor": "pairs that turn less often than this within trained_len are slowed",
    "high_freq_factor": "pairs that turn more often than this within trained_len are left alone",
    "short_factor": "short_factor holds one divisor per pair, used up to trained_len",
    "long_factor": "long_factor holds one divisor per pair, used beyond trained_len",
}
"""What each setting means: the tail of an error, and the text of `explain`."""

# Inclusive, and far wider than anything a model was made with; inside them no formula overflows.
_WIDE = (1e-6, 1e6)
_LIMITS: Mapping[str, tuple[float, float]] = {
    "theta": (1.000001, 1e15),
    "factor": (1.0, 1e6),
    **dict.fromkeys(("alpha", "attention_factor", "mscale", "mscale_all_dim"), _WIDE),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), _WIDE),
    **dict.fromkeys(("short_factor", "long_factor"), _WIDE),
}

DEFAULTS: Mapping[str, Mapping[str, float | bool]] = {
    "falconlite": {"alpha": 0.25},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}
"""Parameters that a method fills in when they are left out."""

PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "ntk": (("alpha",), ()),
    "dynamic": (("factor",), ()),
    "falconlite": (("alpha",), ()),
    "yarn": (
        ("factor", "beta_fast", "beta_slow", "truncate"),
        ("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("factor", "short_factor", "long_factor"), ("attention_factor",)),
}
"""Per method, the parameters it needs and those it may have. A new method begins here."""

_EVERY_PARAMETER = tuple(field.name for field in fields(RopeConfig))[5:]
_FIELDS = (*_EVERY_PARAMETER, *_TOP_LEVEL, *_HARMLESS, "rope_type", "type")
