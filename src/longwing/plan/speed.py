"""Bounds on decoding speed, from bytes alone.

The one idea: a decode step costs one pass over the weights and one over the cache in sight, so
memory bandwidth bounds it, whatever the kernels. (At large batches arithmetic may bound it lower
still.) How close an engine comes is for a benchmark.
"""

from collections.abc import Mapping

from longwing.errors import RequestError
from longwing.plan.memory import Plan


def bytes_per_step(plan: Plan) -> int:
    """Bytes one decode step must read when every sequence is at the full context.

    All weights once, whatever the batch, and the keys and values that each sequence attends to: no
    more than its window in a layer that has one. Left out is what an engine can do without: group
    indices (rows can be kept in the order of their groups), and of an embedding that is not the
    head as well, all but a row a sequence.
    """
    weights = plan.weights
    rows_only = weights.embedding if weights.head else 0
    return weights.total - weights.g_idx - rows_only + plan.kv_bytes_read_per_step


def decode_bound(plan: Plan, bandwidth: float) -> float:
    """Tokens per second, all sequences together, that no engine can exceed at the full context.

    Args:
        plan: what is to run.
        bandwidth: bytes per second that the memory delivers; `BANDWIDTH` has some cards.

    Raises:
        RequestError: the bandwidth is not above 0.
    """
    if not bandwidth > 0:
        raise RequestError(f"bandwidth {bandwidth} bytes/s is not above 0")
    return plan.batch * bandwidth / bytes_per_step(plan)


BANDWIDTH: Mapping[str, float] = {
    "L4": 300e9,
    "A10G": 600e9,
    "RTX 4090": 1008e9,
    "A100 40GB": 1555e9,
    "A100 80GB": 2039e9,
    "H100 SXM": 3350e9,
    "H200": 4300e9,
}
"""Bytes per second by card: the vendors' figures, but for the H200 what reads reach of 4.8 TB/s."""
