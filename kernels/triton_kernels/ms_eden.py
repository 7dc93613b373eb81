"""MS-EDEN after the rotation, in registers: the reference's steps one by one, and a fast form of the same.

`round_rotated` follows the reference operation by operation; a difference can only come from the order in which the rotation's additions
were done. `peaks_of` and `fast_scale` multiply by reciprocals instead, and round a group's scale t without the tensor scale g, a power
of two: g moves the exponent of t alone, as long as t / g is no subnormal E4M3 number. `eden_values` and `eden_codes` are built on them;
what passes the largest t from their first launch to their second, which knows g, is here too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import E2M1_MAX
from quartet_compile.kernels.reference import MS_EDEN_OVERRIDE, SCALE_CEILING
from quartet_compile.kernels.triton_kernels.numbers import bits_of, e2m1_pair, group_sum, reciprocal, tensor_scale
from quartet_compile.kernels.triton_kernels.random import words_of_groups

_TOP = tl.constexpr(E2M1_MAX / MS_EDEN_OVERRIDE)
_CEILING = tl.constexpr(SCALE_CEILING["ms_eden"])
_SMALLEST_PEAK = tl.constexpr(2.0**-124)
SMALLEST_TENSOR_SCALE = tl.constexpr(2.0**-100)
INFINITY_BITS = tl.constexpr(0x7F800000)


# ---------------------------------------------------------------- the reference's steps


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def round_rotated(y, NATIVE: tl.constexpr):
    """y float32 [rows, 8, 16] -> bytes int32 [rows, 64], t float32 [rows, 8]. Where y is not finite, t is not either."""
    rows: tl.constexpr = y.shape[0]
    peak = tl.max(tl.abs(y), 2)
    m = tl.div_rn(peak, _TOP)
    v = tl.div_rn(y, _or_one(m)[:, :, None])
    even, odd = tl.split(v.reshape(rows, 8, 8, 2))
    byte, even_value, odd_value = e2m1_pair(even, odd, NATIVE)
    numerator = group_sum(even * even, odd * odd).reshape(rows, 8)
    denominator = group_sum(even * even_value, odd * odd_value).reshape(rows, 8)
    t = m * tl.where(denominator == 0, 1.0, tl.div_rn(numerator, _or_one(denominator)))
    byte = tl.where((peak > 0)[:, :, None], byte, 0)  # whatever sign the tensor cores give to a sum of zeros
    return byte.reshape(rows, 64), t


@triton.jit
def scale_of(peak_bits):
    """Bits of the largest t -> the tensor scale, and whether all t are finite."""
    return tensor_scale(peak_bits, _CEILING, 1.0)


# ---------------------------------------------------------------- the fast form


@triton.jit
def peaks_of(y):
    """y [n, 8, 16] -> the maxima of its groups, what to take for them to scale back, and the factors that bring them to 6.07: [n, 8] each.

    Smaller groups than 2^-124 get a t that is off, but below 2^-118, where the tensor scale stays the same; they are made again.
    """
    peak = tl.max(tl.abs(y), 2)
    safe = tl.maximum(peak, _SMALLEST_PEAK)
    return peak, safe, reciprocal(safe * 0.25) * (_TOP * 0.25)  # a quarter, so that no reciprocal is a subnormal number


@triton.jit
def fast_scale(peak, safe, numerator, denominator, seed, first_row, i, block, STREAM: tl.constexpr, UNIT: tl.constexpr):
    """Sums of v v and v q over groups [n, 8] of rows first_row + i [n] -> bits of t, and of t stochastically rounded to four digits."""
    denominator = tl.maximum(denominator, 1.0)  # 36 or more where the group's maximum became 6
    t = tl.where(peak < _SMALLEST_PEAK, peak, safe * (numerator * reciprocal(denominator))) * (UNIT / _TOP)
    draw = words_of_groups(seed, first_row, i, block, STREAM)
    # The upper neighbour iff the 20 bits behind E4M3's mantissa exceed the draw's upper 20: then their sum with its complement carries.
    t_bits = bits_of(t)
    return t_bits, (t_bits + (0xFFFFF - ((draw >> 12) & 0xFFFFF))) & -1048576


# ---------------------------------------------------------------- the largest t, and the least


@triton.jit
def store_extremes(largest, least, peaks, leasts):
    """Bits of the largest and of the least t that a program has seen, int32 [n, 8] each, to where they point."""
    tl.store(peaks, tl.max(tl.max(largest, 1), 0))
    tl.store(leasts, tl.min(tl.min(least, 1), 0))


MOST_PROGRAMS = 1024
"""As many programs may a first launch have: a second launch reads what each left in one load."""

_MOST_PROGRAMS = tl.constexpr(MOST_PROGRAMS)


@triton.jit
def largest_peak(peaks, programs):
    i = tl.arange(0, _MOST_PROGRAMS)
    return tl.max(tl.load(peaks + i, mask=i < programs, other=0), 0)


@triton.jit
def least_exponent(leasts, programs):
    """The biased exponent of the smallest of leasts, int32 [programs], bits of numbers."""
    i = tl.arange(0, _MOST_PROGRAMS)
    return tl.min(tl.load(leasts + i, mask=i < programs, other=INFINITY_BITS), 0) >> 23


@triton.jit
def exponent_limit(peak_bits, incoming):
    """Rows must be made again whose smallest t has a (biased) exponent below this: t / g is then no normal E4M3 number. 256 means all rows.

    incoming: the power of two that the values carry besides g. The bound, 2^-6 * g, is a power of two: exponents decide.
    """
    g, finite = scale_of(peak_bits)
    total = g * incoming
    near_the_end = (g < SMALLEST_TENSOR_SCALE) | (total < SMALLEST_TENSOR_SCALE) | (finite == 0)
    return tl.where(near_the_end, 256, (bits_of(g) >> 23) - 6)


def new_flags(like: Tensor, extremes: int, tiles: int, rows: int) -> tuple[Tensor, Tensor]:
    """For the two launches: int32 [extremes], such as the largest t of each program; uint8 [tiles, rows], an exponent for each row."""
    return (
        torch.empty(extremes, dtype=torch.int32, device=like.device),
        torch.empty((tiles, rows), dtype=torch.uint8, device=like.device),
    )
