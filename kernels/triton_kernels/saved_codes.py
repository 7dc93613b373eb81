"""The transpose of a saved packed matrix as a packed operand of a backward product: unpack, transpose, rotate, MS-EDEN.

Bytes an element: 0.5625 read, 0.5625 written; aligning the scales, 0.13, mostly meets the L2 cache. Unpacking and the order of a tile's
columns are those of `saved_values`, rounding and the second launch those of `eden_codes`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_div, ceil_to
from quartet_compile.kernels.triton_kernels.eden_codes import (
    CHUNK_ROWS,
    align_tiles,
    exact_codes,
    fast_codes,
    store_groups,
    store_provisional,
    store_swizzled,
    store_tensor_scale,
)
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, empty_packed, empty_swizzled, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.ms_eden import largest_peak, new_flags, store_peak
from quartet_compile.kernels.triton_kernels.random import STREAM_SAVED, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import signed_hadamard
from quartet_compile.kernels.triton_kernels.saved_values import (
    COLUMNS,
    UNIT,
    column_order,
    load_block,
    rotate_transpose,
    shares,
    unpack_block,
)


@triton.jit(do_not_specialize=["index", "rank", "tiles", "count"])
def saved_codes_kernel(
    saved_codes, saved_scales, codes, scales, exponents, peaks, seeds, index, rank, length, columns, groups_per_row, tiles, count,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Packed [length, columns], codes as int32 words -> [columns, ceil(length/128)*128], scales provisional bytes.

    A program does `count` neighbouring tiles.
    """
    strips = tl.cdiv(columns, COLUMNS)
    blocks = tl.cdiv(length, 128)
    first = tl.program_id(0) * count
    seed = seed_of_rank(seeds, index, rank)
    matrix = signed_hadamard(seed, tl.bfloat16, PERMUTED)
    i = column_order(COLUMNS)
    packed = load_block(saved_codes, saved_scales, first // strips, first % strips, length, groups_per_row, COLUMNS)
    halves = unpack_block(packed, COLUMNS)
    largest = tl.zeros((COLUMNS,), tl.int32)
    for tile in tl.range(first, tl.minimum(first + count, tiles), num_stages=1):
        y = rotate_transpose(halves, matrix, PERMUTED)
        following = tile + 1
        packed = load_block(saved_codes, saved_scales, following // strips, following % strips, length, groups_per_row, COLUMNS)
        block = tile // strips
        strip = tile % strips
        front, back, s_bits, t_bits = fast_codes(y, seed, strip * COLUMNS + i, block, STREAM_SAVED, UNIT, NATIVE)
        store_provisional(front, back, s_bits, codes, scales, exponents, tile, strip * COLUMNS, i, columns, block, blocks)
        largest = tl.maximum(largest, tl.max(t_bits & 0x7FFFFFFF, 1))
        halves = unpack_block(packed, COLUMNS)
    store_peak(largest, peaks)


@triton.jit(do_not_specialize=["index", "rank", "tiles", "programs"])
def align_saved_kernel(
    saved_codes, saved_scales, codes, scales, exponents, peaks, seeds, index, rank, length, columns, groups_per_row, tiles,
    swizzled, incoming, out_tensor_scale, programs,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """Provisional scales -> E4M3, and the tensor scale. A program does TILES tiles. SWIZZLED: as in `align_gradient_kernel`."""
    bits = largest_peak(peaks, programs)
    store_tensor_scale(bits, tl.load(incoming), out_tensor_scale)
    first = tl.program_id(0) * TILES
    strips = tl.cdiv(columns, COLUMNS)
    blocks = tl.cdiv(length, 128)
    tile = first + tl.arange(0, TILES)
    marked = align_tiles(
        scales, swizzled, exponents, bits, tile % strips * COLUMNS, column_order(COLUMNS), columns, tile // strips, blocks, first, tiles,
        SWIZZLED,
    )  # fmt: skip
    if marked != 0:
        seed = seed_of_rank(seeds, index, rank)
        matrix = signed_hadamard(seed, tl.bfloat16, PERMUTED)
        for t in range(TILES):
            if (marked >> t) & 1:
                tile_block, tile_strip = (first + t) // strips, (first + t) % strips
                for k in range(COLUMNS // CHUNK_ROWS):
                    strip = tile_strip * (COLUMNS // CHUNK_ROWS) + k
                    packed = load_block(saved_codes, saved_scales, tile_block, strip, length, groups_per_row, CHUNK_ROWS)
                    y = rotate_transpose(unpack_block(packed, CHUNK_ROWS), matrix, PERMUTED) * UNIT
                    i = column_order(CHUNK_ROWS)
                    column = strip * CHUNK_ROWS + i
                    front, back, e4m3 = exact_codes(y, bits, seed, column, tile_block, STREAM_SAVED, NATIVE)
                    store_groups(front, back, e4m3, codes, scales, strip * CHUNK_ROWS, i, columns, tile_block, blocks)
                    if SWIZZLED:
                        store_swizzled(e4m3, swizzled, column, tile_block, blocks, column < columns)


OPTIONS = {"num_warps": 4}
"""Launch options of `saved_codes_kernel`."""


def resident(capability: int) -> int:
    """Programs of `saved_codes_kernel` that fit on a multiprocessor. As many are launched: each makes the rotation once."""
    return 2 if capability // 10 == 10 else 3


ALIGNED_TILES = 16
"""Tiles whose scales a program of the second launch aligns."""

ALIGN_OPTIONS = {"num_warps": 8}
"""Launch options of `align_saved_kernel`."""


def requantize(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str, rank: int,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Dequantize, transpose, rotate and quantize a packed [M, columns] into [columns, ceil(M/128)*128].

    swizzled: scales in the order of tensor cores.
    """
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    codes, scales = codes.contiguous(), scales.contiguous()
    length, groups_per_row = scales.shape
    out_codes, out_scales, g = empty_packed(codes, columns, ceil_to(length, ROTATION))
    order = empty_swizzled(out_scales) if swizzled else out_scales
    if out_scales.numel() == 0:
        g.copy_(tensor_scale)
        return out_codes, order, g
    target = target_of(codes)
    tiles = ceil_div(length, 128) * ceil_div(columns, COLUMNS)
    count, programs = shares(tiles, resident(target.capability), target)
    peaks, exponents = new_flags(codes, programs, tiles, COLUMNS)
    arguments = (
        codes.view(torch.int32), scales.view(torch.uint8), out_codes.view(torch.int32), out_scales.view(torch.uint8), exponents, peaks,
        seeds, index, rank, length, columns, groups_per_row, tiles,
    )  # fmt: skip
    forms = {**target.forms(), "COLUMNS": COLUMNS}
    with on_device_of(codes):
        launch(saved_codes_kernel, programs, *arguments, count, **forms, **OPTIONS, **FUSED)
        launch(
            align_saved_kernel, ceil_div(tiles, ALIGNED_TILES), *arguments, order.view(torch.int32), tensor_scale, g, programs,
            **forms, TILES=ALIGNED_TILES, SWIZZLED=swizzled, **ALIGN_OPTIONS, **EXACT,
        )  # fmt: skip
    return out_codes, order, g
