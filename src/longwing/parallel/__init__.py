"""Tensor parallel: a group of processes that share a model's matrices, and who has which part.

The face of the room. `Group` is the processes: rank, size, sums over all of them. `shards` says, as
arithmetic on shapes, which part of a linear a rank has, dense or packed, and `byte_runs` where that
part lies in a file. Nothing here knows a model, a folder or a module.
"""

from longwing.parallel.group import Group
from longwing.parallel.shards import PackedCut, Shard, byte_runs, cut_packed, shard_linear

__all__ = ["Group", "PackedCut", "Shard", "byte_runs", "cut_packed", "shard_linear"]
