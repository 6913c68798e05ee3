"""`Cut`: how a product by streamed weights is cut up into programs, from shapes alone.

Nothing is tried out or read back at run time, so every launch can be captured in a CUDA graph. What
was tried is in bench/kernels.py, bench/cuts.py and docs/LOG.md.

Shape key: T tokens, K in features, N out features.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from longwing.kernels.streamed import TILE_OUT, TOKEN_TILES, StreamedWeight

NARROW_TOKENS = 8
"""Up to here mma.sync may take the digits of all tokens (`by_digits`), and norms may be folded."""

FINEST_BY_DIGITS = 64
"""The smallest group; a smaller one has so few inputs that they cannot be fetched ahead."""

STREAM_TOKENS = 256
"""Above this a dense slice and cuBLAS are faster (measured on an H200, bench/kernels.py)."""

NARROW_PROGRAMS = 528
"""Programs that a narrow launch aims at: four on each of an H200's 132 multiprocessors."""

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
    """How a launch is cut that runs beside another, which wants room at the same time.

    Attributes:
        two: programs that it aims at for up to 2 tokens, by digits.
        eight: for 3 to 8, by digits.
        least: chunks of inputs for each of those programs.
        stages: for up to 2 tokens.
        sixteen: chunks of inputs for each program of tiles of 16 tokens.
    """

    two: int
    eight: int
    least: int
    stages: int
    sixteen: int

    def splits(self, weight: StreamedWeight, num_tokens: int) -> int:
        """Programs that share a tile's inputs, by digits."""
        tiles, chunks = _tiles_and_chunks(weight)
        aim = self.two if num_tokens <= 2 else self.eight
        return max(min(round(aim / tiles), chunks // self.least), 1)


@dataclass(frozen=True, kw_only=True)
class ParallelBlock:
    """The four products of a block whose attention and MLP run beside each other.

    What attention waits for comes in many programs, and soon; the MLP's first product leaves it
    room; and the product after attention takes the room that the MLP's second leaves (bench/cuts.py
    on Falcon-40B and 7B, whose best ways these are to 1 us of a block).
    """

    attention_in: Beside
    attention_out: Beside
    mlp_in: Beside
    mlp_out: Beside

    @classmethod
    def of(
        cls,
        *,
        attention_in: StreamedWeight,
        attention_out: StreamedWeight,
        mlp_in: StreamedWeight,
        mlp_out: StreamedWeight,
    ) -> Self:
        """For these weights."""
        most = max(
            math.prod(_tiles_and_chunks(weight))
            for weight in (attention_in, attention_out, mlp_in, mlp_out)
        )
        sixteen = min(max(round(most / 512), 8), 64)
        second = Beside(two=528, eight=528, least=16, stages=3, sixteen=sixteen)
        taken = _tiles_and_chunks(mlp_out)[0] * second.splits(mlp_out, 1)
        first = Beside(two=264, eight=400, least=6, stages=3, sixteen=sixteen)
        # Programs of whole inputs are few, and each has to have more on its way; what runs beside
        # does best with as many.
        stages = 4 if first.splits(mlp_in, 1) == 1 else 3
        return cls(
            attention_in=Beside(two=576, eight=432, least=6, stages=stages, sixteen=sixteen),
            attention_out=Beside(
                two=640 - taken, eight=384, least=6, stages=stages, sixteen=sixteen
            ),
            mlp_in=replace(first, stages=stages),
            mlp_out=second,
        )


def by_digits(weight: StreamedWeight, num_tokens: int) -> bool:
    """Whether a product is of digits and bytes; else wgmma takes numbers of 16, 32 or 64 tokens.

    For 3 tokens to 8 zero points make it slower than wgmma's, which do with the room of 16.
    """
    fine = weight.group_size < min(FINEST_BY_DIGITS, weight.in_features)
    most = 2 if weight.zeros is not None else NARROW_TOKENS
    return 0 < num_tokens <= most and not fine


def choose_cut(weight: StreamedWeight, num_tokens: int, beside: Beside | None = None) -> Cut:
    """The best of those that bench/kernels.py tries, or bench/cuts.py for launches beside others.

    Alone, a narrow launch is cut so that all its programs run at once and end together.
    """
    tiles, chunks = _tiles_and_chunks(weight)
    if by_digits(weight, num_tokens):
        few = num_tokens <= 2
        if beside is None:
            splits, stages = max(min(round(NARROW_PROGRAMS / tiles), chunks), 1), 3
        else:
            splits, stages = beside.splits(weight, num_tokens), beside.stages if few else 3
        return Cut(tokens=2 if few else 8, splits=splits, stages=stages)
    tokens = next((tokens for tokens in (16, 32) if num_tokens <= tokens), 64)
    stages = 5 if tokens <= 32 else 3
    token_tiles = -(-num_tokens // tokens)
    if token_tiles > TOKEN_TILES:
        return Cut(tokens=tokens, splits=1, stages=stages)
    if tokens == 16 and beside is not None:
        return Cut(tokens=16, splits=max(round(chunks / beside.sixteen), 1), stages=stages)
    programs = tiles * token_tiles
    splits = min(range(1, min(chunks, 8) + 1), key=lambda splits: _waves(programs, splits))
    return Cut(tokens=tokens, splits=splits, stages=stages)


def _tiles_and_chunks(weight: StreamedWeight) -> tuple[int, int]:
    return weight.starts[-1] // TILE_OUT, weight.words.shape[1]


def _waves(programs: int, splits: int) -> float:
    """Rounds that a wide launch takes, in those of whole inputs; a split costs a tenth of one."""
    return math.ceil(programs * splits / WIDE_PROGRAMS) / splits * (1 + splits / 10)
