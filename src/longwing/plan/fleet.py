"""`plan_fleet`: how many GPUs a load takes, and what it waits for on them.

Holds the steady state of a replica under its share of the load, the number of replicas, and what
tokenising, HTTP and network must carry. The times of a replica's work are `fleet_work.py`.

The one idea: a replica's step answers every running sequence by one token and reads one chunk of
the prompt at the head of the queue. So decoding slows reading and reading slows decoding, and three
things can run out: steps for chunks, memory for sequences, time for bytes.

    step   s    time of a step that only decodes, for the B sequences that run
    read   P    time of a prompt's chunks alone; n of them, c = P / n each
    first token W = P + n s, once at the head; before that it queues behind others
    use         u = rate W, the share of time with a prompt at the head
    queue       u W / (2 (1 - u)): arrivals at random, equal work (M/D/1)
    stream  D   a stream gets a token every s while nothing is read, every s + c while something is,
                and begins with the work that queued behind its prompt, on average
                V = (u + u^2 / (2 (1 - u))) W:  answer = ((1 - u) D - V) / s + (u D + V) / (s + c)
    running     B = rate D (Little's law)

Left out: norms, activation functions, gaps between launches and the host's work (no whole step has
been timed); unequal lengths, which lengthen queues; bursts; uneven routing; peaks of the number of
streams, whose mean must fit; refused requests that come back; restarts. So a real fleet is larger
than planned, never smaller.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from longwing.checkpoint import QuantConfig
from longwing.errors import CapacityError, RequestError
from longwing.models import ModelConfig
from longwing.plan.fleet_rates import (
    BYTES_PER_EVENT,
    BYTES_PER_TOKEN,
    EVENTS_PER_CPU_S,
    REQUESTS_PER_CPU_S,
    TOKENS_PER_CPU_S,
    Card,
)
from longwing.plan.fleet_work import MOST_SEQUENCES, Load, Replica
from longwing.plan.memory import plan

UTILISATION = 0.8
"""Of a replica's highest rate that a fleet is sized for: at more, queues grow quickly."""


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """A fleet under a load. Times in seconds, sizes in bytes, lengths in tokens.

    Attributes:
        model: its name.
        card: the GPU's name.
        tensor_parallel: GPUs of one replica.
        replicas: how many.
        load: what they carry.
        weight_bytes: on each GPU.
        kv_bytes_per_sequence: of one running sequence on each GPU, its own pages only.
        sequences_fit: that the memory of a replica holds, shared beginnings deducted.
        sequences: that run on a replica in the steady state.
        read_s: P, a prompt's chunks alone.
        read_attention_s: of this, attention.
        step_s: a decode step of those sequences.
        step_cache_s: of this, reading the cache.
        first_token_s: time to the first token, queue included.
        queue_s: of this, waiting for a place.
        between_tokens_s: from one token of a stream to the next.
        utilisation: the rate over the highest there is; 1 is the end.
        highest_rate: requests per second that one replica can bear.
        bottleneck: what ends it there: "reading prompts", "memory for sequences" or "decoding".
        fits: the load is below the limit, and the weights are in memory.
    """

    model: str
    card: str
    tensor_parallel: int
    replicas: int
    load: Load
    weight_bytes: int
    kv_bytes_per_sequence: int
    sequences_fit: int
    sequences: float
    read_s: float
    read_attention_s: float
    step_s: float
    step_cache_s: float
    first_token_s: float
    queue_s: float
    between_tokens_s: float
    utilisation: float
    highest_rate: float
    bottleneck: str
    fits: bool

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.tensor_parallel

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens of the whole fleet."""
        return self.load.rate * self.load.answer_len

    @property
    def tokenizer_cores(self) -> float:
        """CPU cores that turn prompts into tokens; shared beginnings are tokenised all the same."""
        return self.load.rate * self.load.prompt_len / TOKENS_PER_CPU_S

    @property
    def http_cores(self) -> float:
        """CPU cores that take requests and stream answers."""
        return self.load.rate / REQUESTS_PER_CPU_S + self.tokens_per_s / EVENTS_PER_CPU_S

    @property
    def bytes_in_per_s(self) -> float:
        """Prompts as text, clients to router and router to replicas alike."""
        return self.load.rate * self.load.prompt_len * BYTES_PER_TOKEN

    @property
    def bytes_out_per_s(self) -> float:
        """Streamed answers, the other way."""
        return self.tokens_per_s * BYTES_PER_EVENT

    def to_json(self) -> dict[str, object]:
        """One flat object of numbers and words; null is without end."""
        facts = asdict(self)
        load = facts.pop("load")
        return {
            **{name: None if value == math.inf else value for name, value in facts.items()},
            **{f"load_{name}": value for name, value in load.items()},
            "gpus": self.gpus,
            "tokens_per_s": self.tokens_per_s,
            "tokenizer_cores": self.tokenizer_cores,
            "http_cores": self.http_cores,
            "bytes_in_per_s": self.bytes_in_per_s,
            "bytes_out_per_s": self.bytes_out_per_s,
        }


def plan_fleet(
    config: ModelConfig,
    load: Load,
    card: Card,
    *,
    tensor_parallel: int = 1,
    replicas: int | None = None,
    quant: QuantConfig | None = None,
    bits: int | None = None,
    group_size: int = 128,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    utilisation: float = UTILISATION,
    name: str | None = None,
) -> FleetPlan:
    """Size a fleet, or say how a given one fares.

    Args:
        config: the model.
        load: what is asked.
        card: on what.
        tensor_parallel: GPUs that share one replica's weights and cache.
        replicas: how many there are; None is as many as the load takes at `utilisation`.
        quant: as for `plan`.
        bits: likewise.
        group_size: likewise.
        dtype: likewise.
        kv_dtype: likewise.
        utilisation: up to which a fleet is sized.
        name: what to call the model.

    Raises:
        ConfigError: as `plan`.
        RequestError: the GPUs do not divide the KV heads or cannot be joined, or a value is out of
            its range.
        CapacityError: not one sequence fits beside the weights.
    """
    _check_split(config, card, tensor_parallel)
    if not 0 < utilisation < 1:
        raise RequestError(f"utilisation is {utilisation}; it must be between 0 and 1")
    planned = plan(
        config,
        context=load.prompt_len + load.answer_len,
        quant=quant,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        memory=card.memory * tensor_parallel,
        name=name,
    )
    replica = Replica(config, planned, card, tensor_parallel, load)
    if replicas is None:
        replicas = _replicas_for(replica, utilisation)
    elif replicas < 1:
        raise RequestError(f"replicas is {replicas}; it must be 1 or more")
    return _fare(replica, replicas)


def require_carried(fleet: FleetPlan) -> None:
    """Do nothing if the fleet bears its load.

    Raises:
        CapacityError: it does not; says what ends it and what it can bear.
    """
    if not fleet.fits:
        raise CapacityError(
            f"{fleet.replicas} replicas bear {fleet.replicas * fleet.highest_rate:,.2f} requests/s "
            f"and not {fleet.load.rate:,.2f}: {fleet.bottleneck} ends it; leave the number of "
            "replicas out to be told how many it takes"
        )


_HALVINGS = 30


@dataclass(frozen=True)
class _State:
    """The steady state of a replica at a rate."""

    sequences: float
    step_s: float
    gap_s: float
    utilisation: float


def _steady(replica: Replica, rate: float) -> _State | None:
    """B, s, gap and u at a rate; None where there is no steady state.

    A stream's time grows with the step's, the step's with the number of streams: the least B that
    brings itself about is found by halving.
    """

    def running(sequences: float) -> float:
        return rate * _stream_s(replica, rate, replica.step_s(sequences))

    low, high = 0.0, float(MOST_SEQUENCES)
    if running(high) > high:
        high = _least(running)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if running(middle) > middle else (low, middle)
    step_s = replica.step_s(high)
    use = _use(replica, rate, step_s)
    if use >= 1 or high >= MOST_SEQUENCES:
        return None
    return _State(high, step_s, _stream_s(replica, rate, step_s) / replica.load.answer_len, use)


def _least(running: Callable[[float], float]) -> float:
    """Some B that bears its own streams, looked for from below; MOST_SEQUENCES if there is none."""
    sequences = 1.0
    while sequences < MOST_SEQUENCES and running(sequences) > sequences:
        sequences *= 1.25
    return min(sequences, MOST_SEQUENCES)


def _use(replica: Replica, rate: float, step_s: float) -> float:
    return rate * (replica.read_s + replica.chunks * step_s)


def _stream_s(replica: Replica, rate: float, step_s: float) -> float:
    """D: from a stream's first token to its last; without end where reading takes all the time."""
    answer_len, with_chunk_s = replica.load.answer_len, step_s + replica.read_s / replica.chunks
    use = _use(replica, rate, step_s)
    if use >= 1:
        return math.inf
    behind_s = (use + use**2 / (2 * (1 - use))) * (replica.read_s + replica.chunks * step_s)
    tokens = answer_len + behind_s * (1 / step_s - 1 / with_chunk_s)
    stream_s = tokens / ((1 - use) / step_s + use / with_chunk_s)
    return min(stream_s, answer_len * with_chunk_s)


def _highest_rate(replica: Replica, replicas: int) -> float:
    """Requests per second that a replica bears: a steady state that fits into memory."""
    fit = replica.sequences_fit(replicas)

    def bears(rate: float) -> bool:
        state = _steady(replica, rate)
        return state is not None and state.sequences <= fit

    low, high = 0.0, 1 / replica.read_s
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


def _replicas_for(replica: Replica, utilisation: float) -> int:
    """The fewest replicas whose share of the load is below `utilisation` of what they bear.

    More replicas hold fewer documents each, and so bear more; found by doubling and halving.
    """
    rate = replica.load.rate

    def enough(replicas: int) -> bool:
        return rate / replicas <= utilisation * _highest_rate(replica, replicas)

    high = 1
    while not enough(high):
        high *= 2
        if high > 2**30:
            raise CapacityError(
                "not one sequence fits beside the weights; use more GPUs a replica, larger ones, "
                "fewer bits or a smaller cache type"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _fare(replica: Replica, replicas: int) -> FleetPlan:
    load, planned = replica.load, replica.planned
    rate, highest = load.rate / replicas, _highest_rate(replica, replicas)
    fits = rate < highest
    # Beyond the limit there is no steady state to describe: the limit itself is.
    state = _steady(replica, min(rate, highest)) or _State(0.0, replica.step_s(1), math.inf, 1.0)
    wait_s = replica.read_s + replica.chunks * state.step_s
    queue_s = math.inf
    if fits:
        queue_s = state.utilisation * wait_s / (2 * (1 - state.utilisation))
    return FleetPlan(
        model=planned.model,
        card=replica.card.name,
        tensor_parallel=replica.num_gpus,
        replicas=replicas,
        load=load,
        weight_bytes=planned.weights.total // replica.num_gpus,
        kv_bytes_per_sequence=replica.own_len() * planned.kv_bytes_per_token // replica.num_gpus,
        sequences_fit=replica.sequences_fit(replicas),
        sequences=state.sequences,
        read_s=replica.read_s,
        read_attention_s=replica.read_attention_s,
        step_s=state.step_s,
        step_cache_s=replica.cache_s(state.sequences),
        first_token_s=queue_s + wait_s,
        queue_s=queue_s,
        between_tokens_s=state.gap_s,
        utilisation=rate / highest if highest else math.inf,
        highest_rate=highest,
        bottleneck=_bottleneck(replica, replicas, highest),
        fits=fits,
    )


def _bottleneck(replica: Replica, replicas: int, highest: float) -> str:
    """What ends a replica at its highest rate: memory, if it is full; else what takes more time."""
    fit, state = replica.sequences_fit(replicas), _steady(replica, highest)
    if fit < MOST_SEQUENCES and (state is None or state.sequences > 0.99 * fit):
        return "memory for sequences"
    return "reading prompts" if highest * replica.read_s > 0.5 else "decoding"


def _check_split(config: ModelConfig, card: Card, num_gpus: int) -> None:
    if num_gpus < 1:
        raise RequestError(f"tensor_parallel is {num_gpus}; it must be 1 or more")
    if config.num_kv_heads % num_gpus:
        raise RequestError(
            f"{num_gpus} GPUs do not divide the {config.num_kv_heads} key/value heads of this "
            "model; use a number that does"
        )
    if num_gpus > 1 and not card.link:
        raise RequestError(
            f"{card.name}s have no link but PCIe here; plan one GPU a replica, or another card"
        )
