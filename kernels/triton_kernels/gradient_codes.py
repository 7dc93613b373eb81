"""The gradient operands of the backward products, packed: in one orientation, or in both from one read.

Bytes an element of a bfloat16 gradient: 2 read, 0.5625 written for each orientation; aligning the scales, 0.13 for each, mostly meets the
L2 cache. A program makes the matrix of its rotation once and walks over tiles in one orientation (`gradient_tiles`); where tensor cores
hand a thread whole groups (`rotation`), rounding needs no exchange. A second launch, one for each orientation, aligns the scales and makes
the few tiles again that need the tensor scale (`eden_codes`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_to
from quartet_compile.kernels.triton_kernels import gradient_tiles
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
from quartet_compile.kernels.triton_kernels.gradient_tiles import Tile, load_halves, load_operand, walk
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
from quartet_compile.kernels.triton_kernels.ms_eden import INFINITY_BITS, new_flags, store_extremes
from quartet_compile.kernels.triton_kernels.overlap import let_next_begin, wait_for_first
from quartet_compile.kernels.triton_kernels.random import STREAM_GRADIENT, anew, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import load_rotation, rotate, rotations, signed_hadamard


@triton.jit
def _rotation(rotations, index, seed, DTYPE: tl.constexpr, PERMUTED: tl.constexpr):
    """The matrices of rotation `index`. Those for three products stay in shared memory only if they come from memory: else they spill."""
    return load_rotation(rotations, index, DTYPE) if DTYPE is tl.float32 and PERMUTED else signed_hadamard(seed, DTYPE, PERMUTED)


@triton.jit
def _walk(
    x, rotations, codes, scales, exponents, peaks, seeds, index, rank, first, step, rows, columns, row_stride, column_stride, tiles,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, TURNED: tl.constexpr, HEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every step'th tile, from `first` on, of x [rows, columns] or, TURNED, of its transpose."""
    seed = seed_of_rank(seeds, index, rank)
    rotation = _rotation(rotations, index, seed, x.dtype.element_ty, PERMUTED)
    i = tl.arange(0, HEIGHT)
    largest = tl.zeros((HEIGHT, 8), tl.int32)
    least = tl.full((HEIGHT, 8), INFINITY_BITS, tl.int32)
    for tile in tl.range(first, tiles, step, num_stages=STAGES):
        halves, start, block, length, blocks = load_operand(x, tile, rows, columns, row_stride, column_stride, TURNED, HEIGHT)
        y = rotate(halves, rotation, PERMUTED)
        front, back, s_bits, bits, bits_or_infinity = fast_codes(y, anew(seed), start, i, block, STREAM_GRADIENT, 1.0, NATIVE)
        store_provisional(front, back, s_bits, codes, scales, exponents, tile, start, i, length, block, blocks)
        largest = tl.maximum(largest, bits)
        least = tl.minimum(least, bits_or_infinity)
    store_extremes(largest, least, peaks + first, peaks + step + first)


@triton.jit(do_not_specialize=["row_index", "column_index", "rank", "tiles"])
def gradient_codes_kernel(
    x, rotations, row_codes, row_scales, row_exponents, row_peaks, column_codes, column_scales, column_exponents, column_peaks, seeds,
    row_index, column_index, rank, rows, columns, row_stride, column_stride, tiles,
    ROW: tl.constexpr, COLUMN: tl.constexpr, PERMUTED: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
    HEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] -> row_* [rows, ceil(columns/128)*128] and column_* [columns, ceil(rows/128)*128], whichever is asked for.

    Codes are int32 words, scales provisional bytes. An even number of programs where both are asked for.
    """
    let_next_begin(EARLY)
    SIDES: tl.constexpr = 2 if ROW and COLUMN else 1
    first = tl.program_id(0) // SIDES
    step = tl.num_programs(0) // SIDES
    if tl.program_id(0) % SIDES == (0 if ROW else 1):
        _walk(
            x, rotations, row_codes, row_scales, row_exponents, row_peaks, seeds, row_index, rank, first, step,
            rows, columns, row_stride, column_stride, tiles, PERMUTED, NATIVE, False, HEIGHT, STAGES,
        )  # fmt: skip
    else:
        _walk(
            x, rotations, column_codes, column_scales, column_exponents, column_peaks, seeds, column_index, rank, first, step,
            rows, columns, row_stride, column_stride, tiles, PERMUTED, NATIVE, True, HEIGHT, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["index", "rank", "programs"])
def align_gradient_kernel(
    operand, rotations, codes, scales, swizzled, exponents, peaks, out_tensor_scale, seeds, index, rank,
    rows, columns, row_stride, column_stride, programs,
    PERMUTED: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr, TURNED: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """Provisional scales -> E4M3, and the tensor scale, of one orientation, operand [rows, columns].

    SWIZZLED: into `swizzled`, int32, in the order of tensor cores; `scales` then is scratch. Otherwise in place.
    TURNED: the operand is the transpose of the gradient, whose tiles were counted.
    """
    wait_for_first(EARLY)
    blocks = tl.cdiv(columns, 128)
    runs = tl.cdiv(blocks, ALIGNED_BLOCKS)
    strip, first_block = tl.program_id(0) // runs, tl.program_id(0) % runs * ALIGNED_BLOCKS
    if TURNED:
        of_strip, of_block = 128, tl.cdiv(rows, 128) * 128
    else:
        of_strip, of_block = blocks * 128, 128
    marked, bits = align_blocks(
        scales, swizzled, exponents, of_strip, of_block, tl.arange(0, 128), peaks, programs, strip, first_block, rows, blocks, SWIZZLED
    )
    store_tensor_scale(bits, 1.0, out_tensor_scale)
    if marked != 0:
        seed = seed_of_rank(seeds, index, rank)
        rotation = _rotation(rotations, index, seed, operand.dtype.element_ty, PERMUTED)
        i = tl.arange(0, CHUNK_ROWS)
        for b in range(ALIGNED_BLOCKS):
            if (marked >> b) & 1:
                block = first_block + b
                for c in range(128 // CHUNK_ROWS):
                    chunk = strip * 128 + c * CHUNK_ROWS
                    halves = load_halves(operand, chunk, block * 128, rows, columns, row_stride, column_stride, CHUNK_ROWS)
                    y = rotate(halves, rotation, PERMUTED)
                    front, back, e4m3 = exact_codes(y, bits, seed, chunk, i, block, STREAM_GRADIENT, NATIVE)
                    store_groups(front, back, e4m3, codes, scales, chunk, i, rows, block, blocks)
                    if SWIZZLED:
                        store_swizzled(e4m3, swizzled, chunk + i, block, blocks, chunk + i < rows)


ALIGN_OPTIONS = {"num_warps": 8}
"""Launch options of `align_gradient_kernel`."""


def tile_for(capability: int, dtype: torch.dtype) -> Tile:
    """The tile of `gradient_codes_kernel`."""
    if capability // 10 == 10:
        # A thread has a row of the accumulator, or half of one. Triton 3.6 makes nothing at all of 128 rows of float32.
        return Tile(64, 2, 2, {"num_warps": 8}) if dtype == torch.float32 else Tile(128, 2, 2, {"num_warps": 4})
    return gradient_tiles.tile_for(capability, dtype)


Packed = tuple[Tensor, Tensor, Tensor]


def _quantize(
    e: Tensor, seeds: Tensor, index: int | None, transposed_index: int | None, rule: str, rank: int, swizzled: bool
) -> list[Packed]:
    """The orientations that have an index, along N first."""
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    target, (rows, columns) = target_of(e), e.shape
    asked = {"ROW": index is not None, "COLUMN": transposed_index is not None}
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
    tile = tile_for(target.capability, e.dtype)
    tiles, programs = walk(rows, columns, sum(asked.values()), tile, target)
    matrices = rotations(seeds, rank) if e.dtype == torch.float32 and target.permuted else e  # e: not looked at
    sides: list[Tensor] = []
    launches: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
    for packed, turned, which, shape in (
        (row, False, index, (rows, columns, row_stride, column_stride)),
        (column, True, transposed_index, (columns, rows, column_stride, row_stride)),
    ):
        if packed is None:
            sides += [e] * 4  # not looked at
            continue
        peaks, exponents = new_flags(e, 2 * programs, tiles, tile.height)
        side = packed[0].view(torch.int32), packed[1].view(torch.uint8), exponents, peaks
        sides += side
        order = orders[len(launches)]
        codes, scales, *flags = side
        swizzled = scales if order is None else order.view(torch.int32)
        arguments = e, matrices, codes, scales, swizzled, *flags, packed[2], seeds, which, rank, *shape, programs
        launches.append((aligning_programs(*shape[:2]), arguments, {"TURNED": turned, "SWIZZLED": order is not None}))
    forms = target.forms()
    with on_device_of(e):
        launch(
            gradient_codes_kernel, len(launches) * programs, e, matrices, *sides, seeds, index, transposed_index, rank, rows, columns,
            row_stride, column_stride, tiles, **asked, **forms, HEIGHT=tile.height, STAGES=tile.stages, **tile.options, **FUSED,
        )  # fmt: skip
        for aligning, arguments, of_side in launches:
            launch(align_gradient_kernel, aligning, *arguments, **forms, **of_side, **ALIGN_OPTIONS, **EXACT, launch_pdl=target.early)


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
