"""What one of two ranks does; run as `python two_ranks.py RANK MEETING TRIAL`, prints JSON."""

import json
import os
import sys
import time

import torch
import torch.nn.functional as F

from longwing.errors import EngineError
from longwing.parallel import Group, shard_linear

GROUP_TIMEOUT_S = 3.0


def sums(group: Group) -> dict[str, object]:
    """The three ways in which values travel, and a block that needs one of them."""
    mine = torch.full((3,), float(group.rank + 1))
    gathered = group.all_gather(torch.tensor([[group.rank]]), dim=1)
    told = group.broadcast(torch.tensor([group.rank + 5]), source=1)
    group.barrier()
    return {
        "sum": group.all_reduce(mine).tolist(),
        "gathered": gathered.tolist(),
        "told": told.tolist(),
        "half": group.all_reduce(torch.ones(2, dtype=torch.bfloat16)).tolist(),
        "shard": group.shard_of(torch.arange(6), 0).tolist(),
        **_block(group),
    }


def _block(group: Group) -> dict[str, object]:
    """A parallel block of Falcon: attention's output and the MLP's added, then one sum."""
    torch.manual_seed(0)
    D, M, T = 64, 256, 5
    weights = {"dense": (D, D), "dense_h_to_4h": (D, M), "dense_4h_to_h": (M, D)}
    whole = {name: torch.randn(N, K) * K**-0.5 for name, (K, N) in weights.items()}
    heads_TD, x_TD = torch.randn(T, D), torch.randn(T, D)
    mine = {
        name: shard_linear(name, K, N, 4, group.size, group.rank)
        for name, (K, N) in weights.items()
    }
    part = {name: whole[name][shard.weight()] for name, shard in mine.items()}
    up_TM = F.gelu(x_TD @ part["dense_h_to_4h"].T)
    out_TD = heads_TD[:, mine["dense"].ins] @ part["dense"].T + up_TM @ part["dense_4h_to_h"].T
    out_TD = group.all_reduce(out_TD)
    expected_TD = heads_TD @ whole["dense"].T
    expected_TD = expected_TD + F.gelu(x_TD @ whole["dense_h_to_4h"].T) @ whole["dense_4h_to_h"].T
    return {
        "block_error": float((out_TD - expected_TD).abs().max()),
        "block": out_TD.flatten().tolist(),
    }


def dies(group: Group) -> dict[str, object]:
    """Rank 1 is killed; rank 0 finds out in a sum."""
    if group.rank == 1:
        os._exit(7)
    return _lost(group)


def hangs(group: Group) -> dict[str, object]:
    """Rank 1 does not come until its input ends; rank 0 finds out in a sum."""
    if group.rank == 1:
        sys.stdin.read()
        os._exit(0)
    return _lost(group)


def _lost(group: Group) -> dict[str, object]:
    began = time.monotonic()
    try:
        group.all_reduce(torch.ones(1))
    except EngineError as error:
        return {"error": str(error), "seconds": time.monotonic() - began}
    return {"error": ""}


def main() -> None:
    torch.set_num_threads(1)
    rank, meeting, trial = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    group = Group.join(rank, 2, meeting, timeout_s=GROUP_TIMEOUT_S)
    print(json.dumps({"sums": sums, "dies": dies, "hangs": hangs}[trial](group)))
    sys.stdout.flush()
    if trial == "sums":
        group.close()
    os._exit(0)  # a lost group cannot be left in order


if __name__ == "__main__":
    main()
