"""Make src/longwing/quant/text/calibration.jsonl.xz, the text that quantising uses offline.

    python recipes/calibration_text.py --classics DIR --speeches DIR --sums gsm8k.train.jsonl

Takes 36 books by 36 authors (one excerpt each, from the middle), presidential addresses and worked
sums; see src/longwing/quant/text/README.md for the sources. The same input gives the same bytes.
"""

import argparse
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).parents[1] / "src/longwing/quant/text/calibration.jsonl.xz"
BOOKS, EXCERPT = 36, 28_000
SPEECH_CHARS, SUM_CHARS = 200_000, 250_000


def books(folder: Path) -> Iterator[str]:
    """One excerpt of each of 36 authors' longest book, cut at line ends."""
    longest: dict[str, Path] = {}
    for file in sorted(folder.glob("*.txt")):
        author = file.name.partition("__")[0]
        if author not in longest or file.stat().st_size > longest[author].stat().st_size:
            longest[author] = file
    chosen = sorted(longest.values())
    random.Random(0).shuffle(chosen)
    for file in chosen[:BOOKS]:
        text = file.read_text(encoding="utf-8")
        start = text.find("\n", len(text) // 2 - EXCERPT // 2) + 1
        yield text[start : text.rfind("\n", start, start + EXCERPT)].strip()


def speeches(folder: Path) -> Iterator[str]:
    """The beginnings of two collections of addresses."""
    for name in ("inaugural.txt", "state_union.txt"):
        yield (folder / name).read_text(encoding="utf-8")[: SPEECH_CHARS // 2].strip()


def sums(file: Path) -> Iterator[str]:
    """Word problems with their worked answers, twenty to a document."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in records]
    taken = 0
    for start in range(0, len(texts), 20):
        document = "\n\n".join(texts[start : start + 20])
        taken += len(document)
        if taken > SUM_CHARS:
            return
        yield document


def main() -> None:
    """Write the file and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classics", type=Path, required=True)
    parser.add_argument("--speeches", type=Path, required=True)
    parser.add_argument("--sums", type=Path, required=True)
    args = parser.parse_args()
    texts = [*books(args.classics), *speeches(args.speeches), *sums(args.sums)]
    random.Random(1).shuffle(texts)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    OUT.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(texts)} documents, {len(lines):,} characters, {OUT.stat().st_size:,} bytes packed")


if __name__ == "__main__":
    main()
