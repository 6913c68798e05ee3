"""Tensors in, tensors out: the arithmetic that models are made of. Knows no model and no file.

Every function here is first written in plain PyTorch, which is its meaning and the CPU path; faster
forms are added beside it and held to it by tests.
"""

from longwing.kernels.attention import (
    AttentionSpec,
    alibi_slopes,
    attend,
    paged_attention,
    paired,
    rotate,
    turn,
    turns,
)
from longwing.kernels.attention_inputs import AttentionInputs, narrowed
from longwing.kernels.choice import attends_in_triton, chooses_triton
from longwing.kernels.cpu import CpuWeight, DenseWeight, Int4Weight, Int8Weight
from longwing.kernels.likeliest import Likeliest, likeliest
from longwing.kernels.pages import KV_DTYPES, KVPages, write_kv
from longwing.kernels.rows import take_rows
from longwing.kernels.streamed import StreamedWeight
from longwing.kernels.wna16 import (
    BITS,
    DEQUANTISE_TILE,
    PackedWeight,
    dequantize,
    pack,
    packed_matmul,
    unpack,
)

__all__ = [
    "BITS",
    "DEQUANTISE_TILE",
    "KV_DTYPES",
    "AttentionInputs",
    "AttentionSpec",
    "CpuWeight",
    "DenseWeight",
    "Int4Weight",
    "Int8Weight",
    "KVPages",
    "Likeliest",
    "PackedWeight",
    "StreamedWeight",
    "alibi_slopes",
    "attend",
    "attends_in_triton",
    "chooses_triton",
    "dequantize",
    "likeliest",
    "narrowed",
    "pack",
    "packed_matmul",
    "paged_attention",
    "paired",
    "rotate",
    "take_rows",
    "turn",
    "turns",
    "unpack",
    "write_kv",
]
