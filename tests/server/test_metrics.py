"""/metrics: names that TGI's dashboard asks for, and numbers that add up."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_of import ask, engine_of, serving_of

from longwing.engine.status import EngineStats, StepRecord
from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer

DASHBOARD = {
    "tgi_request_count", "tgi_request_success", "tgi_request_failure",
    "tgi_request_duration_bucket", "tgi_request_validation_duration_bucket",
    "tgi_request_queue_duration_bucket", "tgi_request_inference_duration_bucket",
    "tgi_request_mean_time_per_token_duration_bucket", "tgi_request_generated_tokens_bucket",
    "tgi_request_input_length_bucket", "tgi_request_max_new_tokens_bucket",
    "tgi_request_skipped_tokens_bucket", "tgi_batch_next_size_bucket", "tgi_batch_concat",
    "tgi_batch_inference_duration_bucket", "tgi_batch_forward_duration_bucket",
    "tgi_batch_inference_count", "tgi_batch_inference_success", "tgi_batch_inference_failure",
    "tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_batch_max_total_tokens",
    "tgi_queue_size",
}  # fmt: skip


@pytest.fixture
def serving(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer)


def samples(serving: Serving) -> dict[tuple[str, str], float]:
    """Every sample by name and its one label's value."""
    answer = ask(serving, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_every_name_of_tgis_dashboard_is_there_from_the_beginning(serving: Serving) -> None:
    names = {name for name, _ in samples(serving)}
    assert names >= DASHBOARD
    assert not [name for name in names if name.endswith("_created")]


def test_durations_have_tgis_buckets_and_lengths_a_hundred(serving: Serving) -> None:
    told = samples(serving)
    durations = [at for name, at in told if name == "tgi_request_duration_bucket"]
    assert len(durations) == 36  # +Inf
    assert (durations[0], durations[1]) == ("0.00015", "0.000225")
    lengths = [at for name, at in told if name == "tgi_request_input_length_bucket"]
    assert (len(lengths), lengths[-2:]) == (101, ["120.0", "+Inf"])


def test_requests_are_counted_by_how_they_end(serving: Serving) -> None:
    ask(serving, "/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 2}})
    ask(serving, "/generate_stream", {"inputs": "Hello", "parameters": {"max_new_tokens": 2}})
    ask(serving, "/generate", {"inputs": ""})
    ask(serving, "/generate_stream", {"inputs": ""})
    engine_of(serving).max_requests = 0
    ask(serving, "/generate", {"inputs": "x"})
    told = samples(serving)
    assert told["tgi_request_count", ""] == 5
    assert told["tgi_request_success", ""] == 2
    assert told["tgi_request_failure", "validation"] == 2
    assert told["tgi_request_failure", "overloaded"] == 1
    assert told["tgi_request_duration_count", ""] == 2
    assert told["tgi_request_generated_tokens_sum", ""] == 4
    assert told["tgi_request_input_length_sum", ""] == 11
    assert told["tgi_request_queue_duration_sum", ""] == 0.5
    assert told["tgi_request_mean_time_per_token_duration_sum", ""] == 2.0


def test_the_engines_steps_and_numbers_are_shown(serving: Serving) -> None:
    ask(serving, "/health")  # makes the application, which listens to the engine
    engine = engine_of(serving)
    for method, num in (("prefill", 3), ("decode", 3), ("decode", 2)):
        step = StepRecord(method=method, num_sequences=num, num_tokens=num, seconds=0.5)
        for observe in engine.on_step:
            observe(step)
    engine.stats = EngineStats(running=2, waiting=5, pages_used=7, num_generated_tokens=11)
    told = samples(serving)
    assert told["tgi_batch_inference_count", "decode"] == 2
    assert told["tgi_batch_inference_duration_sum", "prefill"] == 0.5
    assert told["tgi_batch_next_size_sum", ""] == 3
    assert told["tgi_queue_size", ""] == 5
    assert told["tgi_batch_current_size", ""] == 2
    assert told["tgi_batch_current_max_tokens", ""] == 7 * 16
    assert told["longwing_generated_tokens_total", ""] == 11
    assert told["longwing_ready", ""] == 1
    engine.status = "dead"
    assert samples(serving)["longwing_ready", ""] == 0
