"""Models: a config, a module over packed tokens, and the way from a folder to one."""

from longwing.models.config import ModelConfig, end_ids
from longwing.models.decoder import Decoder, Stage
from longwing.models.inventory import Inventory, take_inventory
from longwing.models.loader import (
    ARCHITECTURES,
    DTYPES,
    Filler,
    empty_model,
    find_device,
    load_model,
    with_rope,
)
from longwing.models.sharding import check_split
from longwing.models.values import not_finite

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "Decoder",
    "Filler",
    "Inventory",
    "ModelConfig",
    "Stage",
    "check_split",
    "empty_model",
    "end_ids",
    "find_device",
    "load_model",
    "not_finite",
    "take_inventory",
    "with_rope",
]
