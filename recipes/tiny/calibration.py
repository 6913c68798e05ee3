"""Write calibration.jsonl: what longwing-tiny is quantised on, records and prose.

    python recipes/tiny/calibration.py --corpus FILE --out calibration.jsonl

Quantising sees the inputs of each layer. Prose alone would leave out what this model is there for:
labels, numbers, and questions about them many thousand tokens later. Records are written as token
ids: a text could not hold the special tokens that begin a turn and end an answer.
"""

import argparse
import json
from pathlib import Path

import torch
from corpus import END, Corpus
from records import Records

KINDS = {"lines": 32, "topics": 24, "facts": 28, "passkey": 8, "recite": 4, "prose": 32}
LENGTHS = (2304, 6144, 12_500)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("corpus", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="short records")
    given = parser.parse_args()
    records = Records(Corpus(given.corpus, torch.device("cpu")), seed=7)
    with given.out.open("w", encoding="utf-8") as out:
        for kind, count in KINDS.items():
            for number in range(count):
                length = 2304 if given.toy else LENGTHS[number % len(LENGTHS)]
                (ids,) = records.batch(kind, 1, length).tokens_BT.tolist()
                while ids[-2:] == [END, END]:  # what fills the row up
                    ids.pop()
                out.write(json.dumps({"input_ids": ids}) + "\n")


if __name__ == "__main__":
    main()
