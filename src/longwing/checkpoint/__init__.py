"""Model folders: read without trusting them, written whole or not at all.

The face of the room. `Checkpoint.open` finds the files and checks their headers and settings,
`read_packed` turns the tensors of a GPTQ layer into a `PackedWeight`; `new_folder`, `write_shards`,
`packed_tensors` and `write_manifest` go the other way. Nothing here knows a model's architecture.
"""

from longwing.checkpoint.folder import Checkpoint, write_shards
from longwing.checkpoint.manifest import MANIFEST, check_manifest, write_manifest
from longwing.checkpoint.packed import (
    check_packed,
    check_part,
    packed_names,
    packed_tensors,
    read_packed,
)
from longwing.checkpoint.paths import read_settings
from longwing.checkpoint.publish import is_partial, new_file, new_folder
from longwing.checkpoint.quant_config import QuantConfig
from longwing.checkpoint.strict_json import parse_object
from longwing.checkpoint.tensor_file import TensorFile, write_tensor_file
from longwing.checkpoint.tensor_header import TensorInfo

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "QuantConfig",
    "TensorFile",
    "TensorInfo",
    "check_manifest",
    "check_packed",
    "check_part",
    "is_partial",
    "new_file",
    "new_folder",
    "packed_names",
    "packed_tensors",
    "parse_object",
    "read_packed",
    "read_settings",
    "write_manifest",
    "write_shards",
    "write_tensor_file",
]
