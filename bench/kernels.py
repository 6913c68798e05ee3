"""Packed-weight multiplication on one GPU: microseconds and % of the memory's bandwidth.

    python bench/kernels.py --out bench/results/kernels.jsonl
    python bench/kernels.py --cuts            # what `choose_cut` was chosen from

Falcon-40B's shapes (and its fused ones), random weights, bfloat16. Side by side: cuBLAS on dense
bfloat16 weights, this package's dequantise-then-cuBLAS, and torch's own 4-bit kernel. Weights are
rotated over more than 300 MB, so none is found in the L2 cache; launches are timed by events inside
CUDA graphs, the median of several replays. Every figure's product is first held to float64.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.kernels import wna16_triton as kernels
from longwing.kernels.streamed import CELL_OUT, TILE_OUT, TOKEN_TILES, StreamedWeight
from longwing.kernels.wna16_after import After
from longwing.kernels.wna16_cut import Cut
from longwing.kernels.wna16_dense import dequantize, multiply_dense

SHAPES = {  # K, N
    "qkv": (8192, 9216),
    "dense": (8192, 8192),
    "up": (8192, 32768),
    "down": (32768, 8192),
    "qkv|up": (8192, 41984),
    "dense+down": (40960, 8192),
}
FORMATS = [  # bits, group size, symmetric
    (4, 128, True),
    (4, 128, False),
    (4, 64, True),
    (4, 32, True),
    (4, -1, True),
    (3, 128, True),
    (3, -1, True),
    (2, 64, True),
    (8, 128, True),
]
ROTATED = 300e6
BATCHES = (1, 4, 8, 16, 32, 64)
PREFILL = (128, 256, 512, 2048)

Record = Callable[[dict[str, object]], None]


def random_weight(bits: int, K: int, N: int, group_size: int, symmetric: bool) -> StreamedWeight:
    """Any words are some weights; scales keep products near 1."""
    own = K if group_size == -1 else group_size
    groups = K // own
    words = torch.randint(-(2**31), 2**31, (N // CELL_OUT, K // 128, bits, 128), device="cuda")
    zeros = torch.randint(-(2**31), 2**31, (groups, N // 4), device="cuda") & 0x03030303
    scales_GN = (torch.rand(groups, N, device="cuda") + 0.5) / 2**bits / K**0.5
    return StreamedWeight(
        bits=bits,
        group_size=own,
        in_features=K,
        parts=(N,),
        dtype=torch.bfloat16,
        words=words.to(torch.int32),
        scales_GN=scales_GN.bfloat16(),
        zeros=None if symmetric else zeros.to(torch.int32),
        order_K=None,
        arrivals=torch.zeros(TOKEN_TILES * N // TILE_OUT, dtype=torch.int32, device="cuda"),
    )


def microseconds(call: Callable[[int], object], copies: int, launches: int = 24) -> float:
    """Median over replays of a graph of launches, each on the next copy of the weights."""
    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i % copies)
    for _ in range(20):  # a kernel that computes a lot slows the clock for a while after it
        graph.replay()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / launches)
    return float(statistics.median(times))


def bandwidth() -> float:
    """Bytes a second that a reduction reads: the rate that percentages refer to."""
    data = torch.ones(2**30, dtype=torch.float32, device="cuda")
    return data.nbytes / microseconds(lambda _: data.sum(), 1, 4) * 1e6


def error_of(x_TK: Tensor, weight: StreamedWeight, cut: Cut | None) -> float:
    """Relative to float64, over the first 512 outputs."""
    exact = x_TK.double() @ dequantize(weight, 0, 512).double().T
    out = kernels.packed_matmul(x_TK, weight, cut)[:, :512].double()
    return float((out - exact).norm() / exact.norm())


def rotated(bits: int, K: int, N: int, group_size: int, symmetric: bool) -> list[StreamedWeight]:
    """As many weights as the L2 cache forgets between two uses of one."""
    first = random_weight(bits, K, N, group_size, symmetric)
    copies = int(ROTATED / first.nbytes) + 1
    return [first, *(random_weight(bits, K, N, group_size, symmetric) for _ in range(copies))]


def ours(x_TK: Tensor, weights: list[StreamedWeight], cut: Cut | None = None) -> float:
    """Microseconds of `packed_matmul`."""
    return microseconds(lambda i: kernels.packed_matmul(x_TK, weights[i], cut), len(weights))


def dense_first(x_TK: Tensor, weights: list[StreamedWeight]) -> float:
    """Microseconds of dequantising, then cuBLAS, for any number of tokens."""
    out_TN = x_TK.new_empty(len(x_TK), weights[0].starts[-1])
    plain = After()
    return microseconds(lambda i: multiply_dense(x_TK, weights[i], plain, out_TN), len(weights), 6)


def cublas(x_TK: Tensor, N: int) -> float:
    """Microseconds of cuBLAS on dense weights."""
    dense = [torch.randn(N, x_TK.shape[1], device="cuda").bfloat16() for _ in range(3)]
    return microseconds(lambda i: F.linear(x_TK, dense[i]), 3, 6)


def torch_int4(x_TK: Tensor, N: int) -> float:
    """Microseconds of torch's own 4-bit kernel, groups of 128."""
    K = x_TK.shape[1]
    bytes_NK = torch.randint(256, (N, K // 2), device="cuda", dtype=torch.uint8)
    weights = [torch.ops.aten._convert_weight_to_int4pack(bytes_NK ^ i, 8) for i in range(3)]
    scales = torch.ones(K // 128, N, 2, device="cuda").bfloat16()
    return microseconds(
        lambda i: torch.ops.aten._weight_int4pack_mm(x_TK, weights[i], 128, scales), 3, 6
    )


def cuts(record: Record) -> None:
    """Times of cuts around the chosen ones."""
    for name in ("dense", "qkv", "up", "qkv|up", "dense+down"):
        K, N = SHAPES[name]
        for bits in (4, 3):
            weights = rotated(bits, K, N, 128, True)
            for tokens, stages in [(2, 3), (2, 4), (8, 3), (16, 3), (16, 4), (32, 3), (64, 3)]:
                x_TK = torch.randn(1 if tokens == 2 else tokens, K, device="cuda").bfloat16()
                splits = {round(programs * TILE_OUT / N) for programs in range(132, 925, 132)}
                us = {
                    n: ours(x_TK, weights, Cut(tokens=tokens, splits=n, stages=stages))
                    for n in sorted(splits - {0})
                }
                row = " ".join(f"{n}:{time:.1f}" for n, time in us.items())
                print(f"{name:10} {bits} bits tokens {tokens:2} stages {stages}  {row}", flush=True)
                record({"cuts": name, "bits": bits, "tokens": tokens, "stages": stages, "us": us})


def compare(record: Record, rate: float, shapes: list[str]) -> None:
    """The table: what others take for a product, then ours by format."""
    for name in shapes:
        K, N = SHAPES[name]
        batches = BATCHES if "|" in name or "+" in name else (*BATCHES, *PREFILL)
        xs = {T: torch.randn(T, K, device="cuda").bfloat16() for T in batches}
        us = {T: cublas(x, N) for T, x in xs.items()}
        report(record, name, "cuBLAS bf16", 2 * K * N, us, rate)
        us = {T: torch_int4(x, N) for T, x in xs.items() if T <= 16}
        report(record, name, "torch int4 g128", K * N // 2 + K // 32 * N, us, rate)
        for bits, group_size, symmetric in FORMATS:
            weights = rotated(bits, K, N, group_size, symmetric)
            full = (bits, group_size, symmetric) == FORMATS[0]
            us = {}
            for T in batches if full else BATCHES:
                error = error_of(xs[T], weights[0], None)
                assert error < 5e-3, (name, bits, group_size, T, error)
                us[T] = ours(xs[T], weights)
            kind = f"{bits} bits g{group_size}{'' if symmetric else ' asym'}"
            report(record, name, kind, weights[0].nbytes, us, rate)
            if full:
                us = {T: dense_first(x, weights) for T, x in xs.items() if T >= 64}
                report(record, name, "dequantise, cuBLAS", weights[0].nbytes, us, rate)


def report(
    record: Record,
    name: str,
    kind: str,
    nbytes: int,
    times: dict[int, float],
    rate: float,
) -> None:
    """One line of the table, and of the file."""
    of_rate = nbytes / (times[min(times)] * 1e-6) / rate
    row = " ".join(f"{T}:{us:.1f}" for T, us in times.items())
    print(f"{name:10} {kind:20} {of_rate:4.0%} at {min(times)}, us by tokens  {row}", flush=True)
    record({"shape": name, "kind": kind, "bytes": nbytes, "us": times, "of_bandwidth": of_rate})


def main() -> None:
    """Print the table, write it as lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--cuts", action="store_true", help="try cuts instead of comparing")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:

        def record(line: dict[str, object]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        rate = bandwidth()
        device = torch.cuda.get_device_name()
        print(f"{device}, reads {rate / 1e12:.2f} TB/s")
        record({"device": device, "torch": torch.__version__, "bytes_per_s": rate})
        cuts(record) if args.cuts else compare(record, rate, args.shapes)


if __name__ == "__main__":
    main()
