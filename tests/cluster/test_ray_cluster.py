"""Engines and workers on a real Ray cluster of two nodes: bench/cluster.py, small."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `cluster`")

BENCH = Path(__file__).parents[2] / "bench" / "cluster.py"


@pytest.mark.slow
def test_what_dies_loses_nothing_and_what_is_spread_gives_the_result_of_one_process() -> None:
    done = subprocess.run(
        [sys.executable, BENCH, "--requests", "45", "--clients", "6"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"part"')]
    rows = {row["part"]: row for row in map(json.loads, lines)}
    assert set(rows) == {"kill", "scale", "affinity", "eval", "quantize"}, done.stderr[-4000:]
    for part in ("kill", "scale"):
        assert rows[part]["lost"] == 0
        assert rows[part]["whole"] + rows[part]["cut"] == rows[part]["requests"] >= 45
    assert rows["scale"]["front_stayed"]
    assert rows["affinity"]["found"] >= 0.95
    assert rows["eval"]["same"]
    assert rows["eval"]["killed"] == 1
    assert rows["quantize"]["same"]
