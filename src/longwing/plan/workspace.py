"""`Workspace`: the bytes in use beside weights and cache, at the fullest moment of a forward pass.

Each part is one function that says what it counts and what it takes for granted. They bound what
our own modules hold, and tests hold them to that.

The one idea: activations of 16 bits run through the GPU's kernels, which build no mask and make a
slice of a packed matrix dense at a time; float32 runs through the reference, which builds both
whole (`kernels/choice.py`). So the number type says which of the two is planned for.

Letters: T tokens in a forward pass, C context, D model dim, F MLP dim, N query heads, H head dim,
V vocabulary.
"""

import math
from dataclasses import asdict, dataclass

from longwing.checkpoint import QuantConfig
from longwing.kernels import DEQUANTISE_TILE
from longwing.kernels.streamed import CELL_IN, FINEST_GROUP, TILE_OUT
from longwing.models import Decoder, ModelConfig
from longwing.plan.weights import WeightBytes, block_linears
from longwing.rope import ladder

CONTEXT_BYTES = 832 * 2**20
"""What a CUDA process takes outside of PyTorch's allocator: driver context and loaded kernels;
without CUDA graphs (`graphs_bytes`).

Measured (H200, CUDA 13, torch 2.11): 527 MiB bare, 682 once Falcon-40B has read a prompt, 763 with
its decoding kernels and about five graphs (33 MiB); 765 with Falcon-7B's and some fifteen (53 MiB).
"""

LOSS_BYTES = 192 * 2**20
"""What PyTorch's allocator holds beside the tensors that are counted.

Of Falcon-40B: 32 MiB that cuBLAS works in (on Hopper, for each stream that multiplies); 19 for
norms folded into products; 72 lost between blocks; and, kept apart from all else, what graphs work
in, some 25 MiB for one sequence. All but some MiB of the last is from sums, not measured alone.
Where memory is not short the allocator keeps more than that, and gives it back when it is.
"""

RUNTIME_BYTES = CONTEXT_BYTES + LOSS_BYTES
"""What a process takes beside the tensors that are counted: 1 GiB."""

GRAPH_LAYER_BYTES = 116 * 2**10
"""What a layer takes in a decoding step recorded as a CUDA graph: 113 KiB, from the 152 MiB that 23
graphs of Falcon-40B took (H200)."""

NUM_GRAPHS = {1: 10, 2: 16, 4: 24, 8: 26, 12: 28, 16: 30, 24: 32, 32: 34, 48: 36, 64: 38}
"""Graphs that come to be recorded where so many sequences run at once at most, with drafts and
without (a test holds `engine.graphs` to it); larger steps are not recorded."""

DEQUANTISE_BYTES = 15
"""Bytes per value of a tile that `kernels.dequantize` holds beside its result, whatever the dtype.

Values 1, values minus zeros 2, those in float32 4, the scale of each 4, the product 4.
"""

DENSE_SLICE = 2**27
"""Weights that `kernels.wna16_dense` makes dense at once (a test holds it to that)."""

SLICE_ROWS = 256
"""Outputs that such a slice is a multiple of, likewise."""

WIDEST_HEAD = 256
"""The widest head whose attention runs through the GPU's kernels."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bytes in use beside weights and cache at the fullest moment; the parts are added up.

    Attributes:
        activations: of one block over one prefill chunk; see `activation_bytes`.
        mask: the attention mask of that chunk; see `mask_bytes`.
        dequantised: of a packed matrix, what is dense at once; see `dequantised_bytes` and
            `dense_slice_bytes`.
        unpacked_zeros: what zero points take in memory beyond their packed form; see
            `unpacked_zeros_bytes`.
        logits: of one step; see `logits_bytes`.
        rope_tables: cos and sin of every rung; see `rope_table_bytes`.
        graphs: of decoding steps, where all of them runs through the GPU's kernels, so that they
            are recorded; see `graphs_bytes`.
        runtime: RUNTIME_BYTES.
    """

    activations: int
    mask: int
    dequantised: int
    unpacked_zeros: int
    logits: int
    rope_tables: int
    graphs: int
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

    That is how the reference, `kernels.packed_matmul`, works: the whole matrix in the activations'
    dtype, made in tiles of 32 rows or more.
    """
    _, largest = max(
        block_linears(model), key=lambda named: named[1].in_features * named[1].out_features
    )
    values = largest.in_features * largest.out_features
    tile = min(values, max(DEQUANTISE_TILE, 32 * largest.out_features))
    return values * value_bytes + DEQUANTISE_BYTES * tile


def dense_slice_bytes(model: Decoder, tokens: int, value_bytes: int) -> int:
    """A slice of the largest packed matrix made dense, and its product for T tokens.

    That is how a GPU's kernels multiply many tokens: outputs, filled up to whole tiles, are shared
    out over as few slices as have DENSE_SLICE values or little more. One is dense at a time.
    """
    most = 0
    for _, linear in block_linears(model):
        K, N = linear.in_features, math.ceil(linear.out_features / TILE_OUT) * TILE_OUT
        num_slices = math.ceil(N * K / DENSE_SLICE)
        rows = min(math.ceil(N / num_slices / SLICE_ROWS) * SLICE_ROWS, N)
        most = max(most, rows * (K + tokens))
    return most * value_bytes


def runs_streamed(model: Decoder, quant: QuantConfig, value_bytes: int) -> bool:
    """Whether the GPU's kernels have a form for every packed matrix."""
    if value_bytes != 2:
        return False
    for _, linear in block_linears(model):
        K = linear.in_features
        own = K if quant.group_size == -1 else quant.group_size
        if K % own or (own != K and math.gcd(own, CELL_IN) < FINEST_GROUP):
            return False
    return True


def attends_streamed(config: ModelConfig, value_bytes: int) -> bool:
    """Whether attention runs through the GPU's kernels."""
    return value_bytes == 2 and config.head_dim % 16 == 0 and config.head_dim <= WIDEST_HEAD


def unpacked_zeros_bytes(weights: WeightBytes, bits: int) -> int:
    """What zero points take in memory beyond their packed form: they are kept one to a byte."""
    return weights.zeros * 8 // bits - weights.zeros


def logits_bytes(config: ModelConfig, batch: int, head_bytes: int) -> int:
    """V logits for each sequence's last token, as the head gives them and in float32.

    Never for a whole prompt: 24,576 tokens of Falcon would take 6.4 GB.
    """
    return batch * config.vocab_size * (head_bytes + 4)


def graphs_bytes(config: ModelConfig, sequences: int) -> int:
    """Decoding steps recorded as CUDA graphs, for all batches up to so many sequences."""
    at_most = min(sequences, max(NUM_GRAPHS))
    num = next(num for size, num in NUM_GRAPHS.items() if at_most <= size)
    return num * config.num_layers * GRAPH_LAYER_BYTES


def rope_table_bytes(config: ModelConfig, context: int) -> int:
    """Cos and sin in float32 for every position of every rung, H / 2 numbers each; 0 for ALiBi."""
    if config.rope is None:
        return 0
    return sum(ladder(config.rope, context)) * config.head_dim * 4
