"""The operands of the two backward products: a dense gradient in either orientation, or the transpose of a matrix saved in NVFP4.

Both kernels rotate tiles of ROWS x 128 on the tensor cores and round them in registers (`rotation`, `ms_eden`). Bytes an element: the
gradient 2 read (bfloat16), the saved matrix 0.5625 read; 0.75 written (codes and float32 scales), then 0.3125 for aligning the scales. The
kernels are bound by instructions, not by bytes. A program walks over several tiles, because it makes the Hadamard matrix once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ROTATION, ceil_to
from quartet_compile.kernels.triton_kernels.launch import EXACT, empty_packed, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.ms_eden import align_scales, round_rotated, store_rounded
from quartet_compile.kernels.triton_kernels.numbers import e2m1_value, e4m3_value
from quartet_compile.kernels.triton_kernels.random import STREAM_GRADIENT, STREAM_SAVED, seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import rotate, signed_hadamard


@triton.jit(do_not_specialize=["index", "rank"])
def gradient_kernel(
    x, codes, provisional, peak_bits, seeds, index, rank, rows, columns, row_stride, column_stride, blocks, tiles,
    ROWS: tl.constexpr, PERMUTED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] with any strides, rotated along its columns. The transposed orientation is the same kernel with strides swapped."""
    hadamard = signed_hadamard(seed_of_rank(seeds, index, rank), x.dtype.element_ty, PERMUTED)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tile % blocks
        row = tile // blocks * ROWS + tl.arange(0, ROWS)
        column = block * 128 + tl.arange(0, 128)
        at = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
        values = tl.load(x + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
        byte, t = round_rotated(rotate(values, hadamard, PERMUTED), NATIVE)
        store_rounded(byte, t, row, block, codes, provisional, peak_bits, rows, blocks)


@triton.jit(do_not_specialize=["index", "rank"])
def saved_kernel(
    saved_codes, saved_scales, codes, provisional, peak_bits, seeds, index, rank, length, columns, groups_per_row, blocks, tiles,
    COLUMNS: tl.constexpr, PERMUTED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A packed [length, columns], transposed and rotated along its length. code * scale has six bits: exact in bfloat16."""
    hadamard = signed_hadamard(seed_of_rank(seeds, index, rank), tl.bfloat16, PERMUTED)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # Neighbouring programs read neighbouring columns of the same rows.
        strips = tiles // blocks
        block = tile // strips
        strip = tile % strips
        k = block * 128 + tl.arange(0, 128)
        group = strip * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
        byte_column = strip * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        start = k.to(tl.int64)[:, None] * groups_per_row
        inside = (k < length)[:, None]
        byte = tl.load(saved_codes + start * 8 + byte_column[None, :], mask=inside & (byte_column < groups_per_row * 8)[None, :], other=0)
        scale = tl.load(saved_scales + start + group[None, :], mask=inside & (group < groups_per_row)[None, :], other=0)
        byte = byte.to(tl.int32)
        values = tl.join(e2m1_value(byte & 15), e2m1_value(byte >> 4)).reshape(128, COLUMNS // 16, 16)
        values = (values * e4m3_value(scale.to(tl.int32))[:, :, None]).reshape(128, COLUMNS).to(tl.bfloat16)
        out_byte, t = round_rotated(rotate(tl.trans(values), hadamard, PERMUTED), NATIVE)
        row = strip * COLUMNS + tl.arange(0, COLUMNS)
        store_rounded(out_byte, t, row, block, codes, provisional, peak_bits, columns, blocks)


_PROGRAMS_PER_PROCESSOR = 2
"""At 128 registers, two programs of 256 threads are resident."""


def gradient_tile(capability: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Rows of a tile and launch options: such as compile without spilling, with Triton 3.6 and 3.9 (tests/test_triton_offline.py).

    wgmma and tcgen05 read the Hadamard matrix from shared memory; mma.sync keeps its share of it in registers.
    """
    single = dtype == torch.float32
    rows = {8: 16 if single else 32, 9: 128 if single else 64, 10: 64, 12: 16 if single else 32}.get(capability // 10, 16)
    return rows, {"num_warps": 8, "num_stages": 1}


SAVED_TILE = 64, {"num_warps": 8, "num_stages": 1}
"""Columns of a tile and launch options of `saved_kernel`."""


def _workspace(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 scales before alignment, and the bits of the largest of them."""
    return torch.empty(scales.shape, dtype=torch.float32, device=scales.device), torch.zeros((), dtype=torch.int32, device=scales.device)


def quantize_grad(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate and quantize e [M, N] along N, or along M into [N, ...] with `transpose`."""
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    operand = e.t() if transpose else e
    rows, columns = operand.shape
    packed = codes, scales, g = empty_packed(e, rows, ceil_to(columns, ROTATION))
    if scales.numel() == 0:
        g.fill_(1.0)
        return packed
    provisional, peak_bits = _workspace(scales)
    target, blocks = target_of(e), scales.shape[1] // 8
    tile_rows, options = gradient_tile(target.capability, e.dtype)
    tiles = triton.cdiv(rows, tile_rows) * blocks
    with on_device_of(e):
        gradient_kernel[(min(tiles, _PROGRAMS_PER_PROCESSOR * target.processors),)](
            operand, codes, provisional, peak_bits, seeds, index, rank, rows, columns, *operand.stride(), blocks, tiles,
            ROWS=tile_rows, PERMUTED=target.permuted, NATIVE=target.native, **options, **EXACT,
        )  # fmt: skip
        align_scales(provisional, peak_bits, None, packed, seeds, index, rank, STREAM_GRADIENT.value)
    return packed


def requantize(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantize, transpose, rotate and quantize a packed [M, columns] into [columns, ceil(M/128)*128]."""
    if rule != "ms_eden":
        raise ValueError(f"no backward rule {rule!r}")
    codes, scales = codes.contiguous(), scales.contiguous()
    length = codes.shape[0]
    packed = out_codes, out_scales, g = empty_packed(codes, columns, ceil_to(length, ROTATION))
    if out_scales.numel() == 0:
        g.copy_(tensor_scale)
        return packed
    provisional, peak_bits = _workspace(out_scales)
    target, blocks = target_of(codes), out_scales.shape[1] // 8
    tile_columns, options = SAVED_TILE
    tiles = triton.cdiv(columns, tile_columns) * blocks
    with on_device_of(codes):
        saved_kernel[(min(tiles, _PROGRAMS_PER_PROCESSOR * target.processors),)](
            codes, scales.view(torch.uint8), out_codes, provisional, peak_bits, seeds, index, rank,
            length, columns, scales.shape[1], blocks, tiles,
            COLUMNS=tile_columns, PERMUTED=target.permuted, NATIVE=target.native, **options, **EXACT,
        )  # fmt: skip
        align_scales(provisional, peak_bits, tensor_scale, packed, seeds, index, rank, STREAM_SAVED.value)
    return packed
