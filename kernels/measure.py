"""What quantization made of a tensor: sums over it, in float64, and the figures that they give.

An operand is compared with what its quantizer was given: with the tensor itself, or, where it is quantized again, with the packed one. A
rotated one is compared in rotated space; a rotation keeps lengths and angles, so the figures are those of the tensor. A gradient is
compared with the product of the operands before they were quantized.

The functions named `*_sums` are the definition that kernels are held to, and what a CPU without a C++ compiler runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quartet_compile.kernels import reference
from quartet_compile.kernels.format import E2M1_MAX, GROUP, Quantized, decode_e2m1

SUMS = 9
"""Of q, which x became: <x, x>, <q, q>, <q, x>, |q - x|^2; how many numbers of x are not zero, saturated ones and underflowed ones of
them; the largest magnitude; how many numbers there are. Kernels write several rows of them, which belong together: `figures`."""


class Figures(NamedTuple):
    """What became of a tensor x that is q now. None: not defined, since x is zero, or of no meaning for a gradient. NaN: q or x is not
    finite.

    error: |q - x|^2 / |x|^2. gain: <q, x> / <x, x>. cosine: <q, x> / |q| |x|. saturated: share of the numbers in x, zeros left out, beyond
    the largest that their group can hold. underflowed: share of them that is zero in q; all of a group may be, whose scale is too small for
    E4M3, and these are not saturated. amax: largest magnitude, of a fresh operand that of the whole tensor, before any rotation; otherwise
    that of what was measured of x, before rotation. elements: numbers measured.
    """

    error: float | None
    gain: float | None
    cosine: float | None
    saturated: float | None
    underflowed: float | None
    amax: float
    elements: int


def figures(sums: Tensor, operands: Sequence[bool]) -> list[Figures]:
    """sums: float64 [n, rows, 9], where they are. operands: whether each is of an operand, not of a product. Waits for the device."""
    totals = torch.cat([sums[..., :7].sum(1), sums[..., 7:8].amax(1), sums[..., 8:].sum(1)], dim=1)
    return [_figures(row, operand) for row, operand in zip(totals.tolist(), operands, strict=True)]


def _figures(sums: list[float], operand: bool) -> Figures:
    xx, qq, qx, ee, numbers, saturated, underflowed, amax, elements = sums
    if xx == 0:
        return Figures(None, None, None, None, None, amax, int(elements))
    cosine = None if qq == 0 else qx / math.sqrt(xx * qq)
    if not operand:
        return Figures(ee / xx, qx / xx, cosine, None, None, amax, int(elements))
    shares = (saturated / numbers, underflowed / numbers) if math.isfinite(qq) else (math.nan, math.nan)
    return Figures(ee / xx, qx / xx, cosine, *shares, amax, int(elements))


# ---------------------------------------------------------------- which rows


def chosen(shape: Sequence[int], elements: int) -> int:
    """How many rows of a matrix hold about so many numbers: one at least, and all for elements = 0."""
    count, columns = shape
    return count if elements == 0 else min(count, max(1, elements // max(1, columns)))


@functools.lru_cache(maxsize=1024)
def chosen_rows(count: int, few: int) -> Tensor:
    """`few` of `count` rows, int64, in order: a random one of each stretch of them, the same ones each time."""
    i = torch.arange(few)
    start, end = i * count // max(few, 1), (i + 1) * count // max(few, 1)
    mixed = i * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    return start + (mixed ^ mixed >> 13) % (end - start)


# ---------------------------------------------------------------- the definition


class Coded(NamedTuple):
    """Rows of an operand as it is multiplied. q: float64 [n, K], K a multiple of 16. largest: float64 [n, K/16], six times the scales."""

    q: Tensor
    largest: Tensor


def rows_of_packed(packed: Quantized, rows: Tensor) -> Coded:
    """Rows, int64 [n], of a packed matrix."""
    scales = packed.scales.view(torch.uint8).index_select(0, rows).view(torch.float8_e4m3fn)  # whose bits can be indexed everywhere
    few = Quantized(packed.codes.index_select(0, rows), scales, packed.tensor_scale)
    return Coded(few.dequantize(torch.float64), few.group_scales(torch.float64) * packed.tensor_scale.double() * E2M1_MAX)


def rows_of_values(values: Tensor, rows: Tensor, scale: float) -> Coded:
    """Rows, int64 [n], of values times `scale` in `value_ops.product_order`, made by a rule of `ops.FILL_THE_RANGE`."""
    few = values.index_select(0, rows).double() / scale
    q = few.unflatten(1, (few.shape[1] // 64, 2, 4, 8)).transpose(2, 3).flatten(1)
    return Coded(q, q.abs().unflatten(1, (q.shape[1] // GROUP, GROUP)).amax(2))


def fresh_sums(x: Tensor, rows: Tensor, amax: Tensor, coded: Coded, signs: Tensor | None) -> Tensor:
    """Rows, int64 [n], of x [M, K], whose largest magnitude is amax [], and what they became, rotated by signs [128] or not at all."""
    few = x.index_select(0, rows)
    return _operand_sums(few.double(), coded, amax.double(), signs, few.numel())


def saved_sums(source: Quantized, rows: Tensor, coded: Coded, signs: Tensor) -> Tensor:
    """Columns, int64 [n], of a packed matrix [K, ...], and the rows that they became, rotated and quantized again."""
    nibbles = source.nibbles().index_select(1, rows)
    scales = source.scales.view(torch.uint8).index_select(1, rows // GROUP).view(torch.float8_e4m3fn)
    x = (decode_e2m1(nibbles, torch.float64) * scales.double() * source.tensor_scale.double()).t()
    return _operand_sums(x, coded, _largest(x), signs, x.numel())


def product_sums(result: Tensor, rows: Tensor, exact: Tensor) -> Tensor:
    """Rows, int64 [n], of a product of quantized operands [R, N], and these rows [n, N] of the same product without quantization."""
    x, q = exact.double(), result.index_select(0, rows).double()
    return _together(x, q, (x.new_zeros(()),) * 3, _largest(x), x.numel())


def _operand_sums(x: Tensor, coded: Coded, amax: Tensor, signs: Tensor | None, elements: int) -> Tensor:
    if signs is not None:
        x = reference.rotate(x, signs.double())
    q, largest = coded
    x = torch.nn.functional.pad(x, (0, q.shape[-1] - x.shape[-1]))
    beyond = (x.abs().unflatten(-1, (q.shape[-1] // GROUP, GROUP)) > largest.unsqueeze(-1)).flatten(-2)
    counts = [which.sum(dtype=torch.float64) for which in (x != 0, beyond & (q != 0), (x != 0) & (q == 0))]
    return _together(x, q, counts, amax, elements)


def _together(x: Tensor, q: Tensor, counts: Iterable[Tensor], amax: Tensor, elements: int) -> Tensor:
    pairs = ((x, x), (q, q), (q, x), (q - x, q - x))
    return torch.stack([*((a * b).sum() for a, b in pairs), *counts, amax, x.new_tensor(elements)]).unsqueeze(0)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude, float32 []; NaN if one of the numbers is."""
    return torch.linalg.vector_norm(x, ord=torch.inf, dtype=torch.float32) if x.numel() else x.new_zeros((), dtype=torch.float32)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())
