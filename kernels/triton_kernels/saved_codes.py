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
    ALIGNED_BLOCKS,
    CHUNK_ROWS,
    align_blocks,
    aligning_programs,
    exact_codes,
    fast_codes,
    store_groups,
    store_provisional,
    store_swizzled,
    store_tensor_scale,
)
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, empty_packed, empty_swizzled, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.ms_eden import INFINITY_BITS, new_flags, store_extremes
from quartet_compile.kernels.triton_kernels.overlap import let_next_begin, wait_for_first
from quartet_compile.kernels.triton_kernels.random import STREAM_SAVED, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import signed_hadamard
from quartet_compile.kernels.triton_kernels.saved_values import (
    COLUMNS,
    UNIT,
    column_order,
    load_block,
    place_in_order,
    rotate_transpose,
    shares,
    unpack_block,
)


@triton.jit(do_not_specialize=["index", "rank", "tiles", "count"])
def saved_codes_kernel(
    saved_codes, saved_scales, codes, scales, exponents, peaks, seeds, index, rank, length, columns, groups_per_row, tiles, count,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Packed [length, columns], codes as int32 words -> [columns, ceil(length/128)*128], scales provisional bytes.

    A program does `count` neighbouring tiles.
    """
    let_next_begin(EARLY)
    strips = tl.cdiv(columns, COLUMNS)
    blocks = tl.cdiv(length, 128)
    first = tl.program_id(0) * count
    seed = seed_of_rank(seeds, index, rank)
    matrix = signed_hadamard(seed, tl.bfloat16, PERMUTED)
    i = column_order(COLUMNS)
    packed = load_block(saved_codes, saved_scales, first // strips, first % strips, length, groups_per_row, COLUMNS)
    halves = unpack_block(packed, COLUMNS)
    largest = tl.zeros((COLUMNS, 8), tl.int32)
    least = tl.full((COLUMNS, 8), INFINITY_BITS, tl.int32)
    for tile in tl.range(first, tl.minimum(first + count, tiles), num_stages=1):
        y = rotate_transpose(halves, matrix, PERMUTED)
        following = tile + 1
        packed = load_block(saved_codes, saved_scales, following // strips, following % strips, length, groups_per_row, COLUMNS)
        block = tile // strips
        strip = tile % strips
        front, back, s_bits, bits, bits_or_infinity = fast_codes(y, seed, strip * COLUMNS, i, block, STREAM_SAVED, UNIT, NATIVE)
        store_provisional(front, back, s_bits, codes, scales, exponents, tile, strip * COLUMNS, i, columns, block, blocks)
        largest = tl.maximum(largest, bits)
        least = tl.minimum(least, bits_or_infinity)
        halves = unpack_block(packed, COLUMNS)
    at = peaks + tl.program_id(0)
    store_extremes(largest, least, at, at + tl.num_programs(0))


@triton.jit(do_not_specialize=["index", "rank", "programs"])
def align_saved_kernel(
    saved_codes, saved_scales, codes, scales, exponents, peaks, seeds, index, rank, length, columns, groups_per_row,
    swizzled, incoming, out_tensor_scale, programs,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr, COLUMNS: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """Provisional scales -> E4M3, and the tensor scale. SWIZZLED: as in `align_gradient_kernel`."""
    wait_for_first(EARLY)
    blocks = tl.cdiv(length, 128)
    runs = tl.cdiv(blocks, ALIGNED_BLOCKS)
    column_strip, first_block = tl.program_id(0) // runs, tl.program_id(0) % runs * ALIGNED_BLOCKS
    marked, bits = align_blocks(
        scales, swizzled, exponents, 128, tl.cdiv(columns, COLUMNS) * COLUMNS, place_in_order(128), peaks, programs,
        column_strip, first_block, columns, blocks, SWIZZLED,
    )  # fmt: skip
    store_tensor_scale(bits, tl.load(incoming), out_tensor_scale)
    if marked != 0:
        seed = seed_of_rank(seeds, index, rank)
        matrix = signed_hadamard(seed, tl.bfloat16, PERMUTED)
        i = column_order(CHUNK_ROWS)
        for b in range(ALIGNED_BLOCKS):
            if (marked >> b) & 1:
                block = first_block + b
                for c in range(128 // CHUNK_ROWS):
                    strip = column_strip * (128 // CHUNK_ROWS) + c
                    packed = load_block(saved_codes, saved_scales, block, strip, length, groups_per_row, CHUNK_ROWS)
                    y = rotate_transpose(unpack_block(packed, CHUNK_ROWS), matrix, PERMUTED) * UNIT
                    front, back, e4m3 = exact_codes(y, bits, seed, strip * CHUNK_ROWS, i, block, STREAM_SAVED, NATIVE)
                    store_groups(front, back, e4m3, codes, scales, strip * CHUNK_ROWS, i, columns, block, blocks)
                    if SWIZZLED:
                        column = strip * CHUNK_ROWS + i
                        store_swizzled(e4m3, swizzled, column, block, blocks, column < columns)


OPTIONS = {"num_warps": 4}
"""Launch options of `saved_codes_kernel`."""


def resident(capability: int) -> int:
    """Programs of `saved_codes_kernel` that fit on a multiprocessor. As many are launched: each makes the rotation once."""
    return 2 if capability // 10 == 10 else 3


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
    peaks, exponents = new_flags(codes, 2 * programs, tiles, COLUMNS)
    arguments = (
        codes.view(torch.int32), scales.view(torch.uint8), out_codes.view(torch.int32), out_scales.view(torch.uint8), exponents, peaks,
        seeds, index, rank, length, columns, groups_per_row,
    )  # fmt: skip
    forms = {**target.forms(), "COLUMNS": COLUMNS}
    with on_device_of(codes):
        launch(saved_codes_kernel, programs, *arguments, tiles, count, **forms, **OPTIONS, **FUSED)
        launch(
            align_saved_kernel, aligning_programs(columns, length), *arguments, order.view(torch.int32), tensor_scale, g, programs,
            **forms, SWIZZLED=swizzled, **ALIGN_OPTIONS, **EXACT, launch_pdl=target.early,
        )  # fmt: skip
    return out_codes, order, g
