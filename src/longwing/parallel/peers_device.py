# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that adds small tensors of several GPUs, in Triton. Launched by `peers.py`.

Shape key: T tokens, D model dim, X norms.
"""

import triton
import triton.language as tl

from longwing.kernels.digits_device import leave_digits


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
def _leave_scaled(scaled, program, tiles, T, D, digits_ptr, steps_ptr, TILE: tl.constexpr):
    """A tile of one token as blocks of `Digits`."""
    own: tl.constexpr = TILE // 128
    block_B = program % tiles * own + tl.arange(0, own)
    token_B = program // tiles + tl.zeros((own,), tl.int32)
    x = scaled.to(tl.float32).reshape(own, 128)
    leave_digits(x, block_B, token_B, block_B >= 0, T, D // 128, digits_ptr, steps_ptr)


@triton.jit(do_not_specialize=["T"])
def add_over_ranks(
    x_ptr,
    more_ptr,
    out_ptr,
    norm_ptr,
    second_norm_ptr,
    digits_ptr,
    steps_ptr,
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
      go to digits_ptr and steps_ptr, as a `Scaled` has them, and sums of the results to stats_ptr,
      (D / TILE, T, 2) float32.
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
        scaled = (y * weight).to(number)
        _leave_scaled(scaled, program, tiles, T, D, digits_ptr, steps_ptr, TILE)
        if second_norm_ptr is not None:
            digits_ptr += 3 * T.to(tl.int64) * D
            steps_ptr += T.to(tl.int64) * (D // 128)
            scaled = (y * second_weight).to(number)
            _leave_scaled(scaled, program, tiles, T, D, digits_ptr, steps_ptr, TILE)
        stats = stats_ptr + (program % tiles * T + program // tiles) * 2
        # In float64, so that their order does not show in float32.
        exact = y.to(tl.float64)
        tl.store(stats, tl.sum(exact).to(tl.float32))
        tl.store(stats + 1, tl.sum(exact * exact).to(tl.float32))
    tl.store(turns_ptr + program, turn)
