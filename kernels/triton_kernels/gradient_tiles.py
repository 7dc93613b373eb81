"""How programs walk over a gradient: tiles of the operand that is its rows, or its columns.

Tiles are HEIGHT rows or columns of a square of 128 x 128, so one orientation has as many as the other. Where both are asked for,
neighbouring programs take one each of the same tiles at about the same time: whoever is second finds them in the L2 cache. One program for
both needs the registers and the shared memory of two; measured on Hopper it was slower for values and as fast for codes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quartet_compile.kernels.format import ceil_div
from quartet_compile.kernels.triton_kernels.launch import Target
from quartet_compile.kernels.triton_kernels.ms_eden import MOST_PROGRAMS


@dataclass(frozen=True)
class Tile:
    """Rows of an operand's tile, programs that fit on a multiprocessor, how many tiles ahead are loaded, and launch options."""

    height: int
    resident: int
    stages: int
    options: dict[str, int]


def tile_for(capability: int, dtype: torch.dtype) -> Tile:
    """Measured on Hopper; elsewhere such as compiles without spilling."""
    if capability // 10 == 9 and dtype != torch.float32:
        return Tile(64, 3, 3, {"num_warps": 4})
    if capability // 10 == 12 and dtype == torch.float32:
        return Tile(32, 2, 2, {"num_warps": 4})
    return Tile(64, 2, 2, {"num_warps": 4})


def walk(rows: int, columns: int, sides: int, tile: Tile, target: Target) -> tuple[int, int]:
    """For x [rows, columns] in one orientation or two (`sides`): tiles, and programs that share them, of each orientation."""
    tiles = ceil_div(rows, 128) * ceil_div(columns, 128) * (128 // tile.height)
    return tiles, min(tiles, max(1, tile.resident * target.processors // sides), MOST_PROGRAMS)


@triton.jit
def place_of(tile, columns, HEIGHT: tl.constexpr):
    """Of tiles of x [M, columns], squares counted in reading order: square down, square to the right, part of the square."""
    PARTS: tl.constexpr = 128 // HEIGHT
    across = tl.cdiv(columns, 128)
    square = tile // PARTS
    return square // across, square % across, tile % PARTS


@triton.jit
def load_halves(x, first_row, first_column, rows, columns, row_stride, column_stride, HEIGHT: tl.constexpr):
    """The halves [HEIGHT, 64] of a tile [HEIGHT, 128] of x [rows, columns]. x may be a transpose."""
    front = _load(x, first_row, first_column, rows, columns, row_stride, column_stride, HEIGHT)
    back = _load(x, first_row, first_column + 64, rows, columns, row_stride, column_stride, HEIGHT)
    return front, back


@triton.jit
def _load(x, first_row, first_column, rows, columns, row_stride, column_stride, HEIGHT: tl.constexpr):
    i = tl.arange(0, HEIGHT)
    j = tl.arange(0, 64)
    start = x + first_row.to(tl.int64) * row_stride + first_column.to(tl.int64) * column_stride
    inside = (first_row + i < rows)[:, None] & (first_column + j < columns)[None, :]
    return tl.load(start + i[:, None] * row_stride + j[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def load_operand(x, tile, rows, columns, row_stride, column_stride, TURNED: tl.constexpr, HEIGHT: tl.constexpr):
    """The halves [HEIGHT, 64] of a tile [HEIGHT, 128] of x [rows, columns] or, TURNED, of its transpose.

    And where it is in that operand: its first row and its block of 128 columns, of so many rows and blocks.
    """
    down, right, part = place_of(tile, columns, HEIGHT)
    if TURNED:
        first_row, block, length, blocks = right * 128 + part * HEIGHT, down, columns, tl.cdiv(rows, 128)
        halves = load_halves(x, first_row, down * 128, columns, rows, column_stride, row_stride, HEIGHT)
    else:
        first_row, block, length, blocks = down * 128 + part * HEIGHT, right, rows, tl.cdiv(columns, 128)
        halves = load_halves(x, first_row, right * 128, rows, columns, row_stride, column_stride, HEIGHT)
    return halves, first_row, block, length, blocks
