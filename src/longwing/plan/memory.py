"""`Plan`: what a model needs in memory at a given context, and how much context fits.

The one idea: what is stored is exact, what is worked with is a bound. Weights (`weights.py`) and
cache follow from shapes alone; `workspace.py` bounds what a forward pass holds beside them. The sum
grows with the context, so the longest that fits is found by halving.

Not counted: the engine's rounding of a sequence up to whole pages. Sizes are in bytes and lengths
in tokens throughout.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from longwing.checkpoint import QuantConfig
from longwing.errors import CapacityError, RequestError
from longwing.models import DTYPES, ModelConfig, empty_model
from longwing.plan.sizes import format_size
from longwing.plan.weights import (
    WeightBytes,
    block_linears,
    check_group_size,
    num_parameters,
    weight_bytes,
)
from longwing.plan.workspace import (
    Workspace,
    activation_bytes,
    attends_streamed,
    dense_slice_bytes,
    dequantised_bytes,
    graphs_bytes,
    logits_bytes,
    mask_bytes,
    rope_table_bytes,
    runs_streamed,
    unpacked_zeros_bytes,
)

PREFILL_CHUNK = 2048
"""Tokens of a prompt per forward pass, for which activations are planned."""

LONGEST = 2**30
"""No context above this is planned; rotary settings stop there too."""


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How a key or a value vector of one head is cached.

    Attributes:
        bits: of one number.
        vector_bytes: kept beside each vector: a float16 scale and a float16 zero, or nothing.
    """

    bits: int
    vector_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model needs at one context and batch, and what fits.

    Attributes:
        model: its name.
        parameters: a tied embedding counts once.
        quantised_parameters: those in packed matrices; 0 for a dense model.
        bits: width of a packed weight; None for a dense model.
        group_size: weights that share a scale, -1 for a whole column; None for a dense model.
        dtype: of dense weights and activations.
        head_dtype: of the output head.
        kv_dtype: of the cache, a key of KV_FORMATS.
        context: tokens of one sequence, prompt and answer.
        claimed_context: tokens the model's own settings claim to serve.
        batch: sequences held at once, each of `context` tokens.
        weights: bytes by kind.
        kv_bytes_per_token: cache bytes that one token of one sequence adds.
        kv_bytes_read_per_step: cache bytes that a decode step reads, of all sequences at the full
            context; less than `kv_bytes` where a sliding window is shorter than the context.
        workspace: bytes by kind.
        memory: bytes there are; None when it was not said.
        longest_context: the largest context at which this batch fits, 0 if none does; None without
            `memory`. Not limited by what the model claims.
        longest_context_note: what to know about that number, or "".
    """

    model: str
    parameters: int
    quantised_parameters: int
    bits: int | None
    group_size: int | None
    dtype: str
    head_dtype: str
    kv_dtype: str
    context: int
    claimed_context: int
    batch: int
    weights: WeightBytes
    kv_bytes_per_token: int
    kv_bytes_read_per_step: int
    workspace: Workspace
    memory: int | None
    longest_context: int | None
    longest_context_note: str

    @property
    def kv_bytes(self) -> int:
        """The cache at the full context of every sequence: kv_bytes_per_token * context * batch.

        Sliding windows save nothing here: all tokens stay cached.
        """
        return self.kv_bytes_per_token * self.context * self.batch

    @property
    def peak_bytes(self) -> int:
        """Weights, cache and workspace together."""
        return self.weights.total + self.kv_bytes + self.workspace.total

    @property
    def headroom_bytes(self) -> int | None:
        """Memory left at the peak; negative by how much is lacking."""
        return None if self.memory is None else self.memory - self.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the memory; None when that was not said."""
        return None if self.memory is None else self.peak_bytes <= self.memory

    def to_json(self) -> dict[str, int | str | bool | None]:
        """One flat object of numbers and words: sizes in bytes, lengths in tokens."""
        weights, workspace = self.weights, self.workspace
        return {
            "model": self.model,
            "parameters": self.parameters,
            "quantised_parameters": self.quantised_parameters,
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": self.dtype,
            "head_dtype": self.head_dtype,
            "kv_dtype": self.kv_dtype,
            "context": self.context,
            "claimed_context": self.claimed_context,
            "batch": self.batch,
            **{f"{part}_bytes": size for part, size in asdict(weights).items()},
            "packed_bytes": weights.packed,
            "weight_bytes": weights.total,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_read_per_step": self.kv_bytes_read_per_step,
            **{f"workspace_{part}_bytes": size for part, size in asdict(workspace).items()},
            "workspace_bytes": workspace.total,
            "peak_bytes": self.peak_bytes,
            "memory_bytes": self.memory,
            "fits": self.fits,
            "headroom_bytes": self.headroom_bytes,
            "longest_context": self.longest_context,
            "longest_context_note": self.longest_context_note,
        }


def plan(
    config: ModelConfig,
    *,
    context: int,
    batch: int = 1,
    quant: QuantConfig | None = None,
    bits: int | None = None,
    group_size: int = 128,
    dtype: str = "bfloat16",
    head_dtype: str | None = None,
    kv_dtype: str | None = None,
    memory: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    name: str | None = None,
) -> Plan:
    """Plan a model. Takes well under a second for any size; allocates nothing.

    Args:
        config: the model.
        context: tokens of one sequence, prompt and answer.
        batch: sequences held at once.
        quant: how the blocks of an existing folder are packed, whose last group may be ragged; None
            for a dense model, or with `bits`. `dynamic` rules and a packed head are not counted.
        bits: 2, 3, 4 or 8 for a quantisation to come, every group of which must be whole.
        group_size: weights that share a scale; -1 for a whole column. Of no meaning without `bits`.
        dtype: of dense weights and activations: bfloat16, float16 or float32.
        head_dtype: of the output head; None is `dtype`. Another makes a tied head a copy.
        kv_dtype: of the cache, a key of KV_FORMATS; None is `dtype`, as the plain engine keeps it.
        memory: bytes there are; None if only the need is asked for.
        prefill_chunk: tokens of a prompt per forward pass.
        name: what to call the model; None is its model type.

    Raises:
        ConfigError: bits or group size do not fit the model; says which layer and what does fit.
        RequestError: another argument is out of its range; or both `quant` and `bits` are given.
    """
    _check_count("context", context)
    _check_count("batch", batch)
    _check_count("prefill_chunk", prefill_chunk)
    if memory is not None and memory < 1:
        raise RequestError(f"memory of {memory} bytes is not above 0; leave it out if unknown")
    head_dtype, kv_dtype = head_dtype or dtype, kv_dtype or dtype
    _check_word("dtype", dtype, DTYPES)
    _check_word("head dtype", head_dtype, DTYPES)
    _check_word("KV dtype", kv_dtype, KV_FORMATS)
    value_bytes, head_bytes = DTYPES[dtype].itemsize, DTYPES[head_dtype].itemsize
    model = empty_model(config)
    if bits is not None:
        if quant is not None:
            raise RequestError("give either the settings of a quantised folder or bits, not both")
        quant = QuantConfig(bits=bits, group_size=group_size)
        check_group_size(model, quant)
    weights = weight_bytes(model, quant, value_bytes, head_bytes)
    kv_per_token = kv_bytes_per_token(config, kv_dtype)
    has_mask = not attends_streamed(config, value_bytes)
    streamed = quant is not None and runs_streamed(model, quant, value_bytes)
    records = not has_mask and (quant is None or streamed)

    def dequantised(tokens: int) -> int:
        if quant is None:
            return 0
        if streamed:
            return dense_slice_bytes(model, tokens, value_bytes)
        return dequantised_bytes(model, value_bytes)

    def unpacked_zeros() -> int:
        # Symmetric weights have none on a GPU. The packed ones stay counted: under 1 %.
        if quant is None or (streamed and quant.sym):
            return 0
        return unpacked_zeros_bytes(weights, quant.bits)

    def workspace(context: int) -> Workspace:
        chunk = min(prefill_chunk, context)
        return Workspace(
            activations=activation_bytes(config, max(chunk, batch), value_bytes),
            mask=mask_bytes(config, chunk, context, value_bytes) if has_mask else 0,
            dequantised=dequantised(chunk),
            unpacked_zeros=unpacked_zeros(),
            logits=logits_bytes(config, batch, head_bytes),
            rope_tables=rope_table_bytes(config, context),
            graphs=graphs_bytes(config, batch) if records else 0,
        )

    def fits(context: int) -> bool:
        need = weights.total + kv_per_token * context * batch + workspace(context).total
        return memory is not None and need <= memory

    longest = None if memory is None else _largest(fits)
    packed = sum(linear.in_features * linear.out_features for _, linear in block_linears(model))
    return Plan(
        model=name or config.model_type,
        parameters=num_parameters(model),
        quantised_parameters=0 if quant is None else packed,
        bits=None if quant is None else quant.bits,
        group_size=None if quant is None else quant.group_size,
        dtype=dtype,
        head_dtype=head_dtype,
        kv_dtype=kv_dtype,
        context=context,
        claimed_context=config.context,
        batch=batch,
        weights=weights,
        kv_bytes_per_token=kv_per_token,
        kv_bytes_read_per_step=batch * _kv_bytes_read(config, kv_per_token, context),
        workspace=workspace(context),
        memory=memory,
        longest_context=longest,
        longest_context_note="" if longest is None else _note(config, longest),
    )


def require_fit(plan: Plan) -> None:
    """Do nothing if the plan fits, or if nobody said into how much.

    Raises:
        CapacityError: it does not; says by how much, and what would fit.
    """
    if plan.memory is None or plan.fits:
        return
    remedy = (
        f"a context of {plan.longest_context:,} or less fits"
        if plan.longest_context
        else "no context fits; use fewer bits, a smaller batch or more memory"
    )
    raise CapacityError(
        f"{plan.model} at {plan.context:,} tokens needs {format_size(plan.peak_bytes)}, "
        f"{format_size(plan.peak_bytes - plan.memory)} more than the {format_size(plan.memory)} "
        f"there are; {remedy}"
    )


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Cache bytes of one token: a key and a value vector for every KV head of every layer."""
    kept = KV_FORMATS[kv_dtype]
    vector = -(-config.head_dim * kept.bits // 8) + kept.vector_bytes
    return 2 * config.num_layers * config.num_kv_heads * vector


def _kv_bytes_read(config: ModelConfig, kv_per_token: int, context: int) -> int:
    """Cache bytes that one sequence's next token attends to: in each layer, at most its window."""
    seen = (context if window is None else min(window, context) for window in config.windows)
    return kv_per_token // config.num_layers * sum(seen)


def beyond_claim(context: int, claimed: int) -> str:
    """A warning where a context is longer than the model's settings claim, else ""."""
    return f"beyond the {claimed:,} that the model claims" if context > claimed else ""


def _note(config: ModelConfig, longest: int) -> str:
    """What to know about a longest context."""
    if longest == 0:
        return "not even one token fits beside weights and workspace"
    return beyond_claim(longest, config.context)


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest n up to LONGEST that holds, 0 if none; once lost it must not come back."""
    low, high = 0, 1
    while high <= LONGEST and holds(high):
        low, high = high, 2 * high
    high = min(high, LONGEST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check_count(label: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST:
        raise RequestError(f"{label} is {value!r}; a whole number from 1 to {LONGEST:,} is needed")


def _check_word(label: str, word: str, known: Mapping[str, object]) -> None:
    if word not in known:
        raise RequestError(f'{label} "{word}" is not one of {", ".join(known)}')


KV_FORMATS: Mapping[str, KVFormat] = {
    "bfloat16": KVFormat(bits=16),
    "float16": KVFormat(bits=16),
    "float32": KVFormat(bits=32),
    "fp8": KVFormat(bits=8),
    "int8": KVFormat(bits=8, vector_bytes=4),
    "int4": KVFormat(bits=4, vector_bytes=4),
}
"""Number types a cache can be planned in."""
