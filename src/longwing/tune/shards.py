"""Sharding: every process has some rows of each tensor, and one block at a time is whole.

For a model that does not fit one GPU. PyTorch's FSDP2 (`fully_shard`) does the work: before a block
runs its rows are gathered from all processes, afterwards dropped, and gathered again on the way
back; its gradient is added up over the processes and each keeps its own rows of it. Optimiser and
clipping then see rows only. accelerate, which wraps the same function, would add a dependency and a
settings file and nothing else.

What is trained and what is frozen is sharded alike. Two things are not. Vectors (norms, biases),
which are nothing beside matrices, stay whole in float32: gathered in 16 bits, a norm's weight near
1 could not move by less than 0.004. Packed weights are no parameters: at 4 bits a 40B model's are
20 GB, and gathering them twice a row would cost more than they do.

On a GPU matrices are gathered in bfloat16, in which autocast would multiply them anyway, and
gradients are added up in float32. So sharded or not, the same numbers are multiplied; only an
embedding that is trained is read in bfloat16 here, and in float32 where it is whole.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:  # FSDP2 takes a second to import, and every command imports this file
    from torch.distributed.tensor import DTensor


def shard(module: nn.Module, mesh: DeviceMesh, *, stays: bool = False) -> None:
    """Shard a module's matrices in place, except those of parts that are sharded already.

    Args:
        module: a block, or the module that all passes begin in, which comes last.
        mesh: the processes.
        stays: once gathered it stays whole until the way back is done.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    on_gpu = mesh.device_type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if on_gpu else None,
        reduce_dtype=torch.float32 if on_gpu else None,
        cast_forward_inputs=False,  # what flows between blocks has its own number type
    )
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=not stays,
        ignored_params={parameter for parameter in module.parameters() if parameter.ndim < 2},
    )
    if not isinstance(module, FSDPModule):  # unreachable: that is what fully_shard makes of it
        raise RuntimeError("a module that was not sharded")
    # The loss is divided by the weight of the whole step, so gradients are sums and not means.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def own_rows(tensor: Tensor) -> Tensor:
    """The rows that this process has: a view, and all of a tensor that is not sharded."""
    parts = as_sharded(tensor)
    return tensor if parts is None else parts.to_local()


def first_row(tensor: Tensor) -> int:
    """The number of the first of them. Rows are dealt out in equal runs, the last ones shorter."""
    parts = as_sharded(tensor)
    if parts is None:
        return 0
    size, rank = parts.device_mesh.size(), parts.device_mesh.get_local_rank()
    return min(rank * -(-len(tensor) // size), len(tensor))


def whole(tensor: Tensor) -> Tensor:
    """The tensor from all processes' parts; all call this together."""
    parts = as_sharded(tensor)
    return tensor if parts is None else parts.full_tensor()


def as_sharded(tensor: Tensor) -> "DTensor | None":
    """The tensor as what `shard` has made of it; None if it was not sharded."""
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
