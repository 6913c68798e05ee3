"""How close our kernels and our HTTP process come to the hardware: measured figures, in one place.

Every number that `fleet.py` reckons with and that is not arithmetic stands here, with its source:
`bench/results/*.jsonl` by way of `bench/RESULTS.md`, where machine and command are. Tests hold the
shares against those files. What was not measured is called an assumption.

The one idea: a kernel's time is the larger of its bytes over the bandwidth and its operations over
the rate, divided by the share of that limit which it was seen to reach. The shares were measured on
an H200 with Falcon-40B's shapes, and are taken over for other cards and models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from longwing.plan.speed import BANDWIDTH


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU.

    Attributes:
        name: as in BANDWIDTH.
        memory: usable bytes.
        bandwidth: bytes per second that reads reach.
        flops: 16-bit operations per second that large matrix products reach.
        link: bytes per second to the other cards of its machine, one way; 0 if only PCIe.
        assumed: what of this is not measured, for people.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    assumed: str


_DATASHEET = "all rates but the bandwidth are 80% of the data sheet's; shares as on an H200"

CARDS: Mapping[str, Card] = {
    name: Card(
        name=name, memory=memory, bandwidth=BANDWIDTH[name], flops=flops, link=link, assumed=assumed
    )
    for name, memory, flops, link, assumed in (
        # 139.8 GiB as torch sees it; 733 to 816 TFLOP/s were measured in bfloat16.
        ("H200", 150_100_000_000, 790e12, 450e9, "the link's rate is the data sheet's"),
        ("H100 SXM", 84_900_000_000, 790e12, 450e9, _DATASHEET),
        ("A100 80GB", 84_900_000_000, 250e12, 300e9, _DATASHEET),
        ("A100 40GB", 42_300_000_000, 250e12, 300e9, _DATASHEET),
        ("RTX 4090", 25_700_000_000, 132e12, 0.0, _DATASHEET),
        ("A10G", 24_100_000_000, 70e12, 0.0, _DATASHEET),
    )
}
"""Cards that a fleet can be planned of. Without a link a model cannot be split over cards here."""

MATMUL_SHARE: Mapping[int, float] = {
    1: 0.79,
    8: 0.71,
    16: 0.60,
    32: 0.50,
    64: 0.45,
    128: 0.485,
    256: 0.53,
    512: 0.59,
    2048: 0.79,
}
"""Tokens in a step -> share of the limit reached by a layer's four packed products.

H200, Falcon-40B's shapes, 4 bits in groups of 128; sum of the four over the sum of their limits
(4.3 TB/s, 790 TFLOP/s). `bench/results/kernels.jsonl`.
"""

DENSE_MATMUL_SHARE: Mapping[int, float] = {1: 0.97, 64: 0.89, 128: 0.86, 512: 0.92, 2048: 0.89}
"""The same for bfloat16 weights through cuBLAS; the output head is such a product."""

ATTENTION_S = 8e-6
"""Seconds a layer's attention takes in a decode step before the first byte is read: four launches.

With `ATTENTION_SHARE` this gives the measured decode times of `bench/results/attention.jsonl` (1 to
32 sequences, 1K to 128K) within 25%, and within 5% from 24K on.
"""

ATTENTION_SHARE = 0.95
"""Of the bandwidth that decoding reaches on the cache's bytes beyond that."""

PREFILL_ATTENTION_SHARE = 0.58
"""Of the rate of matrix products that attention over prompts of 8K and more reaches: 464 of 790."""

ALL_REDUCE_S = 4e-6
"""Seconds that a sum over a machine's GPUs takes before its bytes are moved.

With `LINK_SHARE` this gives the sums of `bench/results/sums.jsonl` within 25%: two H200, of few
tokens in each other's memory, of many in NCCL. For more GPUs and other links both are assumptions.
"""

LINK_SHARE = 0.64
"""Of the link's rate that large sums reach."""

TOKENS_PER_CPU_S = 145_000.0
"""Prompt tokens that one core turns text into: Falcon's tokenizer, documents of 110,000 letters.

Measured on a core of an AMD EPYC shared with other work: `bench/http_cpu.py`, and for the three
figures below too.
"""

BYTES_PER_TOKEN = 4.8
"""Of English speeches under Falcon's tokenizer."""

EVENTS_PER_CPU_S = 25_000.0
"""Streamed tokens that a core of the HTTP process sends, from a scripted engine."""

REQUESTS_PER_CPU_S = 470.0
"""Requests that it takes in and answers, tokens and their reading apart."""

BYTES_PER_EVENT = 160
"""Of one streamed token as TGI's route sends it, headers of packets apart."""


def share(table: Mapping[int, float], tokens: float) -> float:
    """The share at a number of tokens, between two measured ones by the logarithm."""
    low, at_low = 0, 0.0
    for high, at_high in table.items():  # tables are written in rising order
        if tokens <= high:
            part = math.log(tokens / low) / math.log(high / low) if low else 1.0
            return at_low + part * (at_high - at_low)
        low, at_low = high, at_high
    return at_low
