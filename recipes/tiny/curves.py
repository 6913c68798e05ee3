"""Draw the losses of both trainings as one SVG each, from their log.jsonl.

    python recipes/tiny/curves.py --log recipes/tiny/logs/base.jsonl --out docs/tiny-base-loss.svg

One line a kind of record: the mean loss, in nats a token, of what had to be found or foretold, at
the greatest length that was trained at the time. Hence the steps: where records grow, the loss
rises, and falls again.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from longwing.evals.charts import Line, even_ticks, line_chart

NAMES = {
    "lines": "lines: the number of one of many",
    "topics": "topics: the first, or the one after",
    "facts": "facts in prose",
    "passkey": "pass key",
    "prose": "prose, every token",
}


def read_losses(log: Path) -> dict[str, list[tuple[float, float]]]:
    """Kind -> (seconds, loss), of the greatest length in each line of the log."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            by_kind = {}
            for length in sorted(record["losses"], key=int):
                by_kind |= record["losses"][length]
            for kind, loss in by_kind.items():
                found[kind].append((record["seconds"], loss))
    return found


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    losses = read_losses(given.log)
    lines = [
        Line(name=name, colour=n, points=[(at, loss, loss, loss) for at, loss in losses[kind]])
        for n, (kind, name) in enumerate(NAMES.items())
    ]
    ends = [at for points in losses.values() for at, _ in points]
    picture = line_chart(
        f"loss by second of training: {given.out.stem}",
        lines,
        x_ticks=[(x, f"{x:.0f}") for x, _ in even_ticks(0, max(ends))],
        y_ticks=[(y, f"{y}") for y in range(0, 8, 2)],
        x_name="seconds of training; loss in nats a token",
    )
    given.out.write_text(picture + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
