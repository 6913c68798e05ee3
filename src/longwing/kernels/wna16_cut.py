"""`Cut`: how a product by streamed weights is cut up into programs, from shapes alone.

Nothing is tried out or read back at run time, so every launch can be captured in a CUDA graph. What
was tried is in bench/kernels.py, bench/cuts.py and docs/LOG.md.

Shape key: T tokens, K in features, N out features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from longwing.kernels.streamed import TILE_OUT, TOKEN_TILES, StreamedWeight

NARROW_TOKENS = 8
"""Up to here mma.sync takes the digits of all tokens; above, wgmma takes 16, 32 or 64 tokens."""

STREAM_TOKENS = 256
"""Above this a dense slice and cuBLAS are faster (measured on an H200, bench/kernels.py)."""

NARROW_PROGRAMS = 528
"""Programs that a narrow launch aims at: four on each of an H200's 132 multiprocessors."""

LEAST_CHUNKS = 6
"""Of inputs for each program of a narrow launch beside others, where its tiles allow."""

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


@dataclass(frozen=True, kw_only=True)
class Beside:
    """How a launch is cut that runs beside others, which all want room at the same time.

    Attributes:
        two: programs that it aims at for up to 2 tokens.
        eight: for 3 to 8.
        chunks: of inputs for each program, for 9 to 16.
    """

    two: int
    eight: int
    chunks: int


@dataclass(frozen=True, kw_only=True)
class ParallelBlock:
    """The four products of a block whose attention and MLP run beside each other.

    What attention waits for comes in many programs, and soon; the MLP leaves it room, and the
    product after attention leaves room to the MLP's second (bench/cuts.py: Falcon-40B and 7B).
    """

    attention_in: Beside
    attention_out: Beside
    mlp_in: Beside
    mlp_out: Beside

    @classmethod
    def of(cls, weights: Sequence[StreamedWeight]) -> Self:
        """For these four, in any order."""
        most = max(weight.starts[-1] // TILE_OUT * weight.words.shape[1] for weight in weights)
        chunks = min(max(round(most / 512), 8), 64)
        return cls(
            attention_in=Beside(two=432, eight=432, chunks=chunks),
            attention_out=Beside(two=216, eight=384, chunks=chunks),
            mlp_in=Beside(two=264, eight=400, chunks=chunks),
            mlp_out=Beside(two=300, eight=448, chunks=chunks),
        )


def choose_cut(weight: StreamedWeight, num_tokens: int, beside: Beside | None = None) -> Cut:
    """The best of those that bench/kernels.py tries, or bench/cuts.py for launches beside others.

    Alone, a narrow launch is cut so that all its programs run at once and end together. Launches
    beside each other share the multiprocessors, and their shared memory: a multiprocessor has to
    come to rest before it shares that out anew, so narrow launches all have as many stages.
    """
    tiles, chunks = weight.starts[-1] // TILE_OUT, weight.words.shape[1]
    if num_tokens <= NARROW_TOKENS:
        few = num_tokens <= 2
        tokens, stages = (2, 4) if few and beside else (2 if few else 8, 3)
        programs, most = NARROW_PROGRAMS, chunks
        if beside is not None:
            programs, most = beside.two if few else beside.eight, chunks // LEAST_CHUNKS
        splits = max(min(round(programs / tiles), most), 1)
        return Cut(tokens=tokens, splits=splits, stages=stages)
    tokens = next((tokens for tokens in (16, 32) if num_tokens <= tokens), 64)
    stages = 5 if tokens <= 32 else 3
    token_tiles = -(-num_tokens // tokens)
    if token_tiles > TOKEN_TILES:
        return Cut(tokens=tokens, splits=1, stages=stages)
    if tokens == 16 and beside is not None:
        return Cut(tokens=16, splits=max(round(chunks / beside.chunks), 1), stages=stages)
    programs = tiles * token_tiles
    splits = min(range(1, min(chunks, 8) + 1), key=lambda splits: _waves(programs, splits))
    return Cut(tokens=tokens, splits=splits, stages=stages)


def _waves(programs: int, splits: int) -> float:
    """Rounds that a wide launch takes, in those of whole inputs; a split costs a tenth of one."""
    return math.ceil(programs * splits / WIDE_PROGRAMS) / splits * (1 + splits / 10)
