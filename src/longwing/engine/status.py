"""What an engine is, and how it is doing: numbers for /info, /metrics and the log. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What is served; it does not change while the engine lives.

    Attributes:
        name: the model folder's name.
        architecture: the model's family, "falcon" or "llama".
        quantization: "gptq 4-bit group 128", or "none".
        dtype: number type of the activations.
        kv_dtype: number type of cached keys and values.
        device: "cpu" or "cuda:0"; the first rank's.
        device_name: the card's or processor's name.
        vocab_size: tokens the model knows.
        context: longest prompt and answer together, in tokens.
        num_pages: pages of the KV cache.
        page_len: tokens in a page.
        kv_bytes: bytes of all pages; of each rank.
        weight_bytes: bytes of all weights; of the first rank.
        max_sequences: sequences in one batch at most.
        max_batch_tokens: tokens in one step at most.
        rope_method: "default", "dynamic"…; "alibi" for models without rotary positions.
        rope_rungs: lengths at which the RoPE base changes; a sequence keeps its rung.
        ranks: devices that share the model, each with a part of every matrix and page.
        adapters: names of the adapters that are served beside the model.
    """

    name: str
    architecture: str
    quantization: str
    dtype: str
    kv_dtype: str
    device: str
    device_name: str
    vocab_size: int
    context: int
    num_pages: int
    page_len: int
    kv_bytes: int
    weight_bytes: int
    max_sequences: int
    max_batch_tokens: int
    rope_method: str
    rope_rungs: tuple[int, ...]
    ranks: int = 1
    adapters: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Undo `asdict` and JSON, which knows no tuples."""
        lists = {name: tuple(wire[name]) for name in ("rope_rungs", "adapters")}
        return cls(**{**wire, **lists})


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of the engine.

    Attributes:
        method: "prefill" if any prompt tokens were read, else "decode".
        num_sequences: sequences in the batch.
        num_tokens: tokens run.
        seconds: how long it took.
    """

    method: str
    num_sequences: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """How the engine is doing. The gauges are of now, the counts since it started.

    Attributes:
        running: sequences at work.
        waiting: sequences that wait for their first chunk, or again after a preemption.
        pages_used: pages that a sequence holds.
        pages_cached: pages kept for their prefix alone.
        num_prompt_tokens: prompt tokens of requests begun.
        num_cached_tokens: those of them found in the prefix cache.
        num_generated_tokens: tokens generated.
        num_drafted: draft tokens tried.
        num_accepted: draft tokens that became text.
        num_preempted: sequences that lost their pages and began again.
        num_steps: steps done.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_preempted: int = 0
    num_steps: int = 0
