"""The gradient operands of the backward products as bfloat16 values, in one orientation or in both from one read.

Bytes an element of a bfloat16 gradient: 2 read, 2 written for each orientation. A program walks over tiles; a thread owns whole groups
(`rotation`), so rounding needs no exchange. A second launch makes the few tiles again that need the tensor scale (`eden_values`); it reads
a byte for each row of a tile and mostly ends there.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_div, ceil_to
from quartet_compile.kernels.triton_kernels.eden_values import (
    AGAIN,
    CHECKED_CHUNKS,
    CHUNK_ROWS,
    chunks_that_need_exact,
    exact_values,
    fast_values,
    store_smallest,
    store_values,
)
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.ms_eden import largest_peak, new_flags, store_peak
from quartet_compile.kernels.triton_kernels.random import STREAM_GRADIENT, anew, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import load_rotation, rotate


@triton.jit
def load_tile(x, first_row, first_column, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    start = x + first_row.to(tl.int64) * row_stride + first_column.to(tl.int64) * column_stride
    inside = (first_row + i < rows)[:, None] & (first_column + j < columns)[None, :]
    return tl.load(start + i[:, None] * row_stride + j[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def _emit(operand, rotation, out, first_row, rows, block, blocks, exponents, tile, seed, scale):
    """Rotate and round a tile [n, 128] of an operand and store it at its row and block of 128 columns.

    Returns the bits of the largest t of each row.
    """
    i = tl.arange(0, operand.shape[0])
    values, bits, bits_or_infinity = fast_values(rotate(operand, rotation, True), seed, first_row + i, block, scale, STREAM_GRADIENT)
    store_smallest(bits_or_infinity, exponents, tile)
    store_values(values, out, first_row, i, rows, block, blocks)
    return tl.max(bits, 1)


@triton.jit(do_not_specialize=["row_index", "column_index", "rank"])
def gradient_values_kernel(
    x, rotations, row_out, column_out, row_program_peaks, column_program_peaks, row_exponents, column_exponents, seeds,
    row_index, column_index, rank, scale, rows, columns, row_stride, column_stride, tiles,
    ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] -> row_out [rows, ceil(columns/128)*128] and column_out [columns, ceil(rows/128)*128], whichever is asked for."""
    row_peaks = tl.zeros((ROWS,), tl.int32)
    column_peaks = tl.zeros((COLUMNS,), tl.int32)
    if ROW:
        row_rotation = load_rotation(rotations, row_index, x.dtype.element_ty)
        row_seed = seed_of_rank(seeds, row_index, rank)
    if COLUMN:
        column_rotation = load_rotation(rotations, column_index, x.dtype.element_ty)
        column_seed = seed_of_rank(seeds, column_index, rank)
    across = tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        down = tile // across
        right = tile % across
        values = load_tile(x, down * ROWS, right * COLUMNS, rows, columns, row_stride, column_stride, ROWS, COLUMNS)
        if ROW:
            blocks = tl.cdiv(columns, 128)
            bits = _emit(values, row_rotation, row_out, down * ROWS, rows, right, blocks, row_exponents, tile, anew(row_seed), scale)
            row_peaks = tl.maximum(row_peaks, bits)
        if COLUMN:
            blocks = tl.cdiv(rows, 128)
            turned = tl.trans(values)
            bits = _emit(
                turned, column_rotation, column_out, right * COLUMNS, columns, down, blocks, column_exponents, tile,
                anew(column_seed), scale,
            )  # fmt: skip
            column_peaks = tl.maximum(column_peaks, bits)
    if ROW:
        store_peak(row_peaks, row_program_peaks)
    if COLUMN:
        store_peak(column_peaks, column_program_peaks)


_COUNTS = ["row_index", "column_index", "rank", "rows", "columns", "row_stride", "column_stride", "tiles", "programs"]


@triton.jit(do_not_specialize=_COUNTS)
def gradient_again_kernel(
    x, rotations, row_out, column_out, row_program_peaks, column_program_peaks, row_exponents, column_exponents, seeds,
    row_index, column_index, rank, scale, rows, columns, row_stride, column_stride, tiles, programs,
    ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The chunks of rows that need the tensor scale, now that it is known. Any number of programs.

    Both orientations are the same code with the sides of x exchanged: where both are asked for, the second half of the checks turns them.
    """
    HEIGHT: tl.constexpr = ROWS if ROW else COLUMNS
    tl.static_assert(not (ROW and COLUMN) or ROWS == COLUMNS)
    row_bits = largest_peak(row_program_peaks, programs if ROW else 0)
    column_bits = largest_peak(column_program_peaks, programs if COLUMN else 0)
    chunks = tiles * (HEIGHT // CHUNK_ROWS)
    checks = tl.cdiv(chunks, CHECKED_CHUNKS)
    for check in range(tl.program_id(0), checks * (2 if ROW and COLUMN else 1), tl.num_programs(0)):
        turned = check >= (checks if ROW else 0)
        first = check % checks * CHECKED_CHUNKS
        exponents = row_exponents
        if turned:
            exponents = column_exponents
        bits = tl.where(turned, column_bits, row_bits)
        marked = chunks_that_need_exact(exponents, first, chunks, bits, 1.0)
        if marked != 0:
            out, index = row_out, row_index
            down, across, down_stride, across_stride = rows, columns, row_stride, column_stride
            if turned:
                out, index = column_out, column_index
                down, across, down_stride, across_stride = columns, rows, column_stride, row_stride
            blocks = tl.cdiv(across, 128)
            strips = tl.cdiv(down, HEIGHT)
            rotation = load_rotation(rotations, index, x.dtype.element_ty)
            seed = seed_of_rank(seeds, index, rank)
            i = tl.arange(0, CHUNK_ROWS)
            # Three products' operands leave no registers for what would be hoisted out of the loop.
            for c in tl.range(CHECKED_CHUNKS, disable_licm=x.dtype.element_ty == tl.float32):
                if (marked >> c) & 1:
                    row = (first + c) * CHUNK_ROWS
                    tile = row // HEIGHT
                    # Tiles of x were counted along its rows first.
                    block = tl.where(turned, tile // strips, tile % blocks)
                    first_row = tl.where(turned, tile % strips, tile // blocks) * HEIGHT + row % HEIGHT
                    values = load_tile(x, first_row, block * 128, down, across, down_stride, across_stride, CHUNK_ROWS, 128)
                    values = exact_values(rotate(values, rotation, True), bits, seed, first_row + i, block, scale, STREAM_GRADIENT)
                    store_values(values, out, first_row, i, down, block, blocks)


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, programs resident on a multiprocessor, and launch options."""

    rows: int
    columns: int
    resident: int
    stages: int
    options: dict[str, int]


def tile_for(capability: int, dtype: torch.dtype, row: bool, column: bool) -> Tile:
    """The tile of `gradient_values_kernel`: measured on Hopper, elsewhere such as compile without spilling.

    Both orientations at once only where `both_at_once` says so.
    """
    if row and column:
        return Tile(128, 128, 1, 3, {"num_warps": 8})
    if dtype == torch.float32:
        short, tile = 16, (2, 1, {"num_warps": 8})
    elif capability == 90:
        short, tile = 64, (2, 3, {"num_warps": 4})
    else:
        short, tile = 16, (4, 1, {"num_warps": 4})
    return Tile(short if row else 128, 128 if row else short, *tile)


def both_at_once(capability: int, dtype: torch.dtype) -> bool:
    """Two rotation matrices and three tiles in flight take 160 KiB of shared memory, and the tensor cores must read them there.

    Capability 0 is the interpreter.
    """
    return capability in (0, 90) and dtype != torch.float32


def grad_values(
    e: Tensor, rotations: Tensor, seeds: Tensor, index: int | None, transposed_index: int | None, rule: str, scale: float, rank: int
) -> tuple[Tensor | None, Tensor | None]:
    """The values of e [M, N] times `scale`, rotated along N by rotation `index`, and along M, transposed, by `transposed_index`.

    An index of None leaves its orientation out.
    """
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    target, (rows, columns) = target_of(e), e.shape
    if index is not None and transposed_index is not None and not both_at_once(target.capability, e.dtype):
        row, _ = grad_values(e, rotations, seeds, index, None, rule, scale, rank)
        return row, grad_values(e, rotations, seeds, None, transposed_index, rule, scale, rank)[1]
    if max(map(abs, e.stride())) >= 2**24:
        e = e.contiguous()  # offsets within a tile are 32-bit
    row_out = None if index is None else e.new_empty((rows, ceil_to(columns, ROTATION)), dtype=torch.bfloat16)
    column_out = None if transposed_index is None else e.new_empty((columns, ceil_to(rows, ROTATION)), dtype=torch.bfloat16)
    if e.numel() == 0:
        return row_out if row_out is None else row_out.zero_(), column_out if column_out is None else column_out.zero_()
    asked = {"ROW": row_out is not None, "COLUMN": column_out is not None}
    tile = tile_for(target.capability, e.dtype, asked["ROW"], asked["COLUMN"])
    tiles = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
    programs = min(tiles, tile.resident * target.processors)
    row_peaks, row_exponents = new_flags(e, programs, tiles, tile.rows)
    column_peaks, column_exponents = new_flags(e, programs, tiles, tile.columns)
    arguments = (
        e, rotations, column_out if row_out is None else row_out, row_out if column_out is None else column_out,
        row_peaks, column_peaks, row_exponents, column_exponents, seeds,
        0 if index is None else index, 0 if transposed_index is None else transposed_index, rank, scale, rows, columns, *e.stride(), tiles,
    )  # fmt: skip
    forms = {**asked, "ROWS": tile.rows, "COLUMNS": tile.columns}
    with on_device_of(e):
        launch(gradient_values_kernel, programs, *arguments, **forms, STAGES=tile.stages, **tile.options, **FUSED)
        launch(gradient_again_kernel, 4 * target.processors, *arguments, programs, **forms, **AGAIN, **EXACT)
    return row_out, column_out
