"""What a model will need, before anything is downloaded or allocated: bytes, and bounds on speed.

Pure arithmetic on `ModelConfig`; no weights are needed. `weights` counts what a checkpoint holds,
`workspace` what a forward pass works in; `memory` adds both and the cache up and finds the longest
context that fits; `speed` bounds the tokens per second; `fleet` sizes many GPUs for a load, from
measured shares of those bounds. `table` shows a plan to people, `sizes` reads and writes numbers as
they do, and `known` has a few models by name.
"""

from longwing.plan.fleet import FleetPlan, plan_fleet, require_carried
from longwing.plan.fleet_rates import CARDS
from longwing.plan.fleet_table import explain_fleet
from longwing.plan.fleet_work import Load
from longwing.plan.known import KNOWN, known_config
from longwing.plan.memory import (
    KV_FORMATS,
    PREFILL_CHUNK,
    Plan,
    kv_bytes_per_token,
    plan,
    require_fit,
)
from longwing.plan.sizes import format_size, parse_context, parse_size
from longwing.plan.speed import (
    BANDWIDTH,
    bytes_per_step,
    decode_bound,
    prefill_bound,
    prefill_flops,
)
from longwing.plan.table import explain
from longwing.plan.weights import WeightBytes, check_group_size
from longwing.plan.workspace import CONTEXT_BYTES, RUNTIME_BYTES, Workspace, graphs_bytes

__all__ = [
    "BANDWIDTH",
    "CARDS",
    "CONTEXT_BYTES",
    "KNOWN",
    "KV_FORMATS",
    "PREFILL_CHUNK",
    "RUNTIME_BYTES",
    "FleetPlan",
    "Load",
    "Plan",
    "WeightBytes",
    "Workspace",
    "bytes_per_step",
    "check_group_size",
    "decode_bound",
    "explain",
    "explain_fleet",
    "format_size",
    "graphs_bytes",
    "known_config",
    "kv_bytes_per_token",
    "parse_context",
    "parse_size",
    "plan",
    "plan_fleet",
    "prefill_bound",
    "prefill_flops",
    "require_carried",
    "require_fit",
]
