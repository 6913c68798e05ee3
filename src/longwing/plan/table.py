"""`explain`: a plan as rows for people."""

from collections.abc import Mapping
from dataclasses import asdict

from longwing.plan.memory import Plan, beyond_claim
from longwing.plan.sizes import format_size


def explain(plan: Plan) -> list[tuple[str, str, str]]:
    """The plan as (what, how much, remark) rows."""
    weights, workspace = plan.weights, plan.workspace
    kind = plan.dtype
    if plan.bits is not None:
        groups = "one group a column" if plan.group_size == -1 else f"groups of {plan.group_size}"
        share = f"{plan.quantised_parameters / 1e9:.2f} G"
        kind = f"{share} of them at {plan.bits} bits in {groups}, the rest {plan.dtype}"
    claim = beyond_claim(plan.context, plan.claimed_context)
    rows = [
        ("context", f"{plan.context:,} tokens", claim),
        ("parameters", f"{plan.parameters / 1e9:.2f} G", kind),
        *_sized("weights", weights.total, asdict(weights), _WEIGHTS),
        (
            "KV cache",
            format_size(plan.kv_bytes),
            f"{plan.kv_bytes_per_token:,} B a token in {plan.kv_dtype}"
            + (f", {plan.batch} sequences" if plan.batch > 1 else ""),
        ),
        *_sized("workspace", workspace.total, asdict(workspace), _WORKSPACE),
        ("peak", format_size(plan.peak_bytes), f"{plan.peak_bytes / 1e9:.2f} GB"),
    ]
    if plan.memory is not None and plan.headroom_bytes is not None:
        verdict = "fits" if plan.fits else "does not fit"
        left = f"{format_size(abs(plan.headroom_bytes))} {'left' if plan.fits else 'lacking'}"
        rows.append(("memory", format_size(plan.memory), f"{verdict}: {left}"))
        rows.append(
            ("longest context", f"{plan.longest_context:,} tokens", plan.longest_context_note)
        )
    return rows


_WEIGHTS = {
    "qweight": ("qweight", "packed matrices"),
    "scales": ("scales", "float16, one a group and output"),
    "zeros": ("zeros", "packed zero points"),
    "g_idx": ("g_idx", "the group of each input row"),
    "linears": ("matrices", "of the blocks"),
    "embedding": ("embedding", "and output head, unless that has a row of its own"),
    "head": ("head", "the output projection"),
    "norms_and_biases": ("norms and biases", ""),
}
_WORKSPACE = {
    "activations": ("activations", "one block over one chunk of the prompt"),
    "mask": ("mask", "of attention, for one chunk"),
    "dequantised": ("dequantised", "the largest packed matrix while it is multiplied with"),
    "unpacked_zeros": ("unpacked zeros", "zero points take a byte each in memory"),
    "logits": ("logits", "one row a sequence"),
    "rope_tables": ("RoPE tables", "cos and sin of every position"),
    "graphs": ("CUDA graphs", "decoding steps, recorded"),
    "runtime": ("runtime", "CUDA context and libraries"),
}
"""Field -> what to call it, and what it is."""


def _sized(
    label: str, total: int, parts: Mapping[str, int], words: Mapping[str, tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """A total and, indented under it, its parts that are not zero."""
    rows = [
        (f"  {words[part][0]}", format_size(size), words[part][1])
        for part, size in parts.items()
        if size
    ]
    return [(label, format_size(total), f"{total / 1e9:.2f} GB"), *rows]
