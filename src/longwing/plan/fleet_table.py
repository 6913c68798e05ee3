"""`explain_fleet`: a fleet as rows for people."""

from longwing.plan.fleet import FleetPlan
from longwing.plan.fleet_rates import CARDS
from longwing.plan.sizes import format_size


def explain_fleet(fleet: FleetPlan) -> list[tuple[str, str, str]]:
    """The fleet as (what, how much, remark) rows."""
    load = fleet.load
    split = f", {fleet.tensor_parallel} a replica" if fleet.tensor_parallel > 1 else ""
    shared = f"{load.shared_len:,} of them found in the cache" if load.shared_len else ""
    verdict = "of the highest rate" if fleet.fits else "of the highest rate: more than there is"
    rows = [
        ("load", f"{load.rate:,g} requests/s", f"answers of {load.answer_len:,} tokens"),
        ("  prompts", f"{load.prompt_len:,} tokens", shared),
        ("GPUs", f"{fleet.gpus:,} {fleet.card}", f"{fleet.replicas:,} replicas{split}"),
        ("  weights", format_size(fleet.weight_bytes), "on each"),
        (
            "  KV cache",
            format_size(fleet.kv_bytes_per_sequence),
            f"a sequence on each; {fleet.sequences_fit:,} fit a replica",
        ),
        ("utilisation", f"{fleet.utilisation:.0%}", verdict),
        ("  bottleneck", fleet.bottleneck, f"at {fleet.highest_rate:,.3g} requests/s a replica"),
        ("first token", seconds(fleet.first_token_s), "after the request, on average"),
        ("  queue", seconds(fleet.queue_s), "behind other prompts"),
        (
            "  reading",
            seconds(fleet.read_s),
            f"alone; {seconds(fleet.read_attention_s)} of it attention",
        ),
        (
            "between tokens",
            seconds(fleet.between_tokens_s),
            f"{1 / fleet.between_tokens_s:,.1f} tokens/s a stream",
        ),
        (
            "  decode step",
            seconds(fleet.step_s),
            f"of {fleet.sequences:,.1f} sequences; {seconds(fleet.step_cache_s)} of it the cache",
        ),
        ("answers", f"{fleet.tokens_per_s:,.0f} tokens/s", "the whole fleet"),
        ("tokenising", f"{fleet.tokenizer_cores:,.1f} CPU cores", ""),
        ("HTTP", f"{fleet.http_cores:,.1f} CPU cores", ""),
        ("network", f"{fleet.bytes_in_per_s / 1e6:,.1f} MB/s in", "prompts as text, each way"),
        ("", f"{fleet.bytes_out_per_s / 1e6:,.1f} MB/s out", "streamed tokens"),
        ("not in it", "norms, launches, the host's work", "no whole step has been timed yet"),
        ("", "bursts, unequal lengths, uneven routing", "queues are those of equal work"),
    ]
    assumed = CARDS[fleet.card].assumed
    return [*rows, ("assumed", assumed, "")]


def seconds(value: float) -> str:
    """A time for people: 12.2 s, 35.7 ms."""
    if value == float("inf"):
        return "without end"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"
