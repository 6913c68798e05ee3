"""Bounds on decoding speed, from bytes alone.

The one idea: a decode step costs one pass over the weights and one over the cache, so memory
bandwidth bounds it, whatever the kernels. (At large batches arithmetic may bound it lower still.)
How close an engine comes is for a benchmark.
"""

from collections.abc import Mapping

from longwing.errors import RequestError
from longwing.plan.memory import Plan


def bytes_per_step(plan: Plan) -> int:
    """Bytes one decode step must read when every sequence is at the full context.

    All weights once, whatever the batch (of an embedding that is not the head as well, only a row a
    sequence, left out), and each sequence's keys and values.
    """
    rows_only = plan.weights.embedding if plan.weights.head else 0
    return plan.weights.total - rows_only + plan.kv_bytes


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
