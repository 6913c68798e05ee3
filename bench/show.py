"""A `longwing bench --json` result as a few lines of text.

python bench/show.py RESULT.json...
"""

import json
import sys
from pathlib import Path
from typing import Any


def show(facts: dict[str, Any]) -> None:
    """Print one result."""
    engine, loading, memory = facts["engine"], facts["loading"], facts["memory"]
    ceilings, gib = facts["ceilings"], 2**30
    print(
        f"{engine['name']}: {engine['quantization']}, {engine['dtype']}, {engine['kv_dtype']} cache"
        f" of {engine['num_pages'] * engine['page_len']:,} tokens, on {engine['device_name']} "
        f"({ceilings['bytes_per_s'] / 1e12:.2f} TB/s, {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s)"
    )
    print(
        f"  loaded {loading['stored_bytes'] / 1e9:.1f} GB in {loading['seconds']:.1f} s, warm in "
        f"{loading['warm_up_s']:.1f} s more; host peak {memory['host_peak'] / gib:.2f} GiB; device "
        f"peak {(memory['device_peak'] or 0) / gib:.2f} GiB, planned "
        f"{(facts['planned_bytes'] or 0) / gib:.2f}"
    )
    for line in facts["measured"]:
        label = f"  {line['what']:12} batch {line['batch']:2} context {line['context']:7,}"
        label += f" drafts {line['drafts']:2}"
        if line["ms"] is None:
            print(f"{label}: {line['note']}")
            continue
        print(
            f"{label}: {line['ms']:9.3f} ms ({line['ms_low']:.3f} to {line['ms_high']:.3f}), "
            f"{line['tokens_per_s']:9,.1f} tokens/s, floor {line['floor_ms'] or 0:9.3f} ms, "
            f"{line['of_ceiling'] or 0:.0%} of the ceiling"
        )
    quoting = facts["quoting"]
    if quoting:
        print(f"  quoting: {quoting}")
    if not facts["complete"]:
        print("  interrupted")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        show(json.loads(Path(path).read_text()))
