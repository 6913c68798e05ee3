r"""Attention over pages on one GPU: decode, prefill, and the write before them, beside torch's own.

    PYTHONPATH=src python bench/attention.py --out bench/results/attention.jsonl

Times are medians of CUDA graph replays. Decode goes from layer to layer over more cache than the L2
holds. "floor" is the time that the bytes need at
4.3 TB/s, or the products at 790 TFLOP/s, whichever is more; "of floor" is the share of it reached.
Decode counts all that a layer's step does: rotation and write, attention, and its merge. Where each
sequence brings one token to a cache of floats, attention itself rotates and writes, and
"two_launches_us" is the same step with a launch of its own for that.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longwing.kernels import AttentionInputs, AttentionSpec, KVPages
from longwing.kernels.paged_triton import NewKV, paged_attention
from longwing.kernels.write_triton import rotate_and_write

BYTES_PER_US, FLOPS_PER_US = 4.3e6, 790e6
ROTATED_BYTES = 400e6
DEVICE = "cuda"

HEADS = {
    "Falcon-40B": (128, 8, 64),
    "Falcon-7B": (71, 1, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
    "Gemma-7B": (16, 16, 256),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: sequences that each bring `new` tokens to a context of `context`."""

    model: str
    batch: int = 1
    new: int = 1
    context: int = 24_576
    page_len: int = 128
    kv: str = "bfloat16"
    most_context: int | None = None

    @property
    def heads(self) -> tuple[int, int, int]:
        return HEADS[self.model]

    @property
    def kv_bytes(self) -> int:
        _, K, H = self.heads
        return self.batch * self.context * K * 2 * (H + 4 if self.kv == "int8" else 2 * H)

    @property
    def writes_itself(self) -> bool:
        return self.new == 1 and self.kv != "int8"

    @property
    def flops(self) -> float:
        N, _, H = self.heads
        seen = self.new * (self.context - (self.new - 1) / 2)
        return 4.0 * self.batch * N * H * seen

    @property
    def floor_us(self) -> float:
        return max(self.kv_bytes / BYTES_PER_US, self.flops / FLOPS_PER_US)


DECODE = [
    *(Case(model="Falcon-40B", context=c) for c in (1024, 8192, 24_576, 131_072)),
    Case(model="Falcon-40B", context=1024, most_context=24_576),
    Case(model="Falcon-40B", page_len=32),
    Case(model="Falcon-40B", page_len=64),
    Case(model="Falcon-40B", kv="int8"),
    Case(model="Falcon-40B", batch=8, context=8192),
    Case(model="Falcon-40B", batch=16, context=1024),
    Case(model="Falcon-40B", batch=32, context=1024),
    Case(model="Falcon-40B", batch=32, context=1024, kv="int8"),
    Case(model="Falcon-40B", new=5, context=1024),
    Case(model="Falcon-40B", new=9, context=1024),
    Case(model="Falcon-40B", new=9),
    Case(model="Falcon-7B", context=1024),
    Case(model="Falcon-7B"),
    Case(model="Llama-3.1-8B", context=1024),
    Case(model="Llama-3.1-8B"),
    Case(model="Llama-2-7B", context=4096),
]
PREFILL = [
    *(Case(model="Falcon-40B", new=c, context=c) for c in (2048, 8192, 24_576)),
    *(Case(model="Falcon-40B", new=24_576, page_len=p) for p in (32, 64)),
    Case(model="Falcon-40B", new=4096),
    Case(model="Falcon-40B", new=512),
    Case(model="Falcon-40B", new=8192, context=8192, kv="int8"),
    Case(model="Falcon-7B", new=8192, context=8192),
    Case(model="Llama-3.1-8B", new=8192, context=8192),
    Case(model="Llama-2-7B", new=4096, context=4096),
    Case(model="Gemma-7B", new=8192, context=8192),
]


class Step:
    """A case's tensors: queries, keys and values of one projection, and a cache for each layer."""

    def __init__(self, case: Case, num_layers: int) -> None:
        torch.manual_seed(0)
        N, K, H = case.heads
        S, T = case.batch, case.batch * case.new
        num_pages = -(-case.context // case.page_len)
        self.case = case
        layers = tuple(self._filled(S * num_pages) for _ in range(num_layers))
        qkv_TXH = torch.randn(T, N + 2 * K, H, device=DEVICE, dtype=torch.bfloat16)
        self.parts = qkv_TXH.split([N, K, K], 1)
        angles_TF = torch.randn(T, H // 2, device=DEVICE)
        tables_SM = torch.randperm(S * num_pages, device=DEVICE).view(S, num_pages)
        at_ST = torch.arange(case.context - case.new, case.context, device=DEVICE).expand(S, -1)
        page_ST = tables_SM.gather(1, at_ST // case.page_len)
        self.inputs = AttentionInputs(
            starts_S1=torch.arange(S + 1, dtype=torch.int32, device=DEVICE) * case.new,
            context_lens_S=torch.full((S,), case.context, dtype=torch.int32, device=DEVICE),
            page_tables_SM=tables_SM.to(torch.int32),
            slots_T=(page_ST * case.page_len + at_ST % case.page_len).flatten(),
            pages=layers,
            cos_TF=angles_TF.cos(),
            sin_TF=angles_TF.sin(),
        )
        self.spec = AttentionSpec(scale=H**-0.5)

    def _filled(self, num_pages: int) -> KVPages:
        _, K, H = self.case.heads
        pages = KVPages.allocate(num_pages, self.case.page_len, K, H, self.case.kv, DEVICE)
        for numbers in (pages.keys_PBKH, pages.values_PBKH):
            numbers.random_(-127, 128) if self.case.kv == "int8" else numbers.normal_()
        for scales in (pages.key_scales_PBK, pages.value_scales_PBK):
            if scales is not None:
                scales.uniform_(0.005, 0.02)
        return pages

    def write(self, pages: KVPages) -> Tensor:
        inputs = self.inputs
        return rotate_and_write(*self.parts, inputs.cos_TF, inputs.sin_TF, pages, inputs.slots_T)

    def attend(self, q_TNH: Tensor, pages: KVPages, new: NewKV | None = None) -> Tensor:
        return paged_attention(
            q_TNH,
            pages,
            self.inputs,
            self.spec,
            most_new=self.case.new,
            most_context=self.case.most_context or self.case.context,
            new=new,
        )

    def attend_and_write(self, pages: KVPages) -> Tensor:
        """All of a layer's step, in the launches that `layers.Attention` makes of it."""
        if not self.case.writes_itself:
            return self.attend(self.write(pages), pages)
        (q_TNH, k_TKH, v_TKH), inputs = self.parts, self.inputs
        new = NewKV(
            k_TKH=k_TKH,
            v_TKH=v_TKH,
            cos_TF=inputs.cos_TF,
            sin_TF=inputs.sin_TF,
            slots_T=inputs.slots_T,
        )
        return self.attend(q_TNH, pages, new)


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 9) -> float:
    """Microseconds a call, of a graph of them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return median(_event_us(graph.replay) for _ in range(repeats)) / len(calls)


def _event_us(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def decode(case: Case) -> dict[str, float]:
    num_layers = max(2, min(60, round(ROTATED_BYTES / case.kv_bytes)))
    step = Step(case, num_layers)
    layers = step.inputs.pages
    q_TNH = step.write(layers[0])
    measured = {
        "us": graph_us([lambda p=p: step.attend_and_write(p) for p in layers]),
        "attention_us": graph_us([lambda p=p: step.attend(q_TNH, p) for p in layers]),
    }
    if case.writes_itself:
        two = [lambda p=p: step.attend(step.write(p), p) for p in layers]
        measured["two_launches_us"] = graph_us(two)
    return measured


def decode_peer(case: Case, backend: SDPBackend) -> dict[str, float]:
    """SDPA over contiguous keys, a KV head's query heads laid out as its tokens: its best form."""
    N, K, H = case.heads
    q = torch.randn(case.batch, K, N // K, H, device=DEVICE, dtype=torch.bfloat16)
    shape = (case.batch, K, case.context, H)
    num_layers = max(2, min(60, round(ROTATED_BYTES / case.kv_bytes)))
    caches = [
        [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "kv"]
        for _ in range(num_layers)
    ]
    with sdpa_kernel(backend):
        return {
            "attention_us": graph_us(
                [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v) for k, v in caches]
            )
        }


def prefill(case: Case) -> dict[str, float]:
    step = Step(case, 1)
    pages = step.inputs.pages[0]
    q_TNH = step.write(pages)
    return {
        "us": graph_us([lambda: step.attend(q_TNH, pages)] * 3, 5),
        "write_us": graph_us([lambda: step.write(pages)] * 3, 5),
    }


def prefill_peer(case: Case, backend: SDPBackend) -> dict[str, float]:
    N, K, H = case.heads
    q, k, v = (
        torch.randn(1, n, case.new, H, device=DEVICE, dtype=torch.bfloat16) for n in (N, K, K)
    )
    with sdpa_kernel(backend):
        call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        return {"us": graph_us([call] * 3, 5)}


def report(kind: str, who: str, case: Case, measured: dict[str, float]) -> dict[str, Any]:
    us = measured.get("us", measured.get("attention_us", 0.0))
    row = {
        "kind": kind,
        "who": who,
        "model": case.model,
        "batch": case.batch,
        "new": case.new,
        "context": case.context,
        "page_len": case.page_len,
        "kv": case.kv,
        "most_context": case.most_context,
        **{name: round(value, 2) for name, value in measured.items()},
        "floor_us": round(case.floor_us, 2),
        "of_floor": round(case.floor_us / us, 3),
        "tb_s": round(case.kv_bytes / us / 1e6, 3),
        "tflop_s": round(case.flops / us / 1e6, 1),
    }
    rate = f"{row['tb_s']:5.2f} TB/s" if kind == "decode" else f"{row['tflop_s']:5.0f} TFLOP/s"
    times = "  ".join(f"{name} {value:9.1f}" for name, value in measured.items())
    print(
        f"{kind:8}{who:10}{case.model:13} batch {case.batch:2} new {case.new:5} context "
        f"{case.context:6}{f' <= {case.most_context}' if case.most_context else ''} pages "
        f"{case.page_len:3} {case.kv:9}{rate} {row['of_floor']:6.0%} of floor  {times}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append a JSON line for each measurement")
    parser.add_argument("--model", choices=HEADS, help="only this model")
    parser.add_argument("--kind", choices=("decode", "prefill"), help="only these")
    args = parser.parse_args()
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(about)
    peers = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    jobs: list[tuple[str, str, Case, Callable[[], dict[str, float]]]] = []
    for case in DECODE:
        jobs.append(("decode", "longwing", case, lambda c=case: decode(c)))
        if case.new == 1 and case.kv == "bfloat16" and case.page_len == 128:
            jobs.append(("decode", "flash", case, lambda c=case: decode_peer(c, peers["flash"])))
    for case in PREFILL:
        jobs.append(("prefill", "longwing", case, lambda c=case: prefill(c)))
        if case.new == case.context and case.kv == "bfloat16" and case.page_len == 128:
            for name, backend in peers.items():
                if case.heads[2] <= 128:
                    run = lambda c=case, b=backend: prefill_peer(c, b)  # noqa: E731
                    jobs.append(("prefill", name, case, run))
    for kind, who, case, run in jobs:
        if args.model in (None, case.model) and args.kind in (None, kind):
            row = report(kind, who, case, run())
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
