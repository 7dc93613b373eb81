"""Groups of 16 numbers of any dtype, rounded with IEEE divisions, as the reference has it: a tie of the quotient decides a code.

`round_any_kernel` is the first pass of `forward` over what `forward_words` does not take: float32, float16, ragged rows. `round_groups`
is the reference's rule with the tensor scale at hand, for the groups that the second pass quantizes again. A thread owns a whole group,
so its maximum and its sums stay in registers.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.format import E2M1_MAX
from quartet_compile.kernels.triton_kernels.forward_words import four_bits, provisional_scale
from quartet_compile.kernels.triton_kernels.numbers import (
    FINITE,
    bits_of,
    e2m1_pair,
    e2m1_value,
    e4m3_nearest,
    from_bits,
    group_sum,
    magnitude_bits,
    to_float32,
)
from quartet_compile.kernels.triton_kernels.overlap import let_next_begin

_E2M1_MAX = tl.constexpr(E2M1_MAX)


@triton.jit
def _candidate(even, odd, s, NATIVE: tl.constexpr):
    """Elements [n, 8] in units of g, group scales [n] -> their bytes, and the squared error of each group."""
    s = s[:, None]
    byte, even_value, odd_value = e2m1_pair(tl.div_rn(even, s), tl.div_rn(odd, s), NATIVE)
    even_error = even_value * s - even
    odd_error = odd_value * s - odd
    return byte, group_sum(even_error * even_error, odd_error * odd_error)


@triton.jit
def _group_scale(c):
    """E4M3 bits and value nearest to c, 1 instead of 0."""
    bits, value = e4m3_nearest(c)
    return tl.where(bits == 0, 0x38, bits), tl.where(bits == 0, 1.0, value)


@triton.jit
def load_groups(x, first, groups, columns, groups_per_row, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Groups first, first + 1, ... of contiguous x [M, columns] -> f32 [BLOCK, 16], zeros behind the end of a row."""
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, 8)[None, :]
    present = (first + i < groups)[:, None]
    # Two loads of 8 elements, so that with 16-bit inputs the 16 of a group meet in one thread.
    if RAGGED:
        column = (first + i) % groups_per_row * 16
        start = x + ((first + i) // groups_per_row * columns + column)[:, None]
        left = columns - column[:, None]
        front = tl.load(start + j, mask=present & (j < left), other=0.0)
        back = tl.load(start + j + 8, mask=present & (j + 8 < left), other=0.0)
    else:
        start = x + first * 16 + i[:, None] * 16
        front = tl.load(start + j, mask=present, other=0.0)
        back = tl.load(start + j + 8, mask=present, other=0.0)
    return tl.join(to_float32(front), to_float32(back)).permute(0, 2, 1).reshape(BLOCK, 16)


@triton.jit
def round_groups(numbers, g, FOUR: tl.constexpr, NATIVE: tl.constexpr):
    """float32 [n, 16], the tensor scale -> code bytes int32 [n, 8], E4M3 bits and value of each group's scale."""
    n: tl.constexpr = numbers.shape[0]
    peak = tl.max(tl.abs(numbers), 1)
    inverse = tl.div_rn(1.0, g)
    base = tl.div_rn(peak, _E2M1_MAX) * inverse
    even, odd = tl.split((numbers * inverse).reshape(n, 8, 2))
    bits, s = _group_scale(base)
    byte, error = _candidate(even, odd, s, NATIVE)
    if FOUR:
        bits4, s4 = _group_scale(base * 1.5)
        byte4, error4 = _candidate(even, odd, s4, NATIVE)
        four = error4 < error
        bits = tl.where(four, bits4, bits)
        s = tl.where(four, s4, s)
        byte = tl.where(four[:, None], byte4, byte)
    return tl.where((peak > 0)[:, None], byte, 0), bits, s


@triton.jit
def store_codes_and_values(
    codes, values, first, groups, byte, factor, CODES: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Code bytes int32 [BLOCK, 8] and, times `factor` f32 [BLOCK], the numbers they stand for: rounded to bfloat16 in integers."""
    i = tl.arange(0, BLOCK)
    present = (first + i < groups)[:, None]
    if CODES:
        tl.store(codes + first * 8 + i[:, None] * 8 + tl.arange(0, 8)[None, :], byte.to(tl.uint8), mask=present)
    if VALUES:
        numbers = tl.join(e2m1_value(byte & 15), e2m1_value(byte >> 4)).reshape(BLOCK, 16) * factor[:, None]
        bits = bits_of(numbers)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(numbers == numbers, rounded, 0x7FC0)
        tl.store(values + first * 16 + i[:, None] * 16 + tl.arange(0, 16)[None, :], rounded.to(tl.int16), mask=present)


@triton.jit
def round_any_kernel(
    x, codes, scales, values, peaks, groups, columns, groups_per_row,
    FOUR: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr, RAGGED: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As `round_words_kernel`, with IEEE divisions in float32: contiguous x [M, columns] -> codes u8, values int16, the rest alike."""
    let_next_begin(EARLY)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    numbers = load_groups(x, first, groups, columns, groups_per_row, RAGGED, BLOCK)
    peak = tl.max(magnitude_bits(numbers), 1)
    block_peak = tl.max(peak, 0)
    tl.store(peaks + tl.program_id(0), block_peak)
    binade = peak & FINITE
    unit = from_bits(-binade & 0x7FFFFFFF)
    even, odd = tl.split((numbers * unit[:, None]).reshape(BLOCK, 8, 2))
    base = tl.div_rn(from_bits((peak & 0x7FFFFF) | 0x40800000), _E2M1_MAX)
    s = four_bits(base)
    byte, error = _candidate(even, odd, s, NATIVE)
    if FOUR:
        s4 = four_bits(base * 1.5)
        byte4, error4 = _candidate(even, odd, s4, NATIVE)
        four = error4 < error
        s = tl.where(four, s4, s)
        byte = tl.where(four[:, None], byte4, byte)
    byte = tl.where((peak != 0)[:, None], byte, 0)
    s_bits = bits_of(s) + binade - 0x40800000
    byte_of_scale = provisional_scale(s_bits, peak, block_peak).to(tl.uint8)
    tl.store(scales + first + i, byte_of_scale, mask=first + i < groups, eviction_policy="evict_last")
    store_codes_and_values(codes, values, first, groups, byte, from_bits(s_bits & 0x7FFFFFFF), CODES, VALUES, BLOCK)
