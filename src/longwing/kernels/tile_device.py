# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Which rows a tile of attention has, and where what comes of them goes.

Shape key, on blocks: R rows of a tile (row r of a sequence is query head r % G at new token r // G,
G query heads of a KV head), H head dim, padded to a power of two.
"""

import triton
import triton.language as tl

from longwing.kernels.fused_device import arranged


@triton.jit
def place(
    tile,
    starts_ptr,
    context_lens_ptr,
    num_sequences,
    tiles_each,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Whose tile this is: (sequence, its first token, tokens before the new, rows, first row).

    Where every sequence has as many tiles, that is a division. Else sequence s gets the tiles from
    starts[s] * G // R + s on: at least as many as it needs, and nobody had to count.
    """
    if tiles_each > 0:
        s = tile // tiles_each
        first_tile = s * tiles_each
    else:
        s, after = tile * 0, num_sequences
        while after - s > 1:
            middle = (s + after) // 2
            if tl.load(starts_ptr + middle) * GROUP // ROWS + middle <= tile:
                s = middle
            else:
                after = middle
        first_tile = tl.load(starts_ptr + s) * GROUP // ROWS + s
    first_token = tl.load(starts_ptr + s)
    num_new = tl.load(starts_ptr + s + 1) - first_token
    num_before = tl.load(context_lens_ptr + s) - num_new
    return s, first_token, num_before, num_new * GROUP, (tile - first_tile) * ROWS


@triton.jit
def places(head_R, head_dim_H, HEAD_DIM: tl.constexpr, ARRANGE: tl.constexpr):
    """Where in a token's numbers those of its heads lie."""
    first_R1 = (head_R * HEAD_DIM)[:, None]
    if not ARRANGE:
        return first_R1 + head_dim_H[None, :]
    elif HEAD_DIM % 32 == 0:  # what changes places stays in its head
        return first_R1 + arranged(head_dim_H)[None, :]
    else:
        return arranged(first_R1 + head_dim_H[None, :])
