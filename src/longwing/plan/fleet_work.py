"""The times and bytes of one replica's work: reading a prompt, one decode step, what memory holds.

What a fleet of them does under a load is `fleet.py`; the measured shares are `fleet_rates.py`.
"""

import math
from dataclasses import dataclass

from longwing.errors import RequestError
from longwing.models import ModelConfig, empty_model
from longwing.plan.fleet_rates import (
    ALL_REDUCE_S,
    ATTENTION_S,
    ATTENTION_SHARE,
    DENSE_MATMUL_SHARE,
    LINK_SHARE,
    MATMUL_SHARE,
    PREFILL_ATTENTION_SHARE,
    Card,
    share,
)
from longwing.plan.memory import PREFILL_CHUNK, Plan
from longwing.plan.speed import attention_flops
from longwing.plan.weights import block_linears

MOST_SEQUENCES = 512
"""No replica runs more at once; beyond it the shares are not known either."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a fleet.

    Attributes:
        rate: requests per second, arriving at random.
        prompt_len: tokens of each prompt.
        answer_len: tokens of each answer.
        share: of a prompt's tokens, those already in the cache of the replica that gets it.
        documents: different shared beginnings in use at once, spread over the replicas; None gives
            every running sequence one of its own.

    Raises:
        RequestError: a value out of its range.
    """

    rate: float
    prompt_len: int
    answer_len: int
    share: float = 0.0
    documents: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1e9:
            raise RequestError(f"rate is {self.rate} requests/s; it must be above 0")
        if not 0 <= self.share < 1:
            raise RequestError(f"share is {self.share}; it must be from 0 to below 1")
        for name in ("prompt_len", "answer_len", "documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be 1 or more")

    @property
    def shared_len(self) -> int:
        """Tokens of a prompt that need not be read; at least one always is."""
        return min(int(self.prompt_len * self.share), self.prompt_len - 1)

    @property
    def new_len(self) -> int:
        """Tokens of a prompt that are read."""
        return self.prompt_len - self.shared_len


class Replica:
    """One engine on its GPUs. Times are the replica's, whatever the number of its GPUs.

    Args:
        config: the model.
        planned: what it takes in memory.
        card: the GPU.
        num_gpus: that share weights and cache.
        load: what it is asked.
    """

    def __init__(
        self, config: ModelConfig, planned: Plan, card: Card, num_gpus: int, load: Load
    ) -> None:
        self.config, self.planned, self.card, self.num_gpus = config, planned, card, num_gpus
        self.load = load
        weights = planned.weights
        model = empty_model(config)
        self.block_weights = sum(
            linear.in_features * linear.out_features for _, linear in block_linears(model)
        )
        self.block_bytes = weights.packed + weights.linears
        self.head_weights = model.lm_head.in_features * model.lm_head.out_features
        self.head_bytes = weights.head or weights.embedding
        self.shares = DENSE_MATMUL_SHARE if planned.bits is None else MATMUL_SHARE
        # One all-reduce a block where attention and MLP add to one residual, else two.
        self.all_reduces = config.num_layers * (1 if config.parallel_block else 2)
        self.chunks = math.ceil(load.new_len / PREFILL_CHUNK)
        self.bytes_seen = self._bytes_seen()
        self.read_attention_s = self._read_attention_s()
        self.read_s = self._read_linear_s() + self.read_attention_s

    def matmul_s(self, tokens: float) -> float:
        """The blocks' products and the sums over GPUs, for that many tokens at once."""
        card = self.card
        limit = max(self.block_bytes / card.bandwidth, 2 * tokens * self.block_weights / card.flops)
        seconds = limit / share(self.shares, tokens) / self.num_gpus
        if self.num_gpus > 1:
            value_bytes = 2 * tokens * self.config.hidden_size
            moved = 2 * (self.num_gpus - 1) / self.num_gpus * value_bytes
            seconds += self.all_reduces * (ALL_REDUCE_S + moved / (card.link * LINK_SHARE))
        return seconds

    def head_s(self, sequences: float) -> float:
        """The output head, for each sequence's last token."""
        limit = max(
            self.head_bytes / self.card.bandwidth,
            2 * sequences * self.head_weights / self.card.flops,
        )
        return limit / share(DENSE_MATMUL_SHARE, sequences) / self.num_gpus

    def cache_s(self, sequences: float) -> float:
        """Attention of a decode step; a sequence is on average half way through its answer."""
        rate = self.card.bandwidth * ATTENTION_SHARE * self.num_gpus
        return self.config.num_layers * ATTENTION_S + sequences * self.bytes_seen / rate

    def _bytes_seen(self) -> float:
        """Cache bytes that one sequence's next token attends to."""
        seen = self.load.prompt_len + self.load.answer_len / 2
        per_token = self.planned.kv_bytes_per_token / self.config.num_layers
        return sum(
            per_token * (seen if window is None else min(window, seen))
            for window in self.config.windows
        )

    def step_s(self, sequences: float) -> float:
        """A step that only decodes."""
        at_least = max(sequences, 1.0)
        return self.matmul_s(at_least) + self.head_s(at_least) + self.cache_s(sequences)

    def _read_attention_s(self) -> float:
        """Attention of a prompt's new tokens to all before them: a triangle less its top."""
        load, config = self.load, self.config
        operations = attention_flops(config, load.prompt_len)
        if load.shared_len:
            operations -= attention_flops(config, load.shared_len)
        return operations / (self.card.flops * PREFILL_ATTENTION_SHARE) / self.num_gpus

    def _read_linear_s(self) -> float:
        """The blocks' products over a prompt's chunks, with nothing else in the steps.

        The last block's too, most of which the engine spares: at 60 blocks 1% more than it does.
        """
        whole, rest = divmod(self.load.new_len, PREFILL_CHUNK)
        return whole * self.matmul_s(PREFILL_CHUNK) + (self.matmul_s(rest) if rest else 0.0)

    def own_len(self) -> int:
        """Tokens that a running sequence keeps for itself alone."""
        shared = self.load.shared_len if self.load.documents is not None else 0
        return self.load.prompt_len - shared + self.load.answer_len

    def sequences_fit(self, replicas: int) -> int:
        """Sequences in memory beside weights, workspace and the shared beginnings."""
        planned, load = self.planned, self.load
        free = self.card.memory * self.num_gpus - planned.weights.total
        free -= planned.workspace.total * self.num_gpus
        if load.documents is not None:
            documents = math.ceil(load.documents / replicas)
            free -= documents * load.shared_len * planned.kv_bytes_per_token
        fit = free // (self.own_len() * planned.kv_bytes_per_token)
        return max(min(fit, MOST_SEQUENCES), 0)
