"""What /metrics shows: TGI's names, so that its Grafana dashboard works, and longwing's own.

Each server has a registry of its own. Label values are words from this file, never a client's, so
that nobody can fill the registry. Times are seconds; lengths are tokens.

TGI calls its counters `tgi_request_count`; prometheus_client would make that
`tgi_request_count_total`, so these few are written out by `_PlainCounters`, untyped.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from longwing.engine.events import Finished
from longwing.engine.status import EngineInfo, EngineStats, StepRecord

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ERRORS = ("validation", "overloaded", "incomplete", "generation", "dropped", "template")
METHODS = ("prefill", "decode")
CONCAT_REASONS = ("backpressure", "wait_exceeded", "chunking")

DURATIONS = [round(0.0001 * 1.5**k, 9) for k in range(1, 36)]
"""TGI's buckets, in seconds: 0.15 ms to 146 s."""
BATCH_SIZES = [2.0**k for k in range(11)]
"""1 to 1024. TGI has a bucket for each number between; these are some of them."""

_GAUGES = {
    "tgi_queue_size": ("Requests that wait.", "waiting"),
    "tgi_batch_current_size": ("Requests at work.", "running"),
    "longwing_running_sequences": ("Sequences at work.", "running"),
    "longwing_waiting_sequences": ("Sequences that wait for their first chunk.", "waiting"),
    "longwing_pages_used": ("Pages of the KV cache that a sequence holds.", "pages_used"),
    "longwing_pages_cached": ("Pages kept for their prefix alone.", "pages_cached"),
}
_COUNTERS = {
    "longwing_prompt_tokens": ("Prompt tokens of requests begun.", "num_prompt_tokens"),
    "longwing_cached_tokens": ("Prompt tokens found in the prefix cache.", "num_cached_tokens"),
    "longwing_generated_tokens": ("Tokens generated.", "num_generated_tokens"),
    "longwing_drafted_tokens": ("Draft tokens tried.", "num_drafted"),
    "longwing_accepted_tokens": ("Draft tokens that became text.", "num_accepted"),
    "longwing_preemptions": ("Sequences that lost their pages and began again.", "num_preempted"),
    "longwing_steps": ("Steps of the engine.", "num_steps"),
}


class Metrics:
    """Counts what requests and the engine do.

    Args:
        max_total_len: tokens in a prompt and its answer at most; the last bucket of lengths.
    """

    def __init__(self, max_total_len: int) -> None:
        self._registry = CollectorRegistry()
        self._counters = _PlainCounters(self._registry)
        lengths = [max_total_len * k / 100 for k in range(1, 101)]

        def histogram(name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, help_text, buckets=buckets, registry=self._registry)

        def by_method(name: str, help_text: str) -> Histogram:
            made = Histogram(
                name, help_text, ["method"], buckets=DURATIONS, registry=self._registry
            )
            for method in METHODS:
                made.labels(method)
            return made

        self._durations = {
            name: histogram(f"tgi_request_{name}", help_text, DURATIONS)
            for name, help_text in {
                "duration": "From arrival to answer.",
                "validation_duration": "Checking and tokenising.",
                "queue_duration": "Waiting for the first chunk.",
                "inference_duration": "From the first chunk to the last token.",
                "mean_time_per_token_duration": "Inference, divided by generated tokens.",
            }.items()
        }
        self._input_length = histogram("tgi_request_input_length", "Prompt tokens.", lengths)
        self._max_new = histogram("tgi_request_max_new_tokens", "Tokens asked for.", lengths)
        self._generated = histogram("tgi_request_generated_tokens", "Tokens generated.", lengths)
        self._skipped = histogram(
            "tgi_request_skipped_tokens", "Prompt tokens found in the prefix cache.", lengths
        )
        self._next_size = histogram("tgi_batch_next_size", "Sequences in a prefill.", BATCH_SIZES)
        self._batch = [
            by_method("tgi_batch_inference_duration", "A step of the engine."),
            by_method("tgi_batch_forward_duration", "A step of the engine."),
        ]
        self._step_tokens = histogram(
            "longwing_step_tokens", "Tokens run in a step.", [2.0**k for k in range(17)]
        )

    def request_began(self) -> None:
        """A request to generate has come in."""
        self._counters.add("tgi_request_count")

    def request_prepared(self, seconds: float, input_len: int, max_new: int) -> None:
        """It was found valid."""
        self._durations["validation_duration"].observe(seconds)
        self._input_length.observe(input_len)
        self._max_new.observe(max_new)

    def request_answered(self, seconds: float, finished: Finished) -> None:
        """It was answered; `finished` is that of the answer given."""
        self._counters.add("tgi_request_success")
        inference_s = finished.prefill_s + finished.decode_s
        self._durations["duration"].observe(seconds)
        self._durations["queue_duration"].observe(finished.queue_s)
        self._durations["inference_duration"].observe(inference_s)
        self._durations["mean_time_per_token_duration"].observe(
            inference_s / max(1, finished.num_generated)
        )
        self._generated.observe(finished.num_generated)
        self._skipped.observe(finished.cached_len)

    def request_failed(self, error: str) -> None:
        """It was not answered; `error` is one of ERRORS."""
        self._counters.add("tgi_request_failure", error)

    def request_overloaded(self) -> None:
        """One was refused before anyone looked at it."""
        self.request_began()
        self.request_failed("overloaded")

    def observe_step(self, step: StepRecord) -> None:
        """The engine has done a step."""
        self._counters.add("tgi_batch_inference_count", step.method)
        self._counters.add("tgi_batch_inference_success", step.method)
        for made in self._batch:
            made.labels(step.method).observe(step.seconds)
        if step.method == "prefill":
            self._next_size.observe(step.num_sequences)
        self._step_tokens.observe(step.num_tokens)

    def exposition(self, info: EngineInfo | None, stats: EngineStats, status: str) -> bytes:
        """Everything, in Prometheus' text format 0.0.4."""
        registry = CollectorRegistry()
        registry.register(_Tidy([self._registry, _EngineGauges(info, stats, status)]))
        return generate_latest(registry)


class _PlainCounters(Collector):
    """Counters under the very names they are given; every label value is known beforehand."""

    _LABELS: ClassVar[dict[str, tuple[str, str, tuple[str, ...]]]] = {
        "tgi_request_count": ("Requests to generate.", "", ("",)),
        "tgi_request_success": ("Requests answered.", "", ("",)),
        "tgi_request_failure": ("Requests refused or failed.", "err", ERRORS),
        "tgi_batch_inference_count": ("Steps begun.", "method", METHODS),
        "tgi_batch_inference_success": ("Steps done.", "method", METHODS),
        "tgi_batch_inference_failure": ("Steps failed.", "method", METHODS),
        "tgi_batch_concat": ("Batches joined by newcomers.", "reason", CONCAT_REASONS),
    }

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts = {
            (name, value): 0 for name, (_, _, values) in self._LABELS.items() for value in values
        }
        registry.register(self)

    def add(self, name: str, value: str = "") -> None:
        self._counts[name, value] += 1

    def collect(self) -> Iterable[Metric]:
        for name, (help_text, label, values) in self._LABELS.items():
            metric = Metric(name, help_text, "unknown")
            for value in values:
                labels = {label: value} if label else {}
                metric.add_sample(name, labels, self._counts[name, value])
            yield metric


class _EngineGauges(Collector):
    """The engine's numbers as of now."""

    def __init__(self, info: EngineInfo | None, stats: EngineStats, status: str) -> None:
        self._info, self._stats, self._status = info, stats, status

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("longwing_ready", "1 if ready.", value=self._status == "ready")
        for name, (help_text, source) in _GAUGES.items():
            yield GaugeMetricFamily(name, help_text, value=getattr(self._stats, source))
        for name, (help_text, source) in _COUNTERS.items():
            yield CounterMetricFamily(name, help_text, value=getattr(self._stats, source))
        if self._info is not None:
            yield from self._capacity(self._info)

    def _capacity(self, info: EngineInfo) -> Iterator[Metric]:
        tokens = info.num_pages * info.page_len
        yield GaugeMetricFamily(
            "tgi_batch_current_max_tokens",
            "Tokens that the pages in use hold.",
            value=self._stats.pages_used * info.page_len,
        )
        yield GaugeMetricFamily(
            "tgi_batch_max_total_tokens", "Tokens that all pages hold.", value=tokens
        )
        yield GaugeMetricFamily("longwing_pages", "Pages of the KV cache.", value=info.num_pages)
        yield GaugeMetricFamily("longwing_kv_bytes", "Bytes of all pages.", value=info.kv_bytes)
        yield GaugeMetricFamily(
            "longwing_weight_bytes", "Bytes of all weights.", value=info.weight_bytes
        )
        about = GaugeMetricFamily(
            "longwing_info", "What is served.", labels=["architecture", "quantization", "device"]
        )
        about.add_metric([info.architecture, info.quantization, info.device], 1)
        yield about


class _Tidy(Collector):
    """Several sources as one, without the `_created` times that prometheus_client adds."""

    def __init__(self, sources: Sequence[Collector]) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        for source in self._sources:
            for metric in source.collect():
                metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
                yield metric
