"""Models: a config, a module over packed tokens, and the way from a folder to one."""

from longwing.models.config import ModelConfig
from longwing.models.decoder import Decoder, Stage
from longwing.models.fields import Fields
from longwing.models.inventory import Inventory, take_inventory
from longwing.models.loader import (
    ARCHITECTURES,
    DTYPES,
    Filler,
    empty_model,
    load_model,
    with_rope,
)
from longwing.models.values import not_finite

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "Decoder",
    "Fields",
    "Filler",
    "Inventory",
    "ModelConfig",
    "Stage",
    "empty_model",
    "load_model",
    "not_finite",
    "take_inventory",
    "with_rope",
]
