"""The one check of a dense tensor's numbers, shared by loading and verifying."""

import torch
from torch import Tensor

from longwing.checkpoint import Checkpoint
from longwing.errors import CheckpointError


def not_finite(
    checkpoint: Checkpoint, name: str, tensor: Tensor, cast: Tensor
) -> CheckpointError | None:
    """What is wrong with the numbers of `tensor`, read as `name`, once cast; None if nothing.

    Cost: one pass over the tensor, which may be a part of what the file holds.
    """
    finite = torch.isfinite(cast)
    if bool(finite.all()):
        return None
    first = int((~finite).flatten().nonzero()[0])
    count = int(cast.numel() - finite.sum())
    file = checkpoint.shard_of(name)
    of = "" if tensor.shape == checkpoint.tensors[name].shape else " of this rank's part"
    if bool(torch.isfinite(tensor).all()):
        dtype = str(cast.dtype).removeprefix("torch.")
        return CheckpointError(
            f"{count} of {cast.numel()} values{of} do not fit {dtype}, the first "
            f"{tensor.flatten()[first].item():g}",
            file=file,
            tensor=name,
            remedy="load with dtype bfloat16",
        )
    return CheckpointError(
        f"{count} of {cast.numel()} values{of} are not finite, the first at index {first}",
        file=file,
        tensor=name,
        remedy="download the file again",
    )
