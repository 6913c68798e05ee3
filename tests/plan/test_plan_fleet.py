"""Fleets: measured shares against their files, formulas against the arithmetic and a simulation."""

import json
import random
from pathlib import Path

import pytest

from cli.commands import facts, refused, run, usage_error
from longwing.errors import CapacityError, RequestError
from longwing.models import ModelConfig
from longwing.plan import CARDS, FleetPlan, Load, known_config, plan_fleet, require_carried
from longwing.plan import fleet_rates as rates
from longwing.plan.fleet import _steady
from longwing.plan.fleet_work import Replica
from longwing.plan.memory import PREFILL_CHUNK, plan

RESULTS = Path(__file__).parents[2] / "bench" / "results"
H200 = CARDS["H200"]
SHAPES = {"qkv": 8192 * 9216, "dense": 8192 * 8192, "up": 8192 * 32768, "down": 32768 * 8192}


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def fleet(model: str = "falcon-40b", card: str = "H200", **settings) -> FleetPlan:
    load = {"rate": 10.0, "prompt_len": 24_000, "answer_len": 200}
    load |= {name: settings.pop(name) for name in (*load, "share", "documents") if name in settings}
    settings = {"bits": 4, **settings}
    return plan_fleet(known_config(model), Load(**load), CARDS[card], **settings)


def reached(kind: str, tokens: int) -> float:
    """The share of the limit that the four products of a layer reached together, by the file."""
    limit = seconds = 0.0
    for shape, weights in SHAPES.items():
        found = [
            x for x in lines("kernels.jsonl") if (x.get("shape"), x.get("kind")) == (shape, kind)
        ]
        us = {n: time for line in found for n, time in line["us"].items()}  # the newest of each
        seconds += us[str(tokens)] * 1e-6
        limit += max(found[0]["bytes"] / H200.bandwidth, 2 * tokens * weights / H200.flops)
    return limit / seconds


@pytest.mark.parametrize("tokens", rates.MATMUL_SHARE)
def test_shares_of_packed_products_are_those_of_the_results(tokens: int) -> None:
    assert rates.MATMUL_SHARE[tokens] == pytest.approx(reached("4 bits g128", tokens), rel=0.05)


@pytest.mark.parametrize("tokens", rates.DENSE_MATMUL_SHARE)
def test_shares_of_dense_products_are_those_of_the_results(tokens: int) -> None:
    seen = reached("cuBLAS bf16", tokens)
    assert rates.DENSE_MATMUL_SHARE[tokens] == pytest.approx(seen, rel=0.05)


def test_two_numbers_give_the_measured_times_of_attention() -> None:
    compared = 0
    for line in lines("attention.jsonl"):
        if line["who"] != "longwing" or line["model"] != "Falcon-40B" or line["kv"] != "bfloat16":
            continue
        if line["kind"] == "decode" and line["new"] == 1 and line["page_len"] == 128:
            bytes_read = line["batch"] * line["context"] * 2 * 8 * 64 * 2
            rate = H200.bandwidth * rates.ATTENTION_SHARE
            us = 1e6 * (rates.ATTENTION_S + bytes_read / rate)
            assert us == pytest.approx(line["us"], rel=0.05 if line["context"] > 24_000 else 0.25)
            compared += 1
        elif line["kind"] == "prefill" and line["page_len"] == 128 and line["new"] >= 8192:
            share = line["tflop_s"] * 1e12 / H200.flops
            assert share == pytest.approx(rates.PREFILL_ATTENTION_SHARE, rel=0.03)
            compared += 1
    assert compared >= 9


def test_two_numbers_give_the_measured_times_of_sums_over_two_gpus() -> None:
    (line,) = lines("sums.jsonl")
    fastest = {one["tokens"]: one["us"] for one in line["lines"] if "norms" not in one["sum"]}
    assert len(fastest) == 6  # the later lines of a number of tokens are the peers'
    for tokens, us in fastest.items():
        moved = tokens * 8192 * 2
        seconds = rates.ALL_REDUCE_S + moved / (H200.link * rates.LINK_SHARE)
        assert 1e6 * seconds == pytest.approx(us, rel=0.25)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_of_a_replica_take_about_what_was_measured(ranks: int) -> None:
    """Whole steps of the engine: products side by side gain what sampling and launches cost."""
    measured = lines("tensor_parallel.jsonl")[-1]
    found = next(one for one in measured["found"] if one["ranks"] == ranks)
    config = known_config("falcon-40b")
    for line in found["lines"]:
        load = Load(rate=1.0, prompt_len=line["context"], answer_len=1)
        planned = plan(config, context=line["context"], batch=line["batch"], bits=4, group_size=128)
        replica = Replica(config, planned, H200, ranks, load)
        if line["what"] == "prefill":
            assert 1e3 * replica.read_s == pytest.approx(line["ms"], rel=0.1)
        else:
            n = line["batch"]
            step_s = replica.matmul_s(n) + replica.head_s(n) + replica.cache_s(n)
            assert 1e3 * step_s == pytest.approx(line["ms"], rel=0.25)


def test_figures_of_the_cpu_are_those_of_the_results() -> None:
    (line,) = lines("http_cpu.jsonl")
    assert pytest.approx(line["tokens_per_cpu_s"], rel=0.02) == rates.TOKENS_PER_CPU_S
    assert pytest.approx(line["letters_per_token"], rel=0.02) == rates.BYTES_PER_TOKEN
    assert pytest.approx(line["events_per_cpu_s"], rel=0.02) == rates.EVENTS_PER_CPU_S
    assert pytest.approx(line["requests_per_cpu_s"], rel=0.02) == rates.REQUESTS_PER_CPU_S


def test_between_two_measured_numbers_of_tokens_the_share_lies_between_theirs() -> None:
    assert rates.share({1: 0.4, 16: 0.8}, 4) == pytest.approx(0.6)
    assert rates.share({1: 0.4, 16: 0.8}, 0.5) == 0.4
    assert rates.share({1: 0.4, 16: 0.8}, 1000) == 0.8


def test_a_long_prompt_takes_falcon_40b_what_its_operations_take() -> None:
    read = fleet()
    # Of the last of 60 blocks only one token attends.
    linear, attention = 2 * 40.77e9 * 24_000, 2 * 128 * 64 * 24_000**2 * 59
    assert read.read_attention_s == pytest.approx(attention / (0.58 * 790e12), rel=0.01)
    assert read.read_s - read.read_attention_s == pytest.approx(linear / (0.79 * 790e12), rel=0.02)


def test_what_is_in_the_cache_is_not_read_again() -> None:
    half = fleet(share=0.5)
    # Of the triangle of pairs, the lower half of the rows holds three quarters.
    assert half.read_attention_s == pytest.approx(0.75 * fleet().read_attention_s, rel=0.01)
    assert half.read_s < 0.6 * fleet().read_s


def test_more_sharing_never_takes_more_gpus() -> None:
    shares = (0.0, 0.5, 0.99)
    gpus = [fleet(rate=1000.0, share=share, documents=1000).gpus for share in shares]
    assert gpus == sorted(gpus, reverse=True)


def test_the_highest_rate_is_the_border_of_what_is_borne() -> None:
    highest = fleet(replicas=1, rate=0.1).highest_rate
    below, above = (fleet(replicas=1, rate=highest * factor) for factor in (0.999, 1.001))
    assert below.fits
    require_carried(below)
    assert not above.fits
    with pytest.raises(CapacityError, match="reading prompts ends it"):
        require_carried(above)


def test_a_fleet_that_is_sized_has_no_replica_too_many() -> None:
    sized = fleet(rate=5.0)
    assert sized.utilisation <= 0.8
    assert fleet(rate=5.0, replicas=sized.replicas - 1).utilisation > 0.8


def test_one_more_gpu_a_replica_reads_nearly_twice_as_fast() -> None:
    one, two = fleet(replicas=1, rate=0.01), fleet(replicas=1, rate=0.01, tensor_parallel=2)
    assert 1.7 < one.read_s / two.read_s < 2.0
    assert two.weight_bytes == one.weight_bytes // 2
    assert two.sequences_fit > 2 * one.sequences_fit


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tensor_parallel": 3}, "do not divide the 8 key/value heads"),
        ({"tensor_parallel": 2, "card": "RTX 4090"}, "no link"),
        ({"replicas": 0}, "1 or more"),
        ({"share": 1.0}, "below 1"),
        ({"rate": 0.0}, "above 0"),
        ({"utilisation": 1.0}, "between 0 and 1"),
    ],
)
def test_impossible_fleets_are_refused_in_words(settings: dict, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        fleet(**settings)


def test_a_model_that_leaves_no_room_for_a_sequence_is_refused() -> None:
    with pytest.raises(CapacityError, match="not one sequence fits"):
        fleet(card="A10G")


def test_memory_ends_a_replica_whose_cards_are_small_and_caches_large() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        }
    )
    load = Load(rate=1.0, prompt_len=3000, answer_len=1000, share=0.9)
    small = plan_fleet(config, load, CARDS["A10G"], bits=4)
    assert small.bottleneck == "memory for sequences"
    many = plan_fleet(config, load, CARDS["A10G"], bits=4, kv_dtype="int4")
    assert many.replicas < small.replicas


def test_short_prompts_and_long_answers_are_ended_by_decoding() -> None:
    assert fleet(prompt_len=200, answer_len=500, rate=1.0).bottleneck == "decoding"


def simulate(  # the judge of the formulas: it knows none of them
    replica: Replica, rate: float, num: int
) -> tuple[float, float]:
    """The engine's loop, step by step: every stream a token, the first prompt a chunk.

    Returns:
        (mean seconds to the first token, mean number of running sequences).
    """
    draw = random.Random(1)
    arrivals = [0.0]
    while len(arrivals) < num:
        arrivals.append(arrivals[-1] + draw.expovariate(rate))
    chunk_s = replica.read_s / replica.chunks
    now, chunks_left, running, waits, busy = 0.0, 0, [], [], 0.0
    queue = list(reversed(arrivals))
    while queue or running or chunks_left:
        if not running and not chunks_left and queue and queue[-1] > now:
            now = queue[-1]
        if not chunks_left and queue and queue[-1] <= now:
            at, chunks_left = queue.pop(), replica.chunks
        took = (replica.step_s(len(running)) if running else 0.0) + chunk_s * bool(chunks_left)
        busy += took * len(running)
        now += took
        running = [left - 1 for left in running if left > 1]
        if chunks_left:
            chunks_left -= 1
            if not chunks_left:
                waits.append(now - at)
                running.append(replica.load.answer_len - 1)
    return sum(waits) / num, busy / now


@pytest.mark.parametrize(("share", "use"), [(0.0, 0.5), (0.9, 0.7), (0.9, 0.8)])
def test_queues_and_streams_are_those_of_the_engine_s_loop(share: float, use: float) -> None:
    config = known_config("falcon-40b")
    load = Load(rate=1.0, prompt_len=24_000, answer_len=200, share=share)
    planned = plan(config, context=24_200, bits=4, memory=H200.memory)
    replica = Replica(config, planned, H200, 1, load)
    rate = use * fleet(share=share, replicas=1).highest_rate
    state = _steady(replica, rate)
    said = fleet(share=share, replicas=1, rate=rate)
    first_token_s, sequences = simulate(replica, rate, 1000)
    assert state is not None
    assert said.first_token_s == pytest.approx(first_token_s, rel=0.2)
    assert said.sequences == pytest.approx(sequences, rel=0.2)
    assert PREFILL_CHUNK == 2048


def test_the_command_says_gpus_waits_and_bottleneck() -> None:
    args = ("plan", "falcon-40b", "--bits", "4", "--gpu", "H200", "--rate", "100")
    said = facts(*args, "--share", "0.9", "--documents", "100")
    assert said["gpus"] == fleet(rate=100.0, share=0.9, documents=100).gpus
    assert said["bottleneck"] == "reading prompts"
    shown = run(*args)
    assert "first token" in shown.stdout
    assert "reading prompts" in shown.stdout
    assert "bear" in refused(*args, "--replicas", "3")
    assert json.loads(run(*args, "--replicas", "3", "--json").stdout)["queue_s"] is None


def test_halves_of_a_fleet_are_usage_errors() -> None:
    model = ("plan", "falcon-40b", "--bits", "4")
    assert "--gpu" in usage_error(*model, "--rate", "1")
    for flag, value in (("--replicas", "2"), ("--share", "0.5"), ("--prompt-len", "24k")):
        assert "--rate" in usage_error(*model, flag, value)
    assert "leave out" in usage_error(*model, "--gpu", "H200", "--rate", "1", "--batch", "4")
    assert "below 1" in usage_error(*model, "--gpu", "H200", "--rate", "1", "--share", "1.5")


def test_a_plan_over_several_gpus_counts_their_memory_together() -> None:
    args = ("plan", "falcon-180b", "--bits", "4", "--context", "8k", "--gpu", "A100 80GB")
    assert "needs" in refused(*args)
    assert "of weights on each" in run(*args, "--tensor-parallel", "2").stdout
