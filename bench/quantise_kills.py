"""Kill a quantising run at random instants, resume it, and compare every byte.

    python bench/quantise_kills.py --kills 30

Each round starts `longwing quantize` on a small random model, kills it (SIGKILL) after a random
time until a start is let through to the end, and hashes every file of the result. Prints
one line a round and exits with 1 if any differs from the uninterrupted run's.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from transformers import LlamaConfig

from tiny import COMMON, save_model, write_tokenizer


def digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as base_name:
        base = Path(base_name)
        source = base / "dense"
        source.mkdir()
        shape = {**COMMON, "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
        save_model(LlamaConfig(**shape, intermediate_size=96), source)
        write_tokenizer(source)
        command = [sys.executable, "-m", "longwing", "quantize", str(source)]
        options = ["--group-size", "32", "--samples", "8", "--seqlen", "64"]
        started = time.monotonic()
        subprocess.run([*command, str(base / "whole"), *options], check=True, capture_output=True)
        length_s = time.monotonic() - started
        expected = digest(base / "whole")
        print(f"uninterrupted: {length_s:.1f} s, sha256 {expected[:16]}")
        kills = rounds = wrong = 0
        while kills < args.kills:
            target = base / f"round-{rounds}"
            waits = []
            while not target.exists():
                run = subprocess.Popen(
                    [*command, str(target), *options],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                wait_s = rng.uniform(0.3, 1.05) * length_s
                try:
                    run.wait(wait_s)
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGKILL)
                    run.wait()
                    kills += 1
                    waits.append(round(wait_s, 2))
            same = digest(target) == expected
            wrong += not same
            rounds += 1
            print(json.dumps({"round": rounds, "killed_after_s": waits, "same_bytes": same}))
        leftovers = [path.name for path in base.iterdir() if path.name.startswith(".")]
        print(f"{kills} kills in {rounds} rounds, {wrong} differing, left over: {leftovers}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
