"""Four bytes in an int32 word, each a number of its own from 0 to 255: what aligns four scales with a few instructions."""

import triton
import triton.language as tl

ONES = tl.constexpr(0x01010101)
_LOW = tl.constexpr(0x7F7F7F7F)
_HIGH = tl.constexpr(-0x7F7F7F80)
"""Bit 7 of each byte."""


@triton.jit
def nonzero_bytes(word):
    """1 in each byte that is not zero, 0 in the others."""
    return ((((word & _LOW) + _LOW) | word) >> 7) & ONES


@triton.jit
def any_below(word, limit):
    """Whether a byte that is not zero is below the limit, any int32: -1 or another number but zero if so, else 0."""
    bound = tl.minimum(tl.maximum(limit, 0), 255) * ONES
    # Bit 7 of each byte of `difference`: whether the lower seven bits are at least the bound's; nothing is borrowed from the next byte.
    difference = (word | _HIGH) - (bound & _LOW)
    at_least = (word & ~bound) | (~(word ^ bound) & difference)
    return tl.where(limit > 255, _HIGH, ~at_least & _HIGH) & (nonzero_bytes(word) << 7)
