"""What a quantising run will take: memory and time, said before it starts.

Memory follows from shapes. Time is a count of operations over rates that are measured on the device
in a fraction of a second, so it knows the machine but not its other users.

Letters: K in features, N out features of a linear; T tokens of a sample, D model dim.
"""

import time
from dataclasses import dataclass

import torch

from longwing.layers import Linear
from longwing.models import Decoder, ModelConfig, empty_model
from longwing.quant.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes.

    Attributes:
        device_bytes: the most the computing device holds at once (host memory on a CPU), samples
            apart.
        sample_bytes: hidden states of the samples between blocks; on the device where they fit,
            else in host memory.
        disk_bytes: the result, and as much again for the journal while it runs.
        seconds: time of the whole run; None where nothing was measured.
    """

    device_bytes: int
    sample_bytes: int
    disk_bytes: int
    seconds: float | None


def estimate(
    config: ModelConfig,
    spec: QuantSpec,
    *,
    num_samples: int,
    seqlen: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Estimate:
    """Memory and time of quantising a model; measures the device for about a second."""
    model = empty_model(config)
    tokens = num_samples * seqlen
    streams = 2 if spec.needs_drift else 1
    packed = sum(_packed_bytes(linear, spec) for linear in _all_linears(model))
    tied = config.tie_embeddings and spec.rotate != "full"
    others = 2 * config.vocab_size * config.hidden_size * (1 if tied else 2)
    seconds = None
    if spec.method != "rtn":
        seconds = _seconds(model, spec, tokens, device, dtype)
    return Estimate(
        device_bytes=working_bytes(model, spec, seqlen, dtype.itemsize),
        sample_bytes=streams * tokens * config.hidden_size * dtype.itemsize,
        disk_bytes=2 * packed + others,
        seconds=seconds,
    )


def working_bytes(model: Decoder, spec: QuantSpec, longest: int, value_bytes: int) -> int:
    """The most a device holds at once, samples between blocks apart.

    A block's weights and the next one's, the statistics of its widest stage, and either what the
    solver holds on the worst linear (its docstring's count) or one pass of one sample, to which the
    methods that compare with full precision add a copy of the block. Or the embedding alone, at the
    start.
    """
    block = model.blocks[0]
    weights = sum(parameter.numel() for parameter in block.parameters()) * value_bytes
    sums = 2 if spec.needs_drift else 0 if spec.method == "rtn" else 1
    statistics = max(
        sum(4 * sums * _linear(block, group[0]).in_features ** 2 for group in stage)
        for stage in model.stages
    )
    solver = max(_solver_bytes(linear, spec) for linear in _linears(model))
    pass_bytes = 8 * longest * (model.config.mlp_size + 4 * model.config.hidden_size)
    embedding = model.embedding.weight.numel() * value_bytes
    if spec.needs_drift:
        pass_bytes += weights
    return max(2 * weights + statistics + max(solver, pass_bytes), embedding)


def _solver_bytes(linear: Linear, spec: QuantSpec) -> int:
    K, N = linear.in_features, linear.out_features
    if spec.method == "rtn":
        return 16 * K * N
    extra = (3, 5) if spec.method == "gptaq" else (2, 4)
    return 4 * (extra[0] * K * K + extra[1] * K * N)


def _seconds(
    model: Decoder, spec: QuantSpec, tokens: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Operations of all blocks over measured rates.

    Passes: to each stage on average half a block, and one whole; for full precision the last
    stage's is the whole one. Sums of products: T K² each. Solving: K³/3 + 5 N K², and some
    microseconds a column.
    """
    low, high = _rate(device, dtype), _rate(device, torch.float32)
    block = model.blocks[0]
    per_token = 2 * sum(linear.in_features * linear.out_features for linear in _linears(model))
    streams = 2 if spec.needs_drift else 1
    passes = (streams * (len(model.stages) + 1) / 2 + 0.5) * per_token * tokens / low
    products = streams * sum(
        2 * tokens * _linear(block, group[0]).in_features ** 2
        for stage in model.stages
        for group in stage
    )
    solving = sum(
        linear.in_features**3 / 3 + 5 * linear.out_features * linear.in_features**2
        for linear in _linears(model)
    )
    columns = sum(linear.in_features for linear in _linears(model)) * 1e-4
    return len(model.blocks) * (passes + products / low + solving / high + columns)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square product of this type, after one to warm up."""
    size = 4096 if device.type == "cuda" else 512
    left = torch.ones(size, size, device=device, dtype=dtype)
    for _ in range(2):
        started = time.perf_counter()
        (left @ left).sum().item()
        seconds = time.perf_counter() - started
    return float(2 * size**3 / seconds)


def _packed_bytes(linear: Linear, spec: QuantSpec) -> int:
    K, N = linear.in_features, linear.out_features
    return K * N * spec.bits // 8 + spec.num_groups(K) * N * 3 + 4 * K


def _linears(model: Decoder) -> list[Linear]:
    """The linears of one block."""
    block = model.blocks[0]
    return [_linear(block, name) for stage in model.stages for group in stage for name in group]


def _all_linears(model: Decoder) -> list[Linear]:
    return _linears(model) * len(model.blocks)


def _linear(block: torch.nn.Module, name: str) -> Linear:
    linear: Linear = block.get_submodule(name)  # type: ignore[assignment]
    return linear
