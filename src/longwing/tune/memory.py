"""`memory_of`: the bytes that tuning takes at its fullest moment, part by part.

There are two such moments: when the last hidden state becomes a loss, and when the last block has
run again to go back. Both have the inputs of all blocks beside them; the fuller one counts.

Held against an H200 (torch 2.11; Falcon-7B, and four layers of Falcon and Llama of width 2,048;
rows of 4K to 64K): without CUDA's own part from 5% below to 12% above the allocator's peak, and the
shortfall, tens of MB, is within that part.

Sharded over several GPUs (`shards.py`), weights and what trains them are divided, and what is
gathered comes on top; that part follows from what FSDP2 keeps, and was not measured yet.

Letters: L blocks, T tokens of a row, D model dim, F MLP dim, Q query heads * head dim, V
vocabulary, P numbers that are trained.
"""

from dataclasses import asdict, dataclass

from longwing.checkpoint import QuantConfig
from longwing.errors import CapacityError
from longwing.layers import Linear
from longwing.layers.lora import adaptable
from longwing.models import Decoder, ModelConfig, empty_model
from longwing.plan import RUNTIME_BYTES, format_size
from longwing.plan.weights import block_linears, num_parameters, weight_bytes
from longwing.tune.learner import target_layers
from longwing.tune.loss import CHUNK_BYTES
from longwing.tune.spec import TuneSpec


@dataclass(frozen=True, kw_only=True)
class TuneMemory:
    """Bytes, by what they are for.

    Attributes:
        weights: the model as it is loaded; float32 with `full`, else 16 bits or packed.
        training: of each trained number its gradient and two moments, 12 bytes; of an adapter's the
            number itself too.
        kept: each block's input, L * T * D.
        work: the one block that goes back, or the loss: whichever takes more.
        gathered: sharded: what is whole for a moment, of all weights, and its gradient.
        runtime: of a CUDA process beside its tensors.
    """

    weights: int
    training: int
    kept: int
    work: int
    gathered: int = 0
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def memory_of(
    config: ModelConfig,
    quant: QuantConfig | None,
    spec: TuneSpec,
    row_len: int,
    num_shards: int = 1,
) -> TuneMemory:
    """What a run takes on each GPU; allocates nothing.

    Args:
        config: the model.
        quant: how it is packed; None if it is dense.
        spec: the run's settings.
        row_len: tokens of a row.
        num_shards: GPUs that the model is sharded over; 1 is whole.
    """
    model = empty_model(config)
    dense_bytes = 4 if spec.full else 2
    weights = weight_bytes(model, quant, dense_bytes, dense_bytes)
    T, D = row_len, config.hidden_size
    whole = weights.packed + weights.g_idx  # buffers are not sharded
    training = num_trained(model, spec) * (12 if spec.full else 16)
    return TuneMemory(
        weights=whole + -(-(weights.total - whole) // num_shards),
        training=-(-training // num_shards),
        kept=config.num_layers * T * D * dense_bytes,
        work=max(
            _block_bytes(config, T) + (0 if quant is None else _dense_bytes(model)),
            _loss_bytes(config, T, full=spec.full),
        ),
        gathered=_gathered_bytes(model, quant, spec) if num_shards > 1 else 0,
    )


def require_room(memory: TuneMemory, free: int, num_shards: int = 1) -> None:
    """Refuse a run that a GPU certainly has no room for.

    Only what is there for the whole run is held against it; the rest is an estimate, and running
    out of memory is told when it happens.

    Args:
        memory: the run's.
        free: bytes of the GPU that nobody has.
        num_shards: GPUs that the model is sharded over.

    Raises:
        CapacityError: says by how much, and what would help.
    """
    need = memory.weights + memory.training + memory.kept
    if need <= free:
        return
    each = f"on each of {num_shards} GPUs " if num_shards > 1 else ""
    more = "more GPUs" if num_shards > 1 else "several GPUs that share the model (torchrun)"
    raise CapacityError(
        f"tuning needs {format_size(need)} {each}for weights, what trains them and the inputs of "
        f"blocks, and {format_size(free)} are free; give a shorter --context or --row, an adapter "
        f"instead of --full, a packed model, or {more}"
    )


def _block_bytes(config: ModelConfig, tokens: int) -> int:
    """What a block keeps on its second run, and takes to go back.

    For each token 8 D a norm, 16 Q for attention, and 6 F for an MLP or 9 F for a gated one: fitted
    to what was seen, and about what the operations' inputs and gradients add up to.
    """
    D, F, Q = config.hidden_size, config.mlp_size, config.num_heads * config.head_dim
    mlp = 9 if config.family == "llama" else 6
    return tokens * (8 * config.num_norms * D + 16 * Q + mlp * F)


def _loss_bytes(config: ModelConfig, tokens: int, *, full: bool) -> int:
    """Three times a chunk's logits, and four float32 copies of the last hidden state.

    With `full` the head in 16 bits too.
    """
    V, D = config.vocab_size, config.hidden_size
    chunk = 3 * min(CHUNK_BYTES, 4 * tokens * V)
    return chunk + 16 * tokens * D + (2 * V * D if full else 0)


def _gathered_bytes(model: Decoder, quant: QuantConfig | None, spec: TuneSpec) -> int:
    """Of a block in 16 bits: as it is used, as it arrives and as it is unpacked for the next.

    With `full` its gradient in 16 bits and, to be added up, in float32. Beside it the head, which
    stays from the beginning to the end; with `full` its gradient too.
    """
    block = next(iter(model.blocks))
    numbers = sum(parameter.numel() for parameter in block.parameters())
    if quant is not None:
        packed = (m for m in block.modules() if isinstance(m, Linear))
        numbers -= sum(m.in_features * m.out_features for m in packed)
    if not spec.full:
        numbers += num_trained(model, spec) // len(model.blocks)
    head = model.lm_head.in_features * model.lm_head.out_features
    return numbers * (12 if spec.full else 6) + head * (8 if spec.full else 2)


def _dense_bytes(model: Decoder) -> int:
    """The largest packed matrix, made dense in 16 bits."""
    return 2 * max(m.in_features * m.out_features for _, m in block_linears(model))


def num_trained(model: Decoder, spec: TuneSpec) -> int:
    """Numbers that a run trains."""
    if spec.full:
        return num_parameters(model)
    chosen = set(target_layers(model, spec.targets))
    sides = (m.in_features + m.out_features for name, m in adaptable(model) if name in chosen)
    return spec.rank * sum(sides)
