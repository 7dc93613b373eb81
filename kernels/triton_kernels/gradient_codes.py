"""The gradient operands of the backward products, packed: in one orientation, or in both from one read.

Bytes an element of a bfloat16 gradient: 2 read, 0.5625 written for each orientation; aligning the scales, 0.13 for each, mostly meets the
L2 cache. A program makes the matrices of its rotations once and walks over tiles; where tensor cores hand a thread whole groups
(`rotation`), rounding needs no exchange. A second launch, one for each orientation, aligns the scales and makes the few tiles again
that need the tensor scale (`eden_codes`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_div, ceil_to
from quartet_compile.kernels.triton_kernels.eden_codes import (
    align_tiles,
    exact_codes,
    fast_codes,
    store_groups,
    store_provisional,
    store_swizzled,
    store_tensor_scale,
)
from quartet_compile.kernels.triton_kernels.gradient_values import load_tile
from quartet_compile.kernels.triton_kernels.launch import (
    EXACT,
    FUSED,
    Target,
    empty_packed,
    empty_swizzled,
    launch,
    on_device_of,
    target_of,
)
from quartet_compile.kernels.triton_kernels.ms_eden import largest_peak, new_flags, store_peak
from quartet_compile.kernels.triton_kernels.random import STREAM_GRADIENT, anew, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import rotate, signed_hadamard


@triton.jit
def _emit(
    operand, rotation, codes, scales, exponents, first_row, rows, block, blocks, tile, seed,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rotate and round a tile [n, 128] of an operand and store it at its row and block of 128 columns.

    Returns the bits of the largest t of each row.
    """
    i = tl.arange(0, operand.shape[0])
    y = rotate(operand, rotation, PERMUTED)
    front, back, s_bits, t_bits = fast_codes(y, seed, first_row + i, block, STREAM_GRADIENT, 1.0, NATIVE, WHOLE)
    store_provisional(front, back, s_bits, codes, scales, exponents, tile, first_row, i, rows, block, blocks, WHOLE)
    return tl.max(t_bits & 0x7FFFFFFF, 1)


@triton.jit(do_not_specialize=["row_index", "column_index", "rank", "tiles"])
def gradient_codes_kernel(
    x, row_codes, row_scales, row_exponents, row_peaks, column_codes, column_scales, column_exponents, column_peaks, seeds,
    row_index, column_index, rank, rows, columns, row_stride, column_stride, tiles,
    ROW: tl.constexpr, COLUMN: tl.constexpr, PERMUTED: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] -> row_* [rows, ceil(columns/128)*128] and column_* [columns, ceil(rows/128)*128], whichever is asked for.

    Codes are int32 words, scales provisional bytes. Tiles are counted along the columns of x first.
    """
    largest_in_rows = tl.zeros((ROWS,), tl.int32)
    largest_in_columns = tl.zeros((COLUMNS,), tl.int32)
    row_seed = seed_of_rank(seeds, row_index, rank)
    column_seed = seed_of_rank(seeds, column_index, rank)
    if ROW:
        row_rotation = signed_hadamard(row_seed, x.dtype.element_ty, PERMUTED)
    if COLUMN:
        column_rotation = signed_hadamard(column_seed, x.dtype.element_ty, PERMUTED)
    across = tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        down = tile // across
        right = tile % across
        values = load_tile(x, down * ROWS, right * COLUMNS, rows, columns, row_stride, column_stride, ROWS, COLUMNS)
        if ROW:
            bits = _emit(
                values, row_rotation, row_codes, row_scales, row_exponents, down * ROWS, rows, right, tl.cdiv(columns, 128), tile,
                anew(row_seed), PERMUTED, NATIVE, WHOLE,
            )  # fmt: skip
            largest_in_rows = tl.maximum(largest_in_rows, bits)
        if COLUMN:
            bits = _emit(
                tl.trans(values), column_rotation, column_codes, column_scales, column_exponents, right * COLUMNS, columns, down,
                tl.cdiv(rows, 128), tile, anew(column_seed), PERMUTED, NATIVE, WHOLE,
            )  # fmt: skip
            largest_in_columns = tl.maximum(largest_in_columns, bits)
    if ROW:
        store_peak(largest_in_rows, row_peaks)
    if COLUMN:
        store_peak(largest_in_columns, column_peaks)


@triton.jit
def _position(tile, blocks, strips, BLOCKS_FIRST: tl.constexpr):
    """The block of 128 columns and the strip of rows of a tile."""
    if BLOCKS_FIRST:
        block = tile % blocks
        strip = tile // blocks
    else:
        block = tile // strips
        strip = tile % strips
    return block, strip


@triton.jit(do_not_specialize=["index", "rank", "tiles"])
def align_gradient_kernel(
    operand, codes, scales, swizzled, exponents, peaks, out_tensor_scale, seeds, index, rank,
    rows, columns, row_stride, column_stride, tiles, programs,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS_FIRST: tl.constexpr, TILES: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """Provisional scales -> E4M3, and the tensor scale, of one orientation, operand [rows, columns]. A program does TILES tiles.

    SWIZZLED: into `swizzled`, int32, in the order of tensor cores; `scales` then is scratch. Otherwise in place.
    BLOCKS_FIRST: the tiles, ROWS x 128, were counted along the columns of the operand first.
    """
    first = tl.program_id(0) * TILES
    blocks = tl.cdiv(columns, 128)
    strips = tl.cdiv(rows, ROWS)
    bits = largest_peak(peaks, programs)
    store_tensor_scale(bits, 1.0, out_tensor_scale)
    i = tl.arange(0, ROWS)
    of_block, of_strip = _position(first + tl.arange(0, TILES), blocks, strips, BLOCKS_FIRST)
    marked = align_tiles(scales, swizzled, exponents, bits, of_strip * ROWS, i, rows, of_block, blocks, first, tiles, SWIZZLED)
    if marked != 0:
        seed = seed_of_rank(seeds, index, rank)
        rotation = signed_hadamard(seed, operand.dtype.element_ty, PERMUTED)
        for t in range(TILES):
            if (marked >> t) & 1:
                block, strip = _position(first + t, blocks, strips, BLOCKS_FIRST)
                values = load_tile(operand, strip * ROWS, block * 128, rows, columns, row_stride, column_stride, ROWS, 128)
                y = rotate(values, rotation, PERMUTED)
                front, back, e4m3 = exact_codes(y, bits, seed, strip * ROWS + i, block, STREAM_GRADIENT, NATIVE)
                store_groups(front, back, e4m3, codes, scales, strip * ROWS, i, rows, block, blocks, WHOLE)
                if SWIZZLED:
                    row = strip * ROWS + i
                    store_swizzled(e4m3, swizzled, row, block, blocks, row < rows)


def aligned_tiles(tile_rows: int) -> int:
    """Tiles whose scales a program of the second launch aligns: at most as many as `align_tiles` can mark."""
    return min(32, 2048 // tile_rows)


ALIGN_OPTIONS = {"num_warps": 8}
"""Launch options of `align_gradient_kernel`."""


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, programs resident on a multiprocessor, and launch options."""

    rows: int
    columns: int
    resident: int
    stages: int
    options: dict[str, int]


def tile_for(capability: int, dtype: torch.dtype, row: bool, column: bool) -> Tile:
    """The tile of `gradient_codes_kernel`: such as compiles without spilling. Both orientations only where `both_at_once` says so."""
    major, single = capability // 10, dtype == torch.float32
    if row and column:
        return Tile(128, 128, *((1, 3, {"num_warps": 8}) if major < 10 else (2, 1, {"num_warps": 4})))
    if major == 10:
        # A thread has a row of the accumulator, or half of one.
        short, tile = 128, ((1, 1, {"num_warps": 8}) if single else (2, 2, {"num_warps": 4}))
    elif major == 9 and not single:
        short, tile = 64, (2, 4, {"num_warps": 4})
    else:
        short, tile = 16, ((2, 1, {"num_warps": 8}) if single else (4, 1, {"num_warps": 4}))
    return Tile(short if row else 128, 128 if row else short, *tile)


def both_at_once(capability: int, dtype: torch.dtype) -> bool:
    """Two rotation matrices beside the tiles take 96 KiB of shared memory and more, and the tensor cores must read them there.

    Capability 0 is the interpreter.
    """
    return (capability == 0 or capability // 10 in (9, 10)) and dtype != torch.float32


Packed = tuple[Tensor, Tensor, Tensor]


def _quantize(
    e: Tensor, seeds: Tensor, index: int | None, transposed_index: int | None, rule: str, rank: int, swizzled: bool
) -> list[Packed]:
    """The orientations that have an index, along N first."""
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    target, (rows, columns) = target_of(e), e.shape
    asked = {"ROW": index is not None, "COLUMN": transposed_index is not None}
    if all(asked.values()) and not both_at_once(target.capability, e.dtype):
        return [
            *_quantize(e, seeds, index, None, rule, rank, swizzled),
            *_quantize(e, seeds, None, transposed_index, rule, rank, swizzled),
        ]
    if max(map(abs, e.stride())) >= 2**24:
        e = e.contiguous()  # offsets within a tile are 32-bit
    row = empty_packed(e, rows, ceil_to(columns, ROTATION)) if asked["ROW"] else None
    column = empty_packed(e, columns, ceil_to(rows, ROTATION)) if asked["COLUMN"] else None
    made = [packed for packed in (row, column) if packed is not None]
    orders = [empty_swizzled(scales) if swizzled else None for _, scales, _ in made]
    if e.numel() == 0:
        for _, _, tensor_scale in made:
            tensor_scale.fill_(1.0)
    else:
        _launch(e, seeds, index or 0, transposed_index or 0, rank, row, column, orders, target, asked)
    return [(codes, scales if order is None else order, g) for (codes, scales, g), order in zip(made, orders, strict=True)]


def _launch(
    e: Tensor, seeds: Tensor, index: int, transposed_index: int, rank: int, row: Packed | None, column: Packed | None,
    orders: list[Tensor | None], target: Target, asked: dict[str, bool],
) -> None:  # fmt: skip
    """orders: for each orientation that is made where its scales go in the order of tensor cores, or None."""
    (rows, columns), (row_stride, column_stride) = e.shape, e.stride()
    tile = tile_for(target.capability, e.dtype, asked["ROW"], asked["COLUMN"])
    tiles = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
    programs = min(tiles, tile.resident * target.processors)
    sides: list[Tensor] = []
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for packed, tile_rows, which, shape in (
        (row, tile.rows, index, (rows, columns, row_stride, column_stride)),
        (column, tile.columns, transposed_index, (columns, rows, column_stride, row_stride)),
    ):
        if packed is None:
            sides += [e] * 4  # not looked at
            continue
        peaks, exponents = new_flags(e, programs, tiles, tile_rows)
        side = packed[0].view(torch.int32), packed[1].view(torch.uint8), exponents, peaks
        sides += side
        order = orders[len(launches)]
        codes, scales, *flags = side
        swizzled = scales if order is None else order.view(torch.int32)
        constants = {
            "ROWS": tile_rows, "BLOCKS_FIRST": packed is row, "TILES": aligned_tiles(tile_rows), "SWIZZLED": order is not None
        }  # fmt: skip
        arguments = e, codes, scales, swizzled, *flags, packed[2], seeds, which, rank, *shape, tiles, programs
        launches.append((arguments, constants))
    with on_device_of(e):
        launch(
            gradient_codes_kernel, programs, e, *sides, seeds, index, transposed_index, rank, rows, columns,
            row_stride, column_stride, tiles,
            **asked, **target.forms(e.dtype), ROWS=tile.rows, COLUMNS=tile.columns, STAGES=tile.stages, **tile.options, **FUSED,
        )  # fmt: skip
        for arguments, constants in launches:
            checks = ceil_div(tiles, constants["TILES"])
            launch(align_gradient_kernel, checks, *arguments, **target.forms(e.dtype), **constants, **ALIGN_OPTIONS, **EXACT)


def quantize_grad(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, rank: int, swizzled: bool = False) -> Packed:
    """Rotate and quantize e [M, N] along N, or along M into [N, ...] with `transpose`. swizzled: scales in the order of tensor cores."""
    straight, turned = (None, index) if transpose else (index, None)
    return _quantize(e, seeds, straight, turned, rule, rank, swizzled)[0]


def quantize_grad_both(
    e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str, rank: int, swizzled: bool = False
) -> tuple[Tensor, ...]:
    """`quantize_grad` along N by rotation `index`, then along M by `transposed_index`: six tensors."""
    row, column = _quantize(e, seeds, index, transposed_index, rule, rank, swizzled)
    return *row, *column
