"""longwing-tiny: a small Falcon that was trained for this package, and where its folder lies.

22 million parameters in 4 bits, 24,576 tokens of context, FalconLite2's tokenizer and template. It
finds what a long document holds; it knows little. `generate`, `chat` and `serve` take it when no
model is named. `model/README.md` is its card, `recipes/tiny` how it was made.
"""

from pathlib import Path

NAME = "longwing-tiny"
"""What tables and messages call it."""

FOLDER = Path(__file__).parent / "model"
"""An ordinary model folder, as `longwing quantize` writes it."""
