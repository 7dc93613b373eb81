"""Sums over some rows of what was quantized and of what became of them (`kernels.measure`), in float64, a row of sums a program.

Few numbers are read, so time is that of the launch: one kernel does all, and whoever reads the sums adds up the programs' rows. x is
decoded or loaded, rotated as the quantizers rotate it, and compared with the codes: all in float32, in which both are exact but for the
additions of the rotation, then squared and added in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ceil_div
from quartet_compile.kernels.triton_kernels.launch import EXACT, launch, on_device_of
from quartet_compile.kernels.triton_kernels.numbers import e2m1_value, e4m3_value, from_bits, magnitude_bits, to_bfloat16, to_float32
from quartet_compile.kernels.triton_kernels.random import seed_of_rank
from quartet_compile.kernels.triton_kernels.rotation import rotate, signed_hadamard

HEIGHT = 16
"""Rows of a tile, of 128 columns."""

OPTIONS = {"num_warps": 4} | EXACT


@triton.jit
def _chosen_row(i, count, few):
    """`measure.chosen_rows`, int64."""
    i = i.to(tl.int64)
    start = i * count // few
    end = (i + 1) * count // few
    mixed = (i * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    return start + (mixed ^ (mixed >> 13)) % (end - start)


@triton.jit(do_not_specialize=["count", "few"])
def some_rows_kernel(x, out, count, few, columns, row_stride, column_stride, BLOCK: tl.constexpr):
    """Copy chosen rows, in the dtype of out [few, columns]."""
    blocks = tl.cdiv(columns, BLOCK)
    i = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = _chosen_row(i, count, few)
    values = to_float32(tl.load(x + row * row_stride + column * column_stride, mask=column < columns))
    values = to_bfloat16(values) if out.dtype.element_ty == tl.bfloat16 else values.to(out.dtype.element_ty)
    tl.store(out + i.to(tl.int64) * columns + column, values, mask=column < columns)


@triton.jit
def _store(out, xx, qq, qx, ee, numbers, saturated, underflowed, amax, elements):
    """A program's row; the number of elements in the first one's."""
    at = out + tl.program_id(0) * 9
    tl.store(at, xx)
    tl.store(at + 1, qq)
    tl.store(at + 2, qx)
    tl.store(at + 3, ee)
    tl.store(at + 4, numbers)
    tl.store(at + 5, saturated)
    tl.store(at + 6, underflowed)
    tl.store(at + 7, amax)
    tl.store(at + 8, tl.where(tl.program_id(0) == 0, elements, 0).to(tl.float64))


@triton.jit
def _sum(x):
    return tl.sum(x.reshape(x.numel), 0)


@triton.jit
def _count(which):
    return tl.sum(which.to(tl.int32).reshape(which.numel), 0).to(tl.float64)


@triton.jit
def _packed_tile(codes, scales, rows, present, block, groups):
    """Codes of 128 columns as numbers times their scales, and six times their scales: float32 [rows, 128]. Exact."""
    k = tl.arange(0, 128)
    group = block * 8 + k // 16
    mask = present[:, None] & (group < groups)[None, :]
    at = rows[:, None] * groups
    byte = tl.load(codes + at * 8 + (block * 64 + k // 2)[None, :], mask=mask, other=0).to(tl.int32)
    scale = e4m3_value(tl.load(scales + at + group[None, :], mask=mask, other=0).to(tl.int32))
    return e2m1_value((byte >> ((k & 1) * 4)[None, :]) & 15) * scale, 6.0 * scale


@triton.jit
def _tile_of_values(values, rows, present, block, groups):
    """128 columns of values in `value_ops.product_order`, and the largest of each group: float32 [rows, 128]."""
    k = tl.arange(0, 128)
    place = block * 128 + k // 64 * 64 + k // 8 % 2 * 32 + k // 16 % 4 * 8 + k % 8
    q = to_float32(tl.load(values + rows[:, None] * (groups * 16) + place[None, :], mask=present[:, None], other=0.0))
    most = tl.max(tl.abs(q).reshape(rows.shape[0], 8, 16), 2)
    return q, tl.broadcast_to(most[:, :, None], [rows.shape[0], 8, 16]).reshape(rows.shape[0], 128)


@triton.jit
def _in_a_row(halves):
    """[rows, 64] twice -> float32 [rows, 128]."""
    rows: tl.constexpr = halves[0].shape[0]
    return to_float32(tl.join(halves[0], halves[1]).permute(0, 2, 1).reshape(rows, 128))


@triton.jit(do_not_specialize=["index", "rank", "count", "few"])
def operand_sums_kernel(
    x, x_scales, x_tensor_scale, codes, scales, tensor_scale, seeds, out, inverse_scale, index, rank, count, few, columns,
    row_stride, column_stride, groups,
    SAVED: tl.constexpr, VALUES: tl.constexpr, ROTATED: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Some of the `count` rows, of `columns` numbers, and their codes [count, groups * 16].

    SAVED: x are the codes of a packed matrix whose columns are the rows, row_stride scales in each of its rows; else x_tensor_scale is the
    largest magnitude of x. VALUES: the codes are values, to be multiplied by inverse_scale, in place of a packed matrix.
    """
    CODED: tl.constexpr = tl.bfloat16 if SAVED else x.dtype.element_ty
    if ROTATED:
        rotation = signed_hadamard(seed_of_rank(seeds, index, rank), CODED, False)
    g = tl.full((), inverse_scale, tl.float64) if VALUES else tl.load(tensor_scale).to(tl.float64)
    factor = tl.load(x_tensor_scale).to(tl.float64) if SAVED else tl.full((), 1.0, tl.float64)
    blocks = tl.cdiv(groups, 8)
    tiles = tl.cdiv(few, HEIGHT) * blocks
    k = tl.arange(0, 64)
    zero = tl.full((), 0.0, tl.float64)
    xx, qq, qx, ee, numbers, saturated, underflowed = zero, zero, zero, zero, zero, zero, zero
    largest = tl.full((), 0, tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tile // blocks * HEIGHT + tl.arange(0, HEIGHT)
        block = tile % blocks
        present = i < few
        row = _chosen_row(tl.minimum(i, few - 1), count, few)
        here = block * 128 + k.to(tl.int64)
        there = here + 64
        if SAVED:
            at = row[:, None] // 2
            shift = ((row & 1) * 4).to(tl.int32)[:, None]
            front_mask = present[:, None] & (here < columns)[None, :]
            back_mask = present[:, None] & (there < columns)[None, :]
            front_codes = tl.load(x + here[None, :] * row_stride * 8 + at, mask=front_mask, other=0).to(tl.int32)
            back_codes = tl.load(x + there[None, :] * row_stride * 8 + at, mask=back_mask, other=0).to(tl.int32)
            group = row[:, None] // 16
            front_scales = tl.load(x_scales + here[None, :] * row_stride + group, mask=front_mask, other=0).to(tl.int32)
            back_scales = tl.load(x_scales + there[None, :] * row_stride + group, mask=back_mask, other=0).to(tl.int32)
            front = to_bfloat16(e2m1_value((front_codes >> shift) & 15) * e4m3_value(front_scales))
            back = to_bfloat16(e2m1_value((back_codes >> shift) & 15) * e4m3_value(back_scales))
        else:
            at = row[:, None] * row_stride
            front = tl.load(x + at + here[None, :] * column_stride, mask=present[:, None] & (here < columns)[None, :], other=0.0)
            back = tl.load(x + at + there[None, :] * column_stride, mask=present[:, None] & (there < columns)[None, :], other=0.0)
        halves = front, back
        plain = _in_a_row(halves)
        if SAVED:
            largest = tl.maximum(largest, tl.max(magnitude_bits(plain).reshape(HEIGHT * 128), 0))
        y = rotate(halves, rotation, False).reshape(HEIGHT, 128) if ROTATED else plain
        if VALUES:
            q, most = _tile_of_values(codes, row, present, block, groups)
        else:
            q, most = _packed_tile(codes, scales, row, present, block, groups)
        y = y.to(tl.float64) * factor
        q = q.to(tl.float64) * g
        xx += _sum(y * y)
        qq += _sum(q * q)
        qx += _sum(q * y)
        ee += _sum((q - y) * (q - y))
        numbers += _count(y != 0)
        saturated += _count((tl.abs(y) > most.to(tl.float64) * g) & (q != 0))
        underflowed += _count((y != 0) & (q == 0))
    amax = from_bits(largest).to(tl.float64) * factor if SAVED else tl.load(x_tensor_scale).to(tl.float64)
    _store(out, xx, qq, qx, ee, numbers, saturated, underflowed, amax, few.to(tl.int64) * columns)


@triton.jit(do_not_specialize=["count", "few"])
def product_sums_kernel(result, exact, out, count, few, columns, row_stride, column_stride, HEIGHT: tl.constexpr):
    """Some of the `count` rows of a product, and the same rows, contiguous, of another one."""
    blocks = tl.cdiv(columns, 128)
    k = tl.arange(0, 128)
    zero = tl.full((), 0.0, tl.float64)
    xx, qq, qx, ee = zero, zero, zero, zero
    largest = tl.full((), 0, tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(few, HEIGHT) * blocks, tl.num_programs(0)):
        i = tile // blocks * HEIGHT + tl.arange(0, HEIGHT)
        column = tile % blocks * 128 + k.to(tl.int64)
        mask = (i < few)[:, None] & (column < columns)[None, :]
        row = _chosen_row(tl.minimum(i, few - 1), count, few)
        q = to_float32(tl.load(result + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0.0)).to(tl.float64)
        x = to_float32(tl.load(exact + i.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0))
        largest = tl.maximum(largest, tl.max(magnitude_bits(x).reshape(HEIGHT * 128), 0))
        x = x.to(tl.float64)
        xx += _sum(x * x)
        qq += _sum(q * q)
        qx += _sum(q * x)
        ee += _sum((q - x) * (q - x))
    _store(out, xx, qq, qx, ee, zero, zero, zero, from_bits(largest).to(tl.float64), few.to(tl.int64) * columns)


# ---------------------------------------------------------------- launches; out: float64 [programs, 9]

Packed = tuple[Tensor, Tensor, Tensor]


def some_rows(x: Tensor, few: int, dtype: torch.dtype) -> Tensor:
    """The rows of a matrix that `measure.chosen_rows` names: dtype [few, columns]."""
    (count, columns), block = x.shape, 1024
    out = torch.empty((few, columns), dtype=dtype, device=x.device)
    if out.numel():
        with on_device_of(x):
            launch(some_rows_kernel, few * ceil_div(columns, block), x, out, count, few, columns, *x.stride(), BLOCK=block, num_warps=4)
    return out


def _operand_sums(
    x: Packed, count: int, few: int, columns: int, strides: tuple[int, ...], coded: Packed | Tensor, scale: float, seeds: Tensor | None,
    index: int, rank: int, out: Tensor, saved: bool,
) -> None:  # fmt: skip
    """x: codes, scales and tensor scale, or a matrix, anything, and its largest magnitude. coded: packed, or values times scale."""
    if isinstance(coded, Tensor):
        values = coded.contiguous()
        packed, groups = (values, values, values), values.shape[1] // 16  # the latter two are not looked at
    else:
        packed, groups = (coded[0].contiguous(), coded[1].contiguous().view(torch.uint8), coded[2]), coded[1].shape[1]
    with on_device_of(out):
        launch(
            operand_sums_kernel, out.shape[0], *x, *packed, packed[2] if seeds is None else seeds, out, 1.0 / scale, index, rank,
            count, few, columns, *strides, groups, SAVED=saved, VALUES=isinstance(coded, Tensor), ROTATED=seeds is not None,
            HEIGHT=HEIGHT, **OPTIONS,
        )  # fmt: skip


def fresh_sums(
    x: Tensor, few: int, amax: Tensor, coded: Packed | Tensor, scale: float, seeds: Tensor | None, index: int, rank: int, out: Tensor
) -> None:
    """x [R, K] and what it became: packed, or values times scale; rotated if there are seeds."""
    _operand_sums((x, amax, amax), x.shape[0], few, x.shape[1], x.stride(), coded, scale, seeds, index, rank, out, saved=False)


def saved_sums(
    source: Packed, columns: int, few: int, coded: Packed | Tensor, seeds: Tensor, index: int, rank: int, out: Tensor
) -> None:  # fmt: skip
    """A packed [K, columns] and what its transpose became, [columns, ...], packed or values."""
    codes, scales, tensor_scale = source[0].contiguous(), source[1].contiguous().view(torch.uint8), source[2]
    strides = scales.shape[1], 1
    _operand_sums((codes, scales, tensor_scale), columns, few, codes.shape[0], strides, coded, 1.0, seeds, index, rank, out, saved=True)


def product_sums(result: Tensor, exact: Tensor, out: Tensor) -> None:
    """result [R, N] and some of its rows, exact [few, N], without quantization."""
    exact = exact.contiguous()
    with on_device_of(result):
        launch(
            product_sums_kernel, out.shape[0], result, exact, out, result.shape[0], exact.shape[0], *exact.shape[1:], *result.stride(),
            HEIGHT=HEIGHT, **OPTIONS,
        )  # fmt: skip
