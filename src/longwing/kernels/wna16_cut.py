"""`Cut`: how a product by streamed weights is cut up into programs, from shapes alone.

Nothing is tried out or read back at run time, so every launch can be captured in a CUDA graph. What
was tried is in bench/kernels.py, bench/cuts.py and docs/LOG.md.

Shape key: T tokens, K in features, N out features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longwing.kernels.streamed import TILE_OUT, TOKEN_TILES, StreamedWeight

NARROW_TOKENS = 8
"""Up to here mma.sync takes the digits of all tokens; above, wgmma takes 16, 32 or 64 tokens."""

STREAM_TOKENS = 256
"""Above this a dense slice and cuBLAS are faster (measured on an H200, bench/kernels.py)."""

NARROW_PROGRAMS = 528
"""Programs that a narrow launch aims at: four on each of an H200's 132 multiprocessors."""

PROGRAMS_BESIDE = 1024
"""Narrow programs of the largest of some launches that run beside each other (bench/cuts.py: for a
block of Falcon-40B 512 or 2,048 are 4 us slower)."""

CHUNKS_EACH = 4, 32
"""Chunks of inputs for each of them, at least and at most."""

WIDE_PROGRAMS = 264
"""Wide programs that run at once: two on each multiprocessor, by their registers."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a launch is cut up.

    Attributes:
        tokens: of a program's tile: 2 or 8 narrow, 16, 32 or 64 wide.
        splits: programs that share a tile's inputs.
        stages: chunks in flight for each program.
    """

    tokens: int
    splits: int
    stages: int

    @property
    def wide(self) -> bool:
        """Whether numbers are multiplied, by wgmma, rather than digits, by mma.sync."""
        return self.tokens > NARROW_TOKENS


def choose_cut(weight: StreamedWeight, num_tokens: int, chunks_each: int | None = None) -> Cut:
    """The best of those that bench/kernels.py tries. Narrow splits do not depend on the tokens.

    Alone, a narrow launch is cut so that all its programs run at once and end together. Beside
    other launches they would not, as these come to lie unevenly over the multiprocessors; there
    programs are short, of `chunks_each`, and the next ones even that out (bench/step.py). Tiles of
    16 tokens, of which fewer run at once, take twice as many.
    """
    tiles, chunks = weight.starts[-1] // TILE_OUT, weight.words.shape[1]
    narrow = 2 if num_tokens <= 2 else 8
    if num_tokens <= NARROW_TOKENS and chunks_each:
        return Cut(tokens=narrow, splits=max(round(chunks / chunks_each), 1), stages=4)
    if num_tokens <= NARROW_TOKENS:
        splits = min(max(round(NARROW_PROGRAMS / tiles), 1), chunks)
        return Cut(tokens=narrow, splits=splits, stages=3)
    tokens = next((tokens for tokens in (16, 32) if num_tokens <= tokens), 64)
    stages = 5 if tokens <= 32 else 3
    token_tiles = -(-num_tokens // tokens)
    if token_tiles > TOKEN_TILES:
        return Cut(tokens=tokens, splits=1, stages=stages)
    if tokens == 16 and chunks_each:
        return Cut(tokens=16, splits=max(round(chunks / (2 * chunks_each)), 1), stages=stages)
    programs = tiles * token_tiles
    splits = min(range(1, min(chunks, 8) + 1), key=lambda splits: _waves(programs, splits))
    return Cut(tokens=tokens, splits=splits, stages=stages)


def chunks_beside(weights: Sequence[StreamedWeight]) -> int:
    """Chunks of inputs for each narrow program, where these weights' launches run side by side."""
    most = max(weight.starts[-1] // TILE_OUT * weight.words.shape[1] for weight in weights)
    least, limit = CHUNKS_EACH
    return min(max(round(most / PROGRAMS_BESIDE), least), limit)


def _waves(programs: int, splits: int) -> float:
    """Rounds that a wide launch takes, in those of whole inputs; a split costs a tenth of one."""
    return math.ceil(programs * splits / WIDE_PROGRAMS) / splits * (1 + splits / 10)
