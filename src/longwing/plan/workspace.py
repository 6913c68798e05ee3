"""`Workspace`: the bytes in use beside weights and cache, at the fullest moment of a forward pass.

Each part is one function that says what it counts and what it takes for granted. They bound what
our own modules hold, and tests hold them to that; on an H200, two-layer Falcons of all kinds (torch
2.11, chunks of 2,048 tokens, contexts of 2,048 to 24,576) peaked 1 to 10 % below their plans.

Not counted: what the allocator loses between blocks.

Letters: T tokens in a forward pass, C context, D model dim, F MLP dim, N query heads, H head dim,
V vocabulary.
"""

from dataclasses import asdict, dataclass

from longwing.kernels import DEQUANTISE_TILE
from longwing.models import Decoder, ModelConfig
from longwing.plan.weights import WeightBytes, block_linears
from longwing.rope import ladder

RUNTIME_BYTES = 768 * 2**20
"""What a CUDA process takes beside its tensors: driver context, loaded kernels, cuBLAS workspace.

Measured: 527 MiB for the bare context, 729 MiB after matrix products and attention (H200, CUDA 13,
torch 2.11).
"""

DEQUANTISE_BYTES = 15
"""Bytes per value of a tile that `kernels.dequantize` holds beside its result, whatever the dtype.

Values 1, values minus zeros 2, those in float32 4, the scale of each 4, the product 4.
"""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bytes in use beside weights and cache at the fullest moment; the parts are added up.

    Attributes:
        activations: of one block over one prefill chunk; see `activation_bytes`.
        mask: the attention mask of that chunk; see `mask_bytes`.
        dequantised: the largest packed matrix while it is made dense; see `dequantised_bytes`.
        unpacked_zeros: what zero points take in memory beyond their packed form; see
            `unpacked_zeros_bytes`.
        logits: of one step; see `logits_bytes`.
        rope_tables: cos and sin of every rung; see `rope_table_bytes`.
        runtime: RUNTIME_BYTES.
    """

    activations: int
    mask: int
    dequantised: int
    unpacked_zeros: int
    logits: int
    rope_tables: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def activation_bytes(config: ModelConfig, tokens: int, value_bytes: int) -> int:
    """What one block holds at its fuller moment of two, for T tokens.

    While attention turns its queries: the residual stream and two normed copies (3 D), the
    projection and a contiguous copy of its queries (2 N H, and both KV vectors), and what `rotate`
    holds in float32 (12 bytes a value and the result; 8 if the input is float32 already). While the
    MLP runs: the residual stream, two normed copies and the attention's result (4 D), and F values
    twice (up, activated) or, gated, three times. In both, the position and rotation of each token.

    Takes for granted that attention does not build its T * C scores, as torch's fused attention was
    seen not to on an H200; and that prompts of a batch are read one after another.
    """
    D, F = config.hidden_size, config.mlp_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rotate = 8 if value_bytes == 4 else 12 + value_bytes
    attention = value_bytes * (3 * D + 2 * queries + 2 * keys) + rotate * queries
    mlp = value_bytes * (4 * D + F * (3 if config.family == "llama" else 2))
    positions = 3 * 8 + 4 * config.head_dim
    return tokens * (max(attention, mlp) + positions)


def mask_bytes(config: ModelConfig, tokens: int, context: int, value_bytes: int) -> int:
    """The mask of T tokens over a context of C: what tells attention who sees whom.

    A prompt of one chunk needs none, being causal. A later chunk has a T * C mask of one byte a
    place, which torch's fused attention copies into the activations' dtype (seen on an H200); so
    has every chunk under a sliding window shorter than the context. ALiBi's is a bias for each
    query head, N * T * C values, beside two masks of one byte.
    """
    if config.rope is None:
        return tokens * context * (config.num_heads * value_bytes + 2)
    windowed = any(window is not None and window < context for window in config.windows)
    return tokens * context * (1 + value_bytes) if windowed or context > tokens else 0


def dequantised_bytes(model: Decoder, value_bytes: int) -> int:
    """One packed matrix, the largest, while it is made dense to be multiplied with.

    That is how `kernels.packed_matmul` works: the whole matrix in the activations' dtype, made in
    tiles of 32 rows or more.
    """
    _, largest = max(
        block_linears(model), key=lambda named: named[1].in_features * named[1].out_features
    )
    values = largest.in_features * largest.out_features
    tile = min(values, max(DEQUANTISE_TILE, 32 * largest.out_features))
    return values * value_bytes + DEQUANTISE_BYTES * tile


def unpacked_zeros_bytes(weights: WeightBytes, bits: int) -> int:
    """What zero points take in memory beyond their packed form: they are kept one to a byte."""
    return weights.zeros * 8 // bits - weights.zeros


def logits_bytes(config: ModelConfig, batch: int, head_bytes: int) -> int:
    """V logits for each sequence's last token, as the head gives them and in float32.

    Never for a whole prompt: 24,576 tokens of Falcon would take 6.4 GB.
    """
    return batch * config.vocab_size * (head_bytes + 4)


def rope_table_bytes(config: ModelConfig, context: int) -> int:
    """Cos and sin in float32 for every position of every rung, H / 2 numbers each; 0 for ALiBi."""
    if config.rope is None:
        return 0
    return sum(ladder(config.rope, context)) * config.head_dim * 4
