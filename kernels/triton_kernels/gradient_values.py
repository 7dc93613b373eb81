"""The gradient operands of the backward products as bfloat16 values, in one orientation or in both from one read.

Bytes an element of a bfloat16 gradient: 2 read, 2 written for each orientation. A program walks over tiles in one orientation
(`gradient_tiles`); a thread owns whole groups (`rotation`), so rounding needs no exchange. A second launch makes the few rows again that
need the tensor scale (`eden_values`); mostly there are none, and it ends when it has seen two numbers of each program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_to
from quartet_compile.kernels.triton_kernels import gradient_tiles
from quartet_compile.kernels.triton_kernels.eden_values import (
    AGAIN,
    CHECKED_CHUNKS,
    CHUNK_ROWS,
    checks_of,
    chunks_below,
    exact_values,
    fast_values,
    store_smallest,
    store_values,
)
from quartet_compile.kernels.triton_kernels.gradient_tiles import Tile, load_halves, load_operand, place_of, walk
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.ms_eden import (
    INFINITY_BITS,
    exponent_limit,
    largest_peak,
    least_exponent,
    new_flags,
    store_extremes,
)
from quartet_compile.kernels.triton_kernels.overlap import let_next_begin, wait_for_first
from quartet_compile.kernels.triton_kernels.random import STREAM_GRADIENT, anew, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import load_rotation, rotate


@triton.jit
def _walk(
    x, rotation, out, peaks, leasts, exponents, seed, first, step, scale, rows, columns, row_stride, column_stride, tiles,
    TURNED: tl.constexpr, HEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every step'th tile, from `first` on, of x [rows, columns] or, TURNED, of its transpose -> out, and the flags of `new_flags`."""
    i = tl.arange(0, HEIGHT)
    largest = tl.zeros((HEIGHT, 8), tl.int32)
    least = tl.full((HEIGHT, 8), INFINITY_BITS, tl.int32)
    for tile in tl.range(first, tiles, step, num_stages=STAGES):
        halves, start, block, length, blocks = load_operand(x, tile, rows, columns, row_stride, column_stride, TURNED, HEIGHT)
        y = rotate(halves, rotation, True)
        numbers, factor, bits, bits_or_infinity = fast_values(y, anew(seed), start, i, block, scale, STREAM_GRADIENT)
        store_smallest(bits_or_infinity, exponents, tile)
        store_values(numbers, factor, out, start, i, length, block, blocks)
        largest = tl.maximum(largest, bits)
        least = tl.minimum(least, bits_or_infinity)
    store_extremes(largest, least, peaks + first, leasts + first)


@triton.jit(do_not_specialize=["row_index", "column_index", "rank", "tiles"])
def gradient_values_kernel(
    x, rotations, row_out, column_out, peaks, exponents, seeds, row_index, column_index, rank, scale,
    rows, columns, row_stride, column_stride, tiles,
    ROW: tl.constexpr, COLUMN: tl.constexpr, HEIGHT: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] -> row_out [rows, ceil(columns/128)*128] and column_out [columns, ceil(rows/128)*128], whichever is asked for.

    An even number of programs where both are; the column's flags are behind the row's. peaks: the largest and, behind them, the least t.
    """
    let_next_begin(EARLY)
    SIDES: tl.constexpr = 2 if ROW and COLUMN else 1
    first = tl.program_id(0) // SIDES
    step = tl.num_programs(0) // SIDES
    if tl.program_id(0) % SIDES == (0 if ROW else 1):
        rotation = load_rotation(rotations, row_index, x.dtype.element_ty)
        seed = seed_of_rank(seeds, row_index, rank)
        _walk(
            x, rotation, row_out, peaks, peaks + tl.num_programs(0), exponents, seed, first, step, scale,
            rows, columns, row_stride, column_stride, tiles,
            False, HEIGHT, STAGES,
        )  # fmt: skip
    else:
        rotation = load_rotation(rotations, column_index, x.dtype.element_ty)
        seed = seed_of_rank(seeds, column_index, rank)
        BEHIND: tl.constexpr = SIDES - 1
        _walk(
            x, rotation, column_out, peaks + BEHIND * step, peaks + tl.num_programs(0) + BEHIND * step,
            exponents + BEHIND * tiles * HEIGHT, seed, first, step, scale,
            rows, columns, row_stride, column_stride, tiles,
            True, HEIGHT, STAGES,
        )  # fmt: skip


_COUNTS = ["row_index", "column_index", "rank", "rows", "columns", "row_stride", "column_stride", "tiles", "programs"]


@triton.jit(do_not_specialize=_COUNTS)
def gradient_again_kernel(
    x, rotations, row_out, column_out, peaks, exponents, seeds, row_index, column_index, rank, scale,
    rows, columns, row_stride, column_stride, tiles, programs,
    ROW: tl.constexpr, COLUMN: tl.constexpr, HEIGHT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The chunks of rows that need the tensor scale, now that it is known. Any number of programs.

    programs: how many of the first launch did each orientation. Both are the same code with the sides of x exchanged, and all programs
    look at both: often it is one of them that has rows to be made again.
    """
    wait_for_first(EARLY)
    SIDES: tl.constexpr = 2 if ROW and COLUMN else 1
    BEHIND: tl.constexpr = SIDES - 1
    leasts = peaks + SIDES * programs
    bits, other_bits = largest_peak(peaks, programs), largest_peak(peaks + BEHIND * programs, programs)
    least, other_least = least_exponent(leasts, programs), least_exponent(leasts + BEHIND * programs, programs)
    chunks = tiles * (HEIGHT // CHUNK_ROWS)
    for side in range(SIDES):
        turned = side == (1 if ROW else 0)
        out, index = row_out, row_index
        length, across, down_stride, across_stride = rows, columns, row_stride, column_stride
        if turned:
            out, index = column_out, column_index
            length, across, down_stride, across_stride = columns, rows, column_stride, row_stride
        limit = exponent_limit(bits, 1.0)
        checks = tl.where(least < limit, checks_of(chunks), 0)
        for check in range(tl.program_id(0), checks, tl.num_programs(0)):
            marked = chunks_below(exponents, check, chunks, limit)
            if marked != 0:
                rotation = load_rotation(rotations, index, x.dtype.element_ty)
                seed = seed_of_rank(seeds, index, rank)
                i = tl.arange(0, CHUNK_ROWS)
                # Three products' operands leave no registers for what would be hoisted out of the loop.
                for c in tl.range(CHECKED_CHUNKS, disable_licm=x.dtype.element_ty == tl.float32):
                    if (marked >> c) & 1:
                        row = (check + c * checks) * CHUNK_ROWS
                        down, right, part = place_of(row // HEIGHT, columns, HEIGHT)
                        block = tl.where(turned, down, right)
                        first_row = tl.where(turned, right, down) * 128 + part * HEIGHT + row % HEIGHT
                        halves = load_halves(x, first_row, block * 128, length, across, down_stride, across_stride, CHUNK_ROWS)
                        y = rotate(halves, rotation, True)
                        numbers, factor = exact_values(y, bits, seed, first_row, i, block, scale, STREAM_GRADIENT)
                        store_values(numbers, factor, out, first_row, i, length, block, tl.cdiv(across, 128))
        exponents += tiles * HEIGHT
        bits, least = other_bits, other_least


def tile_for(capability: int, dtype: torch.dtype, sides: int) -> Tile:
    """The tile of `gradient_values_kernel` for so many orientations: measured on Hopper."""
    if capability // 10 == 9 and dtype != torch.float32:
        return Tile(128, 1, 2 + sides, {"num_warps": 8})
    return gradient_tiles.tile_for(capability, dtype)


def grad_values(
    e: Tensor, rotations: Tensor, seeds: Tensor, index: int | None, transposed_index: int | None, rule: str, scale: float, rank: int
) -> tuple[Tensor | None, Tensor | None]:
    """The values of e [M, N] times `scale`, rotated along N by rotation `index`, and along M, transposed, by `transposed_index`.

    An index of None leaves its orientation out.
    """
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    target, (rows, columns) = target_of(e), e.shape
    if max(map(abs, e.stride())) >= 2**24:
        e = e.contiguous()  # offsets within a tile are 32-bit
    row_out = None if index is None else e.new_empty((rows, ceil_to(columns, ROTATION)), dtype=torch.bfloat16)
    column_out = None if transposed_index is None else e.new_empty((columns, ceil_to(rows, ROTATION)), dtype=torch.bfloat16)
    if e.numel() == 0:
        return row_out if row_out is None else row_out.zero_(), column_out if column_out is None else column_out.zero_()
    asked = {"ROW": row_out is not None, "COLUMN": column_out is not None}
    sides = sum(asked.values())
    tile = tile_for(target.capability, e.dtype, sides)
    tiles, programs = walk(rows, columns, sides, tile, target)
    peaks, exponents = new_flags(e, 2 * sides * programs, sides * tiles, tile.height)
    arguments = (
        e, rotations, column_out if row_out is None else row_out, row_out if column_out is None else column_out, peaks, exponents, seeds,
        0 if index is None else index, 0 if transposed_index is None else transposed_index, rank, scale, rows, columns, *e.stride(), tiles,
    )  # fmt: skip
    forms = {**asked, "HEIGHT": tile.height, "EARLY": target.early}
    with on_device_of(e):
        launch(gradient_values_kernel, sides * programs, *arguments, **forms, STAGES=tile.stages, **tile.options, **FUSED)
        launch(gradient_again_kernel, target.processors, *arguments, programs, **forms, **AGAIN, **EXACT, launch_pdl=target.early)
    return row_out, column_out
