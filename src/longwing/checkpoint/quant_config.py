"""`QuantConfig`: how a GPTQ checkpoint was quantised, as its folder says it.

Holds the settings, the strict reader of the JSON dialects they come in (AutoGPTQ's, GPTQModel's,
Hugging Face's) and of the two places inside .safetensors files, and the writer of the one block
that loads everywhere. What the packed tensors must look like under these settings is `packed.py`.

The one idea: two numbers and one word decide the arithmetic of reading (`bits`, `group_size`,
`checkpoint_format`), and `desc_act` says whether rows are permuted. Those are read without mercy. A
key that would change the arithmetic in a way not built here is refused by name; every other key is
history of how the file was made, and is ignored.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longwing.checkpoint.paths import read_settings
from longwing.checkpoint.strict_json import show
from longwing.errors import ConfigError
from longwing.kernels.wna16 import BITS

MAX_GROUP_SIZE = 65_536
"""Few layers are wider; beyond it a number is taken for a mistake."""

FORMATS = ("gptq", "gptq_v2")
"""Zero points stored minus one (v1, AutoGPTQ's), or as they are (v2)."""

SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
"""Where settings are looked for before config.json, in this order."""

SCALAR_TENSORS = ("gptq_bits", "gptq_groupsize")
"""Where TGI's own quantiser puts the two numbers: tensors of one element."""

_OTHER = "fetch a GPTQ or an unquantised checkpoint of this model; longwing reads those two"
_SAVE_AGAIN = "save it again in format gptq or gptq_v2 with the tool that made it"


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the linear layers of a folder are quantised.

    Attributes:
        bits: width of one weight: 2, 3, 4 or 8.
        group_size: input features that share a scale, 1 to 65,536; -1 is all of them.
        sym: zero points were fixed at mid-range. Says nothing to a reader, who reads them anyway.
        desc_act: rows may belong to groups in any order (act-order), so `g_idx` decides.
        checkpoint_format: "gptq" (zero points stored minus one) or "gptq_v2" (stored as they are).
        lm_head: the output projection is quantised too.
        static_groups: groups were fitted before act-order, and its permutation undone.
        true_sequential: each sub-layer was calibrated on the quantised ones before it.
        damp_percent: dampening of the Hessian, a fraction; None when the folder does not say.
        dynamic: GPTQModel's rules, pattern -> settings that deviate; "-:" in front means not
            quantised.
        meta: who quantised it and on what; free-form.
        notes: what was assumed because the folder is silent, for people to read.

    Raises:
        ConfigError: a value of the wrong type or out of bounds.
    """

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    lm_head: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    damp_percent: float | None = None
    dynamic: Mapping[str, Any] = field(default_factory=dict, hash=False)
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_group_size(self.group_size)
        for name in ("sym", "desc_act", "lm_head", "static_groups", "true_sequential"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f'"{name}" is {show(value)}, which is neither true nor false')
        if self.checkpoint_format not in FORMATS:
            raise _format_error(self.checkpoint_format)
        if self.damp_percent is not None and not _is_fraction(self.damp_percent):
            raise ConfigError(f'"damp_percent" is {show(self.damp_percent)}, not between 0 and 1')
        _check_dynamic(self.dynamic)

    @property
    def overrides(self) -> bool:
        """Some `dynamic` rule gives layers other settings: each layer's tensors must be asked."""
        return any(not pattern.startswith("-:") for pattern in self.dynamic)

    def num_groups(self, in_features: int) -> int:
        """G, the scales per output feature, of a layer with `in_features` inputs."""
        return 1 if self.group_size == -1 else math.ceil(in_features / self.group_size)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], file: str) -> "QuantConfig":
        """Read one block of settings, in any of the dialects. null counts as absent.

        Args:
            raw: the block.
            file: the file it stands in, for messages.

        Raises:
            ConfigError: another method or layout than GPTQ's, a value missing or out of bounds, two
                names of one setting that disagree, or a key that would change the arithmetic.
        """
        try:
            _refuse_other_arithmetic(raw)
            return cls(**_settings(raw))
        except ConfigError as error:
            raise ConfigError(error.reason, file=file, remedy=error.remedy) from None

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        metadata: Mapping[str, str],
        scalars: Mapping[str, int],
    ) -> "QuantConfig | None":
        """The settings of a folder, from the first place that has them; None when it has none.

        The order: quantize_config.json, quant_config.json, config.json["quantization_config"]; else
        TGI's scalar tensors; else the metadata of the .safetensors files.

        Args:
            folder: the model folder.
            config: its parsed config.json.
            metadata: the metadata of its .safetensors files.
            scalars: values of those SCALAR_TENSORS that it holds.

        Raises:
            ConfigError: as `from_hf`; or two of the JSON files disagree.
        """
        blocks: dict[str, Mapping[str, Any]] = {
            name: read_settings(folder, name)
            for name in SETTINGS_FILES
            if os.path.lexists(folder / name)
        }
        block = config.get("quantization_config")
        if block is not None:
            if not isinstance(block, Mapping):
                raise ConfigError(
                    f'"quantization_config" is {show(block)}, not an object', file="config.json"
                )
            blocks["config.json"] = block
        if blocks:
            return _agreed(blocks)
        if scalars:
            named = {"bits": scalars.get("gptq_bits"), "group_size": scalars.get("gptq_groupsize")}
            return cls.from_hf(named, "tensors gptq_bits and gptq_groupsize")
        if "gptq_bits" in metadata:
            return cls.from_hf(_from_metadata(metadata), "safetensors metadata")
        return None

    def to_hf(self) -> dict[str, Any]:
        """The block that AutoGPTQ, GPTQModel, transformers, vLLM and SGLang all read.

        Belongs into config.json["quantization_config"] and into quantize_config.json. Method and
        format stand under their old and new names, since each reader knows only one of the two.
        """
        damp = {} if self.damp_percent is None else {"damp_percent": self.damp_percent}
        return {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "lm_head": self.lm_head,
            "true_sequential": self.true_sequential,
            "static_groups": self.static_groups,
            "pack_dtype": "int32",
            "format": self.checkpoint_format,
            "checkpoint_format": self.checkpoint_format,
            "dynamic": dict(self.dynamic),
            "meta": {**self.meta, **damp},
        }


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `QuantConfig` out of a block whose arithmetic is GPTQ's."""
    given = {key: value for key, value in raw.items() if value is not None}
    notes = []
    if "sym" not in given:
        notes.append("sym is not said; true is assumed (reading does not depend on it)")
    if "desc_act" not in given:
        notes.append("desc_act is not said; true is assumed, so a stored g_idx is obeyed")
    meta = given["meta"] if isinstance(given.get("meta"), dict) else {}
    meta_damp = meta.get("damp_percent") if _is_fraction(meta.get("damp_percent")) else None
    bits, group_size = _either(given, "bits", "w_bit"), _either(given, "group_size", "q_group_size")
    if bits is None or group_size is None:
        missing = "bits" if bits is None else "group_size"
        raise ConfigError(f'"{missing}" is missing', remedy="add it, as the quantiser was told")
    return {
        "bits": bits,
        "group_size": group_size,
        "sym": given.get("sym", True),
        "desc_act": given.get("desc_act", True),
        "checkpoint_format": _either(given, "checkpoint_format", "format") or "gptq",
        "lm_head": given.get("lm_head", False),
        "static_groups": given.get("static_groups", False),
        "true_sequential": given.get("true_sequential", True),
        "damp_percent": given.get("damp_percent", meta_damp),
        "dynamic": given.get("dynamic", {}),
        "meta": meta,
        "notes": tuple(notes),
    }


def _either(given: Mapping[str, Any], name: str, synonym: str) -> Any:
    """The value under either name, or None; under both, it must be the same."""
    if name in given and synonym in given and not _same(given[name], given[synonym]):
        raise ConfigError(
            f'"{synonym}" is {show(given[synonym])}, but "{name}" is {show(given[name])}'
        )
    return given.get(name, given.get(synonym))


def _refuse_other_arithmetic(raw: Mapping[str, Any]) -> None:
    """ConfigError for blocks that describe something else than GPTQ's packed layers."""
    for key in ("quant_method", "method"):
        method = raw.get(key)
        if method is not None and method != "gptq":
            raise ConfigError(f'"{key}" is {show(method)}; only gptq is supported', remedy=_OTHER)
    for key, (neutral, why) in _CHANGES_THE_MATHS.items():
        value = raw.get(key)
        if value is not None and not any(_same(value, allowed) for allowed in neutral):
            raise ConfigError(f'"{key}" is {show(value)}, {why}', remedy=_OTHER)


def _agreed(blocks: Mapping[str, Mapping[str, Any]]) -> QuantConfig:
    """One config out of several files, which must not contradict each other."""
    first: tuple[str, QuantConfig] | None = None
    said: dict[str, tuple[str, Any]] = {}
    for file, raw in blocks.items():
        config = QuantConfig.from_hf(raw, file)
        first = first or (file, config)
        for name in ("bits", "group_size", "checkpoint_format", "desc_act", "lm_head", "dynamic"):
            # The first three are said even by silence: their absence means a default, or an error.
            if name in ("desc_act", "lm_head", "dynamic") and raw.get(name) is None:
                continue
            value = getattr(config, name)
            elsewhere, earlier = said.setdefault(name, (file, value))
            if value != earlier:
                raise ConfigError(
                    f'"{name}" is {show(value)}, but {elsewhere} says {show(earlier)}',
                    file=file,
                    remedy="keep what belongs to these weights, and correct or delete the other",
                )
    if first is None:
        raise ConfigError("no quantisation settings")
    notes = tuple(note for note in first[1].notes if note.split()[0] not in said)
    return replace(first[1], notes=notes, **{name: value for name, (_, value) in said.items()})


def _from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """AutoGPTQ's safetensors metadata, words only, as a block of settings."""
    words = {
        key.removeprefix("gptq_"): word for key, word in metadata.items() if key.startswith("gptq_")
    }
    raw: dict[str, Any] = dict(words)
    for key in ("bits", "group_size"):
        if re.fullmatch(r"-?[0-9]{1,9}", words.get(key, "")):
            raw[key] = int(words[key])
    if words.get("desc_act") in ("True", "False"):
        raw["desc_act"] = words["desc_act"] == "True"
    # Words that say nothing about reading stay words, and QuantConfig would refuse them as such.
    for key in ("damp_percent", "sym", "static_groups", "true_sequential", "lm_head", "dynamic"):
        raw.pop(key, None)
    return raw


def _check_bits(bits: object) -> None:
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f'"bits" is {show(bits)}; 2, 3, 4 and 8 are supported', remedy=_OTHER)


def _check_group_size(group_size: object) -> None:
    if type(group_size) is not int or not (group_size == -1 or 1 <= group_size <= MAX_GROUP_SIZE):
        raise ConfigError(
            f'"group_size" is {show(group_size)}; -1 or 1 to {MAX_GROUP_SIZE:,} is needed'
        )


def _check_dynamic(dynamic: object) -> None:
    """GPTQModel's rules. Patterns are a stranger's regular expressions: they are never matched."""
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f'"dynamic" is {show(dynamic)}, not an object')
    for pattern, rule in dynamic.items():
        if pattern.startswith("-:"):
            continue
        if not isinstance(rule, Mapping):
            raise ConfigError(f'"dynamic" rule {show(pattern)} is {show(rule)}, not an object')
        if rule.get("bits") is not None:
            _check_bits(rule["bits"])
        if rule.get("group_size") is not None:
            _check_group_size(rule["group_size"])


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _same(left: object, right: object) -> bool:
    """Equal as JSON: true is not 1."""
    return type(left) is type(right) and left == right


def _format_error(word: object) -> ConfigError:
    why = _OTHER_FORMATS.get(word, "") if isinstance(word, str) else ""
    return ConfigError(
        f'"checkpoint_format" is {show(word)}{why}; {" and ".join(FORMATS)} are supported',
        remedy=_SAVE_AGAIN,
    )


_OTHER_FORMATS = {
    "marlin": " (tiles in the order of one CUDA kernel)",
    "gemm": " (AWQ's layout)",
    "gptq_p": " (GPTQModel's planar layout)",
}

_CHANGES_THE_MATHS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "is_marlin_format": ((False,), "tiles in the order of one CUDA kernel"),
    "pack_dtype": (("int32",), "but words of 32 bits are the only packing supported"),
    "zero_point": ((), "a key of AWQ's, whose layout differs"),
    "version": ((), "a key of AWQ's, whose layout differs"),
    "load_in_8bit": ((False,), "which is bitsandbytes, not GPTQ"),
    "load_in_4bit": ((False,), "which is bitsandbytes, not GPTQ"),
    "rotation": ((), "and rotated weights need a rotation that is not built here"),
    "adapter": (({},), "and an adapter would have to be added to every layer"),
    "data_type": (("int",), "but only integer weights are supported"),
    "act_bits": ((16,), "and quantised activations are not built here"),
}
"""Key -> (values that change nothing, why others are refused)."""
