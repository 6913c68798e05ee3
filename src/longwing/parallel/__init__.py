"""Tensor parallel: a group of processes that share a model's matrices, and who has which part.

The face of the room. `Group` is the processes: rank, size, sums over all of them. `shard_linear`
says, as arithmetic on shapes, which part of a linear a rank has. Nothing here knows a model, a
folder or a module.
"""

from longwing.parallel.group import Group
from longwing.parallel.shards import Shard, shard_linear

__all__ = ["Group", "Shard", "shard_linear"]
