"""Philox4x32-10 inside kernels: the numbers of `quartet_compile.kernels.philox`, drawn from a seed that never leaves the GPU.

About 60 integer instructions for a word; a group of 16 elements needs one.
"""

import triton
import triton.language as tl

from quartet_compile.kernels import philox

STREAM_GRADIENT = tl.constexpr(philox.STREAM_GRADIENT)
STREAM_SAVED = tl.constexpr(philox.STREAM_SAVED)
_RANK_STEP = tl.constexpr(philox.RANK_STEP - 2**64)
"""The step as a signed number: 64-bit products and sums have the same bits either way."""


@triton.jit
def seed_of_rank(seeds, index, rank):
    """seeds[index] mixed with the process's rank, int64."""
    return tl.load(seeds + index) + rank.to(tl.int64) * _RANK_STEP


@triton.jit
def word(seed, group, row, STREAM: tl.constexpr):
    """32 random bits as int32, at the counters (group, row, STREAM, 0). group, row: int32 of one shape."""
    first, _, _, _ = tl.philox(seed, group, row, tl.full(group.shape, STREAM, tl.int32), tl.zeros(group.shape, tl.int32))
    return first.to(tl.int32, bitcast=True)


@triton.jit
def uniform(seed, group, row, STREAM: tl.constexpr):
    """Numbers in [0, 1), multiples of 2^-24: the upper 24 bits of `word`."""
    return ((word(seed, group, row, STREAM) >> 8) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def rotation_sign_bits(seed, j):
    """Bit j (0..127, int32) of the 128 bits at the counter (0, 0, 0, 0), int32; a set bit means -1."""
    zero = tl.zeros(j.shape, tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, zero, zero, zero, zero)
    word = tl.where(j < 64, tl.where(j < 32, word0, word1), tl.where(j < 96, word2, word3))
    return (word.to(tl.int32, bitcast=True) >> (j & 31)) & 1
