"""Philox4x32-10 inside kernels: the numbers of `quartet_compile.kernels.philox`, drawn from a seed that never leaves the GPU.

About 36 integer instructions a call, whose four words serve four groups. Where a thread holds all of them, as behind the tensor cores of
every GPU before sm_100, the compiler finds that it is one call; a thread of sm_100 holds two.
"""

import triton
import triton.language as tl

from quartet_compile.kernels import philox
from quartet_compile.kernels.triton_kernels.numbers import INTERPRET

STREAM_GRADIENT = tl.constexpr(philox.STREAM_GRADIENT)
STREAM_SAVED = tl.constexpr(philox.STREAM_SAVED)
_RANK_STEP = tl.constexpr(philox.RANK_STEP - 2**64)
"""The step as a signed number: 64-bit products and sums have the same bits either way."""

_FACTOR0, _FACTOR1 = tl.constexpr(philox.MULTIPLIER_0), tl.constexpr(philox.MULTIPLIER_1)
_KEY_STEP0, _KEY_STEP1 = tl.constexpr(philox.KEY_STEP_0), tl.constexpr(philox.KEY_STEP_1)
_ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def seed_of_rank(seeds, index, rank):
    """seeds[index] mixed with the process's rank, int64."""
    return tl.load(seeds + index) + rank.to(tl.int64) * _RANK_STEP


@triton.jit
def anew(seed):
    """The seed, as if it were not known from the turn before: a loop else keeps the keys of all Philox's rounds, 20 registers."""
    if not INTERPRET:
        seed = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [seed], dtype=tl.int64, is_pure=False, pack=1)
    return seed


@triton.jit
def _product(a, FACTOR: tl.constexpr):
    """uint32 times a constant -> upper and lower half. One 64-bit product: `tl.philox` takes an instruction for each half."""
    product = a.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def words_of_groups(seed, first_row, i, block, STREAM: tl.constexpr):
    """32 random bits for each of the eight groups of `block` and rows first_row + i: int32 [n, 8].

    first_row: a multiple of 16, apart from i int32 [n], so that the compiler can see which calls are the same.
    """
    nothing = tl.zeros((i.shape[0], 8), tl.uint32)
    group = tl.arange(0, 8)[None, :]
    row = i[:, None]
    c0 = (block * 4 + (group & 3)).to(tl.uint32) + nothing
    c1 = (first_row + (row & -9)).to(tl.uint32) + nothing
    c2 = nothing + STREAM
    c3 = nothing
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = _product(c0, _FACTOR0)
        high1, low1 = _product(c2, _FACTOR1)
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += _KEY_STEP0
        key1 += _KEY_STEP1
    front = tl.where((row & 8) == 0, c0, c2)
    back = tl.where((row & 8) == 0, c1, c3)
    return tl.where(group < 4, front, back).to(tl.int32, bitcast=True)


@triton.jit
def uniforms_of_groups(seed, first_row, i, block, STREAM: tl.constexpr):
    """Numbers in [0, 1), multiples of 2^-24: the upper 24 bits of `words_of_groups`."""
    return ((words_of_groups(seed, first_row, i, block, STREAM) >> 8) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def rotation_sign_bits(seed, j):
    """Bit j (0..127, int32) of the 128 bits at the counter (0, 0, 0, 0), int32; a set bit means -1."""
    zero = tl.zeros(j.shape, tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, zero, zero, zero, zero)
    word = tl.where(j < 64, tl.where(j < 32, word0, word1), tl.where(j < 96, word2, word3))
    return (word.to(tl.int32, bitcast=True) >> (j & 31)) & 1
