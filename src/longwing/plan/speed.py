"""Bounds on speed: decoding from bytes alone, reading from multiplications alone.

The one idea: a decode step costs one pass over the weights and one over the cache in sight, so
memory bandwidth bounds it, whatever the kernels. (At large batches arithmetic may bound it lower
still.) A long prompt multiplies every weight with every token, so arithmetic bounds its reading.
How close an engine comes is for a benchmark.
"""

from collections.abc import Mapping

from longwing.errors import RequestError
from longwing.models import ModelConfig, empty_model
from longwing.plan.memory import Plan
from longwing.plan.weights import block_linears


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


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Operations that reading a prompt takes, two for each multiply-add.

    Every weight of the blocks for every token, the head for the last alone; and in each layer, for
    each query head, a key and a value for every pair of tokens of which one sees the other. Of the
    last block only keys and values are wanted for every token, the rest for the last. Norms,
    rotations and activation functions are left out.
    """
    model = empty_model(config)
    blocks = sum(linear.in_features * linear.out_features for _, linear in block_linears(model))
    head = model.lm_head.in_features * model.lm_head.out_features
    kv = 2 * config.hidden_size * config.num_kv_heads * config.head_dim
    spared = (blocks // config.num_layers - kv) * (tokens - 1)
    return 2 * (blocks * tokens - spared + head) + attention_flops(config, tokens)


def attention_flops(config: ModelConfig, tokens: int) -> int:
    """Of `prefill_flops`, what attention takes: it grows with the square of the prompt."""
    # (T T + T) / 2 pairs in a whole triangle; under a window W the rows beyond it see W each.
    *earlier, last = (
        tokens if window is None else min(window, tokens) for window in config.windows
    )
    pairs = sum(W * (W + 1) // 2 + (tokens - W) * W for W in earlier) + last
    return 4 * config.num_heads * config.head_dim * pairs


def prefill_bound(config: ModelConfig, tokens: int, flops_per_s: float) -> float:
    """Seconds below which no engine reads a prompt.

    Args:
        config: the model.
        tokens: in the prompt.
        flops_per_s: the rate of large matrix products; attention is granted the same.

    Raises:
        RequestError: the rate is not above 0.
    """
    if not flops_per_s > 0:
        raise RequestError(f"a rate of {flops_per_s} operations/s is not above 0")
    return prefill_flops(config, tokens) / flops_per_s


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
