"""The first pass of `forward` over a bfloat16 matrix, two elements an instruction.

Its speed hangs on the number of instructions: about 19 an element on sm_90, a fifth of them for what is done once a group, and 12 on sm_100
(`forward_native`).
"""

import triton
import triton.language as tl

from quartet_compile.kernels.triton_kernels.forward_native import native_candidate, scaled_elements
from quartet_compile.kernels.triton_kernels.numbers import FINITE, bits_of, from_bits, reciprocal
from quartet_compile.kernels.triton_kernels.overlap import let_next_begin
from quartet_compile.kernels.triton_kernels.words import (
    SIGNS,
    fma2,
    four_words,
    high,
    largest_bits,
    low,
    max_magnitude2,
    mul2,
    nearest_e2m1_2,
    pack_codes,
    store_groups_of_words,
    twice,
)

# ---------------------------------------------------------------- provisional scales: exponents relative to the block's largest magnitude


@triton.jit
def origin_of(block_peak):
    """What a provisional byte counts from, in eighths of a binade: from the magnitude bits of a block's largest number."""
    return (block_peak >> 23) * 8 - 263


@triton.jit
def provisional_scale(s_bits, peak, block_peak):
    """float32 bits of a scale of four significant bits -> 2 to 255; 1 if it is 31 binades below the block's maximum; 0 for a zero group.

    The scale is at most a quarter of the maximum rounded, and half of its binade with that: the byte never exceeds 255.
    """
    return tl.maximum((s_bits >> 20) - origin_of(block_peak), (peak != 0).to(tl.int32))


# ---------------------------------------------------------------- one candidate


@triton.jit
def four_bits(x):
    """f32 -> the nearest number with four significant bits, ties to even: E4M3 without its ends."""
    bits = bits_of(x)
    return from_bits((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576)


@triton.jit
def _squares(a, b):
    """Two words -> sums of squares of their even and of their odd elements. Squares have 16 bits: the sum is rounded once, fused or not."""
    return tl.fma(low(a), low(a), low(b) * low(b)), tl.fma(high(a), high(a), high(b) * high(b))


@triton.jit
def word_candidate(w, minus_s):
    """Eight words [n] of numbers below 8, minus a scale [n] of four bits in [0.6875, 2] -> words of E2M1 numbers, and the squared error.

    ``w + w * h``, h the bfloat16 next to 1 / s - 1, falls on the same side of each rounding boundary as w / s, and on it where w / s
    does: true of all 8-bit numbers w and the 14 scales, which is tested one by one. The error w - q * s fits bfloat16.
    """
    h = twice(-1.0 - reciprocal(minus_s))
    minus_s = twice(minus_s)
    q = ()
    d = ()
    for i in tl.static_range(8):
        rounded = nearest_e2m1_2(fma2(w[i], h, w[i]))
        q = q + (rounded,)  # noqa: RUF005
        d = d + (fma2(rounded, minus_s, w[i]),)  # noqa: RUF005
    # The order of `reference._group_sum`: halves of the group, then halves of what is left.
    even0, odd0 = _squares(d[0], d[4])
    even1, odd1 = _squares(d[1], d[5])
    even2, odd2 = _squares(d[2], d[6])
    even3, odd3 = _squares(d[3], d[7])
    return q, ((even0 + even2) + (even1 + even3)) + ((odd0 + odd2) + (odd1 + odd3))


# ---------------------------------------------------------------- the pass


@triton.jit
def round_words_kernel(
    x, codes, scales, values, peaks, groups,
    FOUR: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr, XORSIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x: words int32 [groups, 8] -> codes int32 [groups, 2] and values as words, provisional scales u8, and of each block's magnitude bits
    the upper half, int16: the lower one is zero.

    The L2 cache shall keep the scales for the second pass rather than what nobody reads again.

    CODES, VALUES: which of them are asked for; NATIVE: codes alone. A thread owns whole groups, nothing but the block's maximum crosses
    threads.
    """
    let_next_begin(EARLY)
    # No masks: threads behind the end do the last group once more.
    first = tl.program_id(0) * BLOCK
    i = tl.minimum(tl.arange(0, BLOCK), groups - 1 - first)
    n = (first + i).to(tl.int64)
    offsets = n[:, None] * 8 + tl.arange(0, 4)[None, :]
    ONCE: tl.constexpr = "" if VALUES else "evict_first"  # with values to write as well, the other one is faster
    w = four_words(tl.load(x + offsets, eviction_policy=ONCE), BLOCK)
    w = w + four_words(tl.load(x + offsets + 4, eviction_policy=ONCE), BLOCK)
    largest = w[0]
    for j in tl.static_range(1, 8):
        largest = max_magnitude2(largest, w[j], XORSIGN)
    peak = largest_bits(largest)
    block_peak = tl.max(peak, 0)
    tl.store(peaks + tl.program_id(0), (block_peak >> 16).to(tl.int16))

    binade = peak & FINITE
    unit = from_bits(-binade & 0x7FFFFFFF)  # 4 / 2^e where the largest number is in [2^e, 2^(e+1)); zero for a zero group
    PEAK: tl.constexpr = 2.0 if NATIVE else 4.0  # the largest number becomes one in [PEAK, 2 * PEAK)
    PEAK_BITS: tl.constexpr = 0x40000000 if NATIVE else 0x40800000
    scaled_peak = from_bits((peak & 0x7FFFFF) | PEAK_BITS)
    # All scales are kept negative, as the error needs them. Four digits are far from where this product differs from the quotient.
    minus_s = four_bits(scaled_peak * -0.1666666716337204)
    # A quarter of the peak is in [PEAK / 4, PEAK / 2), where four digits are as far apart as float32 numbers 1.5 * 2^20 times as large.
    minus_s4 = tl.fma(scaled_peak, -0.25, PEAK * -393216.0) + PEAK * 393216.0
    if NATIVE:
        tl.static_assert(CODES and not VALUES)
        v = scaled_elements(w, unit * (PEAK / 4), peak != 0)
        front, back, error = native_candidate(v, minus_s)
        if FOUR:
            front4, back4, error4 = native_candidate(v, minus_s4)
            four = error4 < error
            front = tl.where(four, front4, front)
            back = tl.where(four, back4, back)
            minus_s = tl.where(four, minus_s4, minus_s)
    else:
        scaled = ()
        for j in tl.static_range(8):
            scaled = scaled + (mul2(w[j], twice(unit)),)  # noqa: RUF005
        q, error = word_candidate(scaled, minus_s)
        if FOUR:
            q4, error4 = word_candidate(scaled, minus_s4)
            four = error4 < error
            minus_s = tl.where(four, minus_s4, minus_s)
        signs = tl.where(peak != 0, SIGNS, 0)
        chosen = ()
        for j in tl.static_range(8):
            c = q[j]
            if FOUR:
                c = tl.where(four, q4[j], c)
            chosen = chosen + (c | (w[j] & signs),)  # noqa: RUF005
        if CODES:
            front = pack_codes(chosen[0], chosen[1], chosen[2], chosen[3])
            back = pack_codes(chosen[4], chosen[5], chosen[6], chosen[7])
    s_bits = bits_of(minus_s) + binade + (0x80000000 - PEAK_BITS)  # wraps: without the sign, and from the unit to x's
    if CODES:
        tl.store(codes + n[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(front, back))
    tl.store(scales + n, provisional_scale(s_bits, peak, block_peak).to(tl.uint8), eviction_policy="evict_last")
    if VALUES:
        factor = twice(from_bits(s_bits & 0x7FFFFFFF))  # a zero group: +0 times something finite
        out = ()
        for j in tl.static_range(8):
            out = out + (mul2(chosen[j], factor),)  # noqa: RUF005
        start = values + first.to(tl.int64) * 8
        store_groups_of_words(start, i, out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7])
