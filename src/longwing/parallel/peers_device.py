# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that adds small tensors of several GPUs, in Triton. Launched by `peers.py`.

Shape key: T tokens, D model dim, X norms.
"""

import triton
import triton.language as tl


@triton.jit
def _place(memory, slot, source, program, number: tl.constexpr,
           SIZE: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Where in a rank's memory a program of the source leaves its tile."""
    tile = ((slot * SIZE + source) * PROGRAMS + program).to(tl.int64)
    address = memory + tile * (TILE * 4)
    return tl.multiple_of(address.to(tl.pointer_type(number)), 16)


@triton.jit
def _flag(memory, source, program,
          SIZE: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Where in a rank's memory a program of the source says how often it has come."""
    tiles: tl.constexpr = 2 * SIZE * PROGRAMS
    flags = memory + tl.full((), tiles, tl.int64) * (TILE * 4)
    return flags.to(tl.pointer_type(tl.int32)) + (source * PROGRAMS + program)


@triton.jit
def add_over_ranks(
    x_ptr,
    more_ptr,
    out_ptr,
    norm_ptr,
    second_norm_ptr,
    scaled_ptr,
    stats_ptr,
    memories_ptr,
    turns_ptr,
    T,
    D,
    numel,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of a sum over ranks: write it to all, wait for theirs, add in order of rank.

    A tile is left in one of two slots by turns. When all others have come to turn n + 1, they are
    done with turn n, so at n + 2 its slot is free: nobody waits at the end of a turn.

    - x_ptr: this rank's (numel,) part of the sum.
    - more_ptr: added to the sum; or None. May be out_ptr.
    - out_ptr: the result, which may be x_ptr.
    - norm_ptr, second_norm_ptr: (D,) weights of the norms that follow, or None; results times those
      go to scaled_ptr, (1 or 2, T, D), and their sums to stats_ptr, (D / TILE, T, 2) float32.
    - memories_ptr: (SIZE,) int64, the address of each rank's memory: 2 slots of SIZE * PROGRAMS
      tiles, then as many flags as tiles in a slot.
    - turns_ptr: (PROGRAMS,) int32, how often each program has come.
    """
    program = tl.program_id(0)
    number: tl.constexpr = x_ptr.dtype.element_ty
    within = tl.arange(0, TILE)
    at = program.to(tl.int64) * TILE + within
    there = at < numel
    turn = tl.load(turns_ptr + program) + 1
    slot = turn & 1
    x = tl.load(x_ptr + at, mask=there, other=0.0)
    for other in tl.static_range(SIZE):
        if other != RANK:
            theirs = tl.load(memories_ptr + other)
            place = _place(theirs, slot, RANK, program, number, SIZE, PROGRAMS, TILE)
            tl.store(place + within, x, mask=there)
    # All lanes have stored before one of them says so; and what it says carries their stores.
    tl.debug_barrier()
    for other in tl.static_range(SIZE):
        if other != RANK:
            theirs = tl.load(memories_ptr + other)
            flag = _flag(theirs, RANK, program, SIZE, PROGRAMS, TILE)
            tl.atomic_xchg(flag, turn, sem="release", scope="sys")
    # These are on their way meanwhile.
    mine = tl.load(memories_ptr + RANK)
    if more_ptr is not None:
        more = tl.load(more_ptr + at, mask=there, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        # Tiles divide D, so this one is of one token.
        tiles = D // TILE
        inputs = program % tiles * TILE + within
        weight = tl.load(norm_ptr + inputs).to(tl.float32)
        if second_norm_ptr is not None:
            second_weight = tl.load(second_norm_ptr + inputs).to(tl.float32)
    for other in tl.static_range(SIZE):
        if other != RANK:
            flag = _flag(mine, other, program, SIZE, PROGRAMS, TILE)
            # It may be a turn ahead. Turns wrap around, their difference does not.
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - turn < 0:
                pass
    tl.debug_barrier()
    total = tl.zeros((TILE,), tl.float32)
    for other in tl.static_range(SIZE):
        if other == RANK:
            total += x.to(tl.float32)
        else:
            place = _place(mine, slot, other, program, number, SIZE, PROGRAMS, TILE)
            # Past the nearest cache, which does not see what others write.
            given = tl.load(place + within, mask=there, other=0.0, cache_modifier=".cg")
            total += given.to(tl.float32)
    if more_ptr is not None:
        total += more
    rounded = total.to(number)
    tl.store(out_ptr + at, rounded, mask=there)
    if norm_ptr is not None:
        y = rounded.to(tl.float32)
        tl.store(scaled_ptr + at, (y * weight).to(number))
        if second_norm_ptr is not None:
            tl.store(scaled_ptr + numel + at, (y * second_weight).to(number))
        stats = stats_ptr + (program % tiles * T + program // tiles) * 2
        # In float64, so that their order does not show in float32.
        exact = y.to(tl.float64)
        tl.store(stats, tl.sum(exact).to(tl.float32))
        tl.store(stats + 1, tl.sum(exact * exact).to(tl.float32))
    tl.store(turns_ptr + program, turn)
