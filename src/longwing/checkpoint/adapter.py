"""LoRA adapters in peft's file format, read strictly and written for peft to load.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. Holds what the
two files may say and how they agree with each other; whether an adapter fits a model is
`layers/lora.py`, which has the model.

    base_model.model.LAYER.lora_A.weight   (R, I)   down to the rank
    base_model.model.LAYER.lora_B.weight   (O, R)   and up again

The layer's output gains scale * B (A x), scale = alpha / R, or alpha / sqrt(R) with `use_rslora`.
LAYER is the checkpoint's own name of the linear, which is also longwing's.

The one idea: peft's config has some forty fields, most of which switch on another method under the
same name. Those are accepted at the value that leaves plain LoRA, and refused at any other; a field
that is not known is refused too, because what it would change cannot be known.

Beside the two files longwing writes `longwing_tuning.json`: the entries of config.json, RoPE above
all, under which the adapter was tuned. peft ignores it; without it the rotation would be lost.

Shape key: I in features, O out features, R rank.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from longwing.checkpoint.paths import inside, read_settings
from longwing.checkpoint.publish import new_file
from longwing.checkpoint.strict_json import show
from longwing.checkpoint.tensor_file import TensorFile, write_tensor_file
from longwing.errors import CheckpointError, ConfigError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_SETTINGS = "longwing_tuning.json"

MAX_RANK = 4096

TUNED_SETTINGS = (
    *("max_position_embeddings", "rope_theta", "rope_parameters", "rope_scaling"),
    "original_max_position_embeddings",
)
"""Entries of config.json that `longwing_tuning.json` may replace."""

_PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_OURS = ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "base_model_name_or_path")

# Fields that say nothing about what the adapter computes.
_HARMLESS = (
    *("auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "task_type"),
    *(
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "loftq_config",
    ),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors show which layers
)

# Fields that make of LoRA something else, unless they are null, false or empty.
_METHODS: Mapping[str, str] = {
    "use_dora": "DoRA scales each output row as well",
    "use_qalora": "QALoRA pools the input by groups",
    "use_bdlora": "block-diagonal LoRA is not built here",
    "lora_bias": "biases of the adapter itself are not built here",
    "fan_in_fan_out": "its matrices are transposed, for models whose layers are",
    "rank_pattern": "ranks that differ by layer are not built here",
    "alpha_pattern": "scales that differ by layer are not built here",
    "modules_to_save": "whole layers beside the low-rank ones are not built here",
    "trainable_token_indices": "tuned embedding rows are not built here",
    "target_parameters": "adapters of bare parameters are not built here",
    "layer_replication": "it repeats layers of the model",
    "megatron_config": "it is for another program's parallel layers",
    "alora_invocation_tokens": "activated LoRA begins in the middle of a text",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "eva_config": "",  # ways to begin the training with; they leave plain LoRA
    "lora_ga_config": "LoRA-GA changes the base weights",
    "corda_config": "CorDA changes the base weights",
    "velora_config": "",
    "monteclora_config": "MonteCLoRA draws its matrices at random",
}
_INITS = (True, False, "gaussian", "orthogonal", "eva")
_REMEDY = "use a plain LoRA adapter, or merge this one with the program that made it"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, as far as plain LoRA goes.

    Attributes:
        rank: R.
        alpha: numerator of the scale.
        targets: last parts of the names of the adapted layers ("query_key_value"), sorted.
        use_rslora: divide alpha by sqrt(R) instead of R (Kalajdzievski, arXiv:2312.03732).
        base_model: what the file calls the model it was tuned on; "" if it does not say.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False
    base_model: str = ""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise _refusal("r", self.rank, f"a rank from 1 to {MAX_RANK} is needed")
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not is_number or not 0 < self.alpha <= 1e6:
            raise _refusal(
                "lora_alpha", self.alpha, "a number above 0 and up to 1,000,000 is needed"
            )

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "AdapterConfig":
        """Read the parsed file.

        Raises:
            ConfigError: a field unknown, missing, of the wrong kind, or of another method.
        """
        if raw.get("peft_type") != "LORA":
            raise _refusal("peft_type", raw.get("peft_type"), 'only "LORA" is built here')
        for name, value in raw.items():
            _check_field(name, value)
        rslora, base = raw.get("use_rslora") or False, raw.get("base_model_name_or_path")
        if not isinstance(rslora, bool):
            raise _refusal("use_rslora", rslora, "it must be true or false")
        return cls(
            rank=raw.get("r"),  # type: ignore[arg-type]  # checked when it is made
            alpha=raw.get("lora_alpha"),  # type: ignore[arg-type]
            targets=_targets(raw.get("target_modules")),
            use_rslora=rslora,
            base_model=base if isinstance(base, str) else "",
        )

    def to_json(self) -> dict[str, Any]:
        """The file's contents: what plain LoRA needs, and peft's defaults for the rest."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model or None,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "use_rslora": self.use_rslora,
        }


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter, read and found good in itself.

    Attributes:
        path: its folder.
        config: its settings.
        layers: layer name -> (A_RI, B_OR), in the number type of the file.
        settings: entries of config.json under which it was tuned; {} where nothing says so.
    """

    path: Path
    config: AdapterConfig
    layers: Mapping[str, tuple[Tensor, Tensor]]
    settings: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | str) -> "Adapter":
        """Read an adapter's folder whole; it is small beside any model.

        Raises:
            CheckpointError: not a folder, a file missing or damaged, a tensor that is no side of a
                layer, or sides that do not fit each other or the settings.
            ConfigError: settings that are not plain LoRA's.
        """
        folder = _folder(path)
        config = AdapterConfig.from_json(read_settings(folder, ADAPTER_CONFIG))
        file = TensorFile.open(inside(folder, ADAPTER_TENSORS))
        sides: dict[str, dict[str, Tensor]] = {}
        for name in file.tensors:
            layer, side = _side(name)
            sides.setdefault(layer, {})[side] = _finite(file, name)
        layers = {layer: _pair(layer, found, config.rank) for layer, found in sides.items()}
        _check_targets(config.targets, layers)
        settings: Mapping[str, object] = {}
        if os.path.lexists(folder / ADAPTER_SETTINGS):
            settings = _settings(read_settings(folder, ADAPTER_SETTINGS))
        return cls(path=folder, config=config, layers=MappingProxyType(layers), settings=settings)

    @staticmethod
    def size(path: Path | str) -> int:
        """How many numbers an adapter has; reads the header of its tensors alone.

        Raises:
            CheckpointError: there is no such file, or it is damaged.
        """
        file = TensorFile.open(inside(_folder(path), ADAPTER_TENSORS))
        return sum(math.prod(info.shape) for info in file.tensors.values())


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    settings: Mapping[str, object],
    facts: Mapping[str, object],
) -> None:
    """Write an adapter into an existing folder, as `Adapter.open` and peft read it.

    Args:
        folder: where the files go.
        config: the settings.
        layers: layer name -> (A_RI, B_OR).
        settings: entries of config.json it was tuned under, of TUNED_SETTINGS.
        facts: what else `longwing_tuning.json` should say of how it was made, for people.

    Raises:
        CheckpointError: the system refuses to write.
    """
    tensors = {}
    for layer, (A_RI, B_OR) in layers.items():
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = A_RI
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = B_OR
    write_tensor_file(folder / ADAPTER_TENSORS, tensors, {"format": "pt"})
    contents = {
        ADAPTER_CONFIG: config.to_json(),
        ADAPTER_SETTINGS: {"settings": dict(settings), "facts": dict(facts)},
    }
    for name, content in contents.items():
        with new_file(folder / name) as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _check_field(name: str, value: object) -> None:
    """Refuse a field that makes more, or something else, of plain LoRA."""
    if name in _METHODS:
        if value not in (None, False, {}, []) and _METHODS[name]:
            raise _refusal(name, value, _METHODS[name])
    elif name == "bias":
        if value != "none":
            raise _refusal(name, value, "biases tuned beside the matrices are not built here")
    elif name == "init_lora_weights":
        if value not in _INITS:
            raise _refusal(name, value, "ways to begin that change the base weights are not built")
    elif name not in _OURS and name not in _HARMLESS:
        raise _refusal(name, value, "longwing does not know it, and it may change the result")


def _targets(value: object) -> tuple[str, ...]:
    """`target_modules` as a list; a pattern (a string) is left to the tensors' names to say."""
    if isinstance(value, str) or value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _refusal("target_modules", value, "a list of layer names is needed")
    return tuple(sorted(value))


def _folder(path: Path | str) -> Path:
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise CheckpointError(
            "is not a folder", file=str(path), remedy=f"an adapter is one with {ADAPTER_CONFIG}"
        )
    return folder


def _side(name: str) -> tuple[str, str]:
    """(layer, "A" or "B") of a tensor's name."""
    for ending, side in _SIDES.items():
        if name.startswith(_PREFIX) and name.endswith(ending):
            return name[len(_PREFIX) : -len(ending)], side
    raise CheckpointError(
        f"is not named {_PREFIX}LAYER.lora_A.weight or .lora_B.weight",
        file=ADAPTER_TENSORS,
        tensor=name,
        remedy=_REMEDY,
    )


def _finite(file: TensorFile, name: str) -> Tensor:
    """One tensor; refused unless it is a matrix of finite floating-point numbers."""
    info = file.tensors[name]
    if len(info.shape) != 2 or not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        raise CheckpointError(
            f"is {info.dtype} of shape {list(info.shape)}; a floating-point matrix is needed",
            file=file.path.name,
            tensor=name,
        )
    tensor = file.read(name)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            "holds values that are not finite",
            file=file.path.name,
            tensor=name,
            remedy="download the adapter again, or tune it again at a lower rate",
        )
    return tensor


def _pair(layer: str, sides: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Both sides of a layer, whose inner extents are the rank."""
    for side in ("A", "B"):
        if side not in sides:
            raise CheckpointError(
                f"has no lora_{side}",
                file=ADAPTER_TENSORS,
                tensor=layer,
                remedy="download it again",
            )
    A_RI, B_OR = sides["A"], sides["B"]
    if A_RI.shape[0] != rank or B_OR.shape[1] != rank:
        raise CheckpointError(
            f"lora_A {list(A_RI.shape)} and lora_B {list(B_OR.shape)} are not of rank {rank}, "
            f"which {ADAPTER_CONFIG} says",
            file=ADAPTER_TENSORS,
            tensor=layer,
            remedy="the two files are of different adapters",
        )
    return A_RI, B_OR


def _check_targets(targets: Sequence[str], layers: Mapping[str, object]) -> None:
    """Settings and tensors must name the same layers, wherever the settings list them."""
    if not layers:
        raise CheckpointError("holds no layer", file=ADAPTER_TENSORS, remedy="download it again")

    def is_of(layer: str, target: str) -> bool:
        return layer == target or layer.endswith(f".{target}")

    for layer in layers if targets else ():
        if not any(is_of(layer, target) for target in targets):
            raise CheckpointError(
                f"is not among the target_modules {list(targets)}",
                file=ADAPTER_TENSORS,
                tensor=layer,
                remedy="the two files are of different adapters",
            )
    for target in targets:
        if not any(is_of(layer, target) for layer in layers):
            raise CheckpointError(
                f"target_modules names {show(target)}, of which there is no tensor",
                file=ADAPTER_CONFIG,
                remedy="the two files are of different adapters, or the tensors are cut short",
            )


def _settings(raw: Mapping[str, object]) -> Mapping[str, object]:
    """The entries of config.json that `longwing_tuning.json` replaces; no others are taken."""
    settings = raw.get("settings")
    if not isinstance(settings, dict):
        raise ConfigError(f'"settings" is {show(settings)}, not an object', file=ADAPTER_SETTINGS)
    for name in settings:
        if name not in TUNED_SETTINGS:
            raise ConfigError(
                f"settings.{show(name)} is not one of {', '.join(TUNED_SETTINGS)}",
                file=ADAPTER_SETTINGS,
                remedy="remove it",
            )
    return MappingProxyType(settings)


def _refusal(name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f'"{name}" is {show(value)}: {why}', file=ADAPTER_CONFIG, remedy=_REMEDY)
