"""The transpose of a saved packed matrix as an operand of a backward product, in bfloat16 values: unpack, transpose, rotate, MS-EDEN.

Bytes an element: 0.5625 read, 2 written. Eight codes are unpacked from a 32-bit word by masks and products that place the bits of elements
i and i + 4 at the two halves of a register, where they are bfloat16 numbers but for a power of two. A tile therefore holds its columns in
the order 0 4 1 5 2 6 3 7 of every eight; the rows of the result are addressed accordingly.

A tile is unpacked at the end of a turn of the loop and rotated in the next one, so that Triton hands it to the tensor cores through shared
memory, which transposes it on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_div, ceil_to
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
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, Target, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.ms_eden import (
    INFINITY_BITS,
    MOST_PROGRAMS,
    exponent_limit,
    largest_peak,
    least_exponent,
    new_flags,
    store_extremes,
)
from quartet_compile.kernels.triton_kernels.numbers import INTERPRET, e2m1_value, e4m3_value
from quartet_compile.kernels.triton_kernels.overlap import let_next_begin, wait_for_first
from quartet_compile.kernels.triton_kernels.random import STREAM_SAVED, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import load_rotation, rotate

UNIT = tl.constexpr(256.0)
"""A tile of `unpack` holds the values divided by this."""


@triton.jit
def _pairs_of_scales(bytes_):
    """E4M3 bytes in int32 -> twice the scale times 2^118 as bfloat16 in a word.

    Seven bits of E4M3 one place up in the mantissa field of a bfloat16 are the scale times 2^-120. It is brought to 2^118 in two steps that
    stay in range. A fused multiply-add with -0 multiplies: Ampere has no other product of two pairs.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 zero, factor;
        mov.b32 zero, 0x80008000;
        mul.lo.u32 $0, $1, 0x00100010;
        mov.b32 factor, 0x7F007F00;  fma.rn.bf16x2 $0, $0, factor, zero;
        mov.b32 factor, 0x77007700;  fma.rn.bf16x2 $0, $0, factor, zero;
        }
        """,
        "=&r,r",
        [bytes_],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _unpack_word(word, scale):
    """Eight codes -> bfloat16 elements 0, 4, 1, 5, 2, 6, 3, 7, divided by `UNIT`. scale: that of their group as `_pairs_of_scales` has it.

    In the interpreter scale is the E4M3 byte. All are int32.
    """
    if INTERPRET:
        factor = e4m3_value(scale) * (1.0 / UNIT)
        x0 = (e2m1_value(word & 15) * factor).to(tl.bfloat16)
        x1 = (e2m1_value((word >> 4) & 15) * factor).to(tl.bfloat16)
        x2 = (e2m1_value((word >> 8) & 15) * factor).to(tl.bfloat16)
        x3 = (e2m1_value((word >> 12) & 15) * factor).to(tl.bfloat16)
        x4 = (e2m1_value((word >> 16) & 15) * factor).to(tl.bfloat16)
        x5 = (e2m1_value((word >> 20) & 15) * factor).to(tl.bfloat16)
        x6 = (e2m1_value((word >> 24) & 15) * factor).to(tl.bfloat16)
        x7 = (e2m1_value((word >> 28) & 15) * factor).to(tl.bfloat16)
        return x0, x4, x1, x5, x2, x6, x3, x7
    # Three bits of a code at the foot of a bfloat16's exponent are its magnitude times 2^-126. A product puts two copies of both codes of a
    # pair side by side, one with the sign in its place, one with the magnitude.
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 zero, bits, pair, upper;
        mov.b32 zero, 0x80008000;  mov.b32 bits, 0x81C081C0;  shr.u32 upper, $8, 8;
        and.b32 pair, $8, 0x000F000F;     mul.lo.u32 pair, pair, 0x1040;  and.b32 pair, pair, bits;
        fma.rn.bf16x2 pair, pair, $9, zero;  mov.b32 {$0, $1}, pair;
        and.b32 pair, $8, 0x00F000F0;     mul.lo.u32 pair, pair, 0x0104;  and.b32 pair, pair, bits;
        fma.rn.bf16x2 pair, pair, $9, zero;  mov.b32 {$2, $3}, pair;
        and.b32 pair, upper, 0x000F000F;  mul.lo.u32 pair, pair, 0x1040;  and.b32 pair, pair, bits;
        fma.rn.bf16x2 pair, pair, $9, zero;  mov.b32 {$4, $5}, pair;
        and.b32 pair, upper, 0x00F000F0;  mul.lo.u32 pair, pair, 0x0104;  and.b32 pair, pair, bits;
        fma.rn.bf16x2 pair, pair, $9, zero;  mov.b32 {$6, $7}, pair;
        }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [word, scale],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def unpack(words, scales, COLUMNS: tl.constexpr):
    """words [64, COLUMNS/8], E4M3 bytes [64, COLUMNS/16] -> bfloat16 [64, COLUMNS], the columns of every eight reordered."""
    scale = scales.to(tl.int32)
    if not INTERPRET:
        scale = _pairs_of_scales(scale)
    scale = tl.broadcast_to(scale[:, :, None], (64, COLUMNS // 16, 2)).reshape(64, COLUMNS // 8)
    a, b, c, d, e, f, g, h = _unpack_word(words, scale)
    return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))).reshape(64, COLUMNS)


@triton.jit
def load_packed(codes, scales, first_row, strip, length, groups_per_row, COLUMNS: tl.constexpr):
    """64 rows from first_row on, columns COLUMNS * strip and following, as 32-bit words of codes and E4M3 bytes; zeros outside."""
    i = tl.arange(0, 64)
    word = tl.arange(0, COLUMNS // 8)
    group = tl.arange(0, COLUMNS // 16)
    start = first_row.to(tl.int64) * groups_per_row
    present = (first_row + i < length)[:, None]
    first = strip * (COLUMNS // 16)
    words = tl.load(
        codes + (start + first) * 2 + i[:, None] * (groups_per_row * 2) + word[None, :],
        mask=present & (first * 2 + word < groups_per_row * 2)[None, :], other=0,
    )  # fmt: skip
    bytes_ = tl.load(
        scales + start + first + i[:, None] * groups_per_row + group[None, :],
        mask=present & (first + group < groups_per_row)[None, :], other=0,
    )  # fmt: skip
    return words, bytes_


@triton.jit
def load_block(codes, scales, block, strip, length, groups_per_row, COLUMNS: tl.constexpr):
    """Both halves of the 128 rows of `block`, each as `load_packed` has it."""
    front = load_packed(codes, scales, block * 128, strip, length, groups_per_row, COLUMNS)
    back = load_packed(codes, scales, block * 128 + 64, strip, length, groups_per_row, COLUMNS)
    return front, back


@triton.jit
def unpack_block(block, COLUMNS: tl.constexpr):
    """A `load_block` -> its halves, as `unpack` has them."""
    return unpack(block[0][0], block[0][1], COLUMNS), unpack(block[1][0], block[1][1], COLUMNS)


@triton.jit
def rotate_transpose(halves, rotation, PERMUTED: tl.constexpr):
    """An `unpack_block`, transposed and rotated: float32 [COLUMNS, 8, 16], divided by `UNIT`."""
    return rotate((tl.trans(halves[0]), tl.trans(halves[1])), rotation, PERMUTED)


@triton.jit
def column_order(COLUMNS: tl.constexpr):
    """The logical column of each column of a tile of `unpack`."""
    p = tl.arange(0, COLUMNS)
    return (p & -8) + ((p >> 1) & 3) + 4 * (p & 1)


@triton.jit
def place_in_order(COLUMNS: tl.constexpr):
    """Where each logical column is in a tile of `unpack`: the inverse of `column_order`."""
    i = tl.arange(0, COLUMNS)
    return (i & -8) + 2 * (i & 3) + ((i >> 2) & 1)


@triton.jit(do_not_specialize=["index", "rank", "tiles", "count"])
def saved_values_kernel(
    codes, scales, incoming, rotations, out, program_peaks, exponents, seeds, index, rank, length, columns, groups_per_row, tiles, count,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Packed [length, columns], codes as int32 words -> out [columns, ceil(length/128)*128]. A program does `count` tiles, neighbours.

    program_peaks: the largest t of each program and, behind them, the least.
    """
    let_next_begin(EARLY)
    strips = tl.cdiv(columns, COLUMNS)
    blocks = tl.cdiv(length, 128)
    first = tl.program_id(0) * count
    matrix = load_rotation(rotations, index, tl.bfloat16)
    seed = seed_of_rank(seeds, index, rank)
    g = tl.load(incoming)
    i = column_order(COLUMNS)
    packed = load_block(codes, scales, first // strips, first % strips, length, groups_per_row, COLUMNS)
    halves = unpack_block(packed, COLUMNS)
    largest = tl.zeros((COLUMNS, 8), tl.int32)
    least = tl.full((COLUMNS, 8), INFINITY_BITS, tl.int32)
    for tile in tl.range(first, tl.minimum(first + count, tiles), num_stages=1):
        rotated = rotate_transpose(halves, matrix, True)
        following = tile + 1
        packed = load_block(codes, scales, following // strips, following % strips, length, groups_per_row, COLUMNS)
        block, strip = tile // strips, tile % strips
        numbers, factor, bits, bits_or_infinity = fast_values(rotated, seed, strip * COLUMNS, i, block, g, STREAM_SAVED, UNIT)
        store_smallest(bits_or_infinity, exponents, tile)
        store_values(numbers, factor, out, strip * COLUMNS, i, columns, block, blocks)
        largest = tl.maximum(largest, bits)
        least = tl.minimum(least, bits_or_infinity)
        halves = unpack_block(packed, COLUMNS)
    at = program_peaks + tl.program_id(0)
    store_extremes(largest, least, at, at + tl.num_programs(0))


@triton.jit(do_not_specialize=["index", "rank", "tiles", "programs"])
def saved_again_kernel(
    codes, scales, incoming, rotations, out, program_peaks, exponents, seeds, index, rank, length, columns, groups_per_row, tiles, programs,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The chunks of rows of `saved_values_kernel` that need the tensor scale, now that it is known. Any number of programs."""
    wait_for_first(EARLY)
    bits = largest_peak(program_peaks, programs)
    g = tl.load(incoming)
    limit = exponent_limit(bits, g)
    chunks = tiles * (COLUMNS // CHUNK_ROWS)
    checks = tl.where(least_exponent(program_peaks + programs, programs) < limit, checks_of(chunks), 0)
    for check in range(tl.program_id(0), checks, tl.num_programs(0)):
        marked = chunks_below(exponents, check, chunks, limit)
        if marked != 0:
            strips = tl.cdiv(columns, COLUMNS)
            matrix = load_rotation(rotations, index, tl.bfloat16)
            seed = seed_of_rank(seeds, index, rank)
            i = column_order(CHUNK_ROWS)
            # Some versions of Triton spill what would be hoisted out of the loop.
            for c in tl.range(CHECKED_CHUNKS, disable_licm=True):
                if (marked >> c) & 1:
                    column = (check + c * checks) * CHUNK_ROWS
                    tile = column // COLUMNS
                    block = tile // strips
                    strip = tile % strips * (COLUMNS // CHUNK_ROWS) + column % COLUMNS // CHUNK_ROWS
                    packed = load_block(codes, scales, block, strip, length, groups_per_row, CHUNK_ROWS)
                    rotated = rotate_transpose(unpack_block(packed, CHUNK_ROWS), matrix, True) * UNIT
                    numbers, factor = exact_values(rotated, bits, seed, strip * CHUNK_ROWS, i, block, g, STREAM_SAVED)
                    store_values(numbers, factor, out, strip * CHUNK_ROWS, i, columns, block, tl.cdiv(length, 128))


OPTIONS = {"num_warps": 4}
"""Launch options of `saved_values_kernel`."""


COLUMNS = 64
"""Columns of a tile."""

RESIDENT = 3
"""Programs of `saved_values_kernel` that fit on a multiprocessor. So many are launched: each loads the rotation once."""


def shares(tiles: int, resident: int, target: Target) -> tuple[int, int]:
    """How many neighbouring tiles a program does, and how many programs that takes, at most `resident` on a multiprocessor."""
    count = ceil_div(tiles, min(resident * target.processors, MOST_PROGRAMS))
    return count, ceil_div(tiles, count)


def requantize_values(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, rotations: Tensor, seeds: Tensor, index: int, rule: str, rank: int
) -> Tensor:
    """A packed [M, columns], transposed, rotated and rounded, as bfloat16 values [columns, ceil(M/128)*128]."""
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    codes, scales = codes.contiguous(), scales.contiguous()
    length, groups_per_row = scales.shape
    out = torch.empty((columns, ceil_to(length, ROTATION)), dtype=torch.bfloat16, device=codes.device)
    if out.numel() == 0:
        return out
    target = target_of(codes)
    tiles = ceil_div(length, 128) * ceil_div(columns, COLUMNS)
    count, programs = shares(tiles, RESIDENT, target)
    program_peaks, exponents = new_flags(codes, 2 * programs, tiles, COLUMNS)
    arguments = (
        codes.view(torch.int32), scales.view(torch.uint8), tensor_scale, rotations, out, program_peaks, exponents, seeds, index, rank,
        length, columns, groups_per_row, tiles,
    )  # fmt: skip
    forms = {"COLUMNS": COLUMNS, "EARLY": target.early}
    with on_device_of(codes):
        launch(saved_values_kernel, programs, *arguments, count, **forms, **OPTIONS, **FUSED)
        launch(saved_again_kernel, target.processors, *arguments, programs, **forms, **AGAIN, **EXACT, launch_pdl=target.early)
    return out
