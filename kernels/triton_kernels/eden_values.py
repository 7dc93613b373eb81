"""MS-EDEN straight to bfloat16 values, in one pass: what the rotated operands of a product are on GPUs without FP4 tensor cores.

`ms_eden` rounds a group's scale t to ``E4M3_stochastic(t / g)`` once g, a power of two, is known. Dividing by g moves the exponent alone,
so as long as t / g is no subnormal E4M3 number, the rounding of its mantissa, and with it the value ``code * scale * g``, needs no g:
`fast_values` writes it in the pass that reads the data. It also keeps the smallest t of each row of a tile, and the largest of all.
`exact_values` then makes those tiles again, exactly as `ms_eden` does, that hold a subnormal scale or numbers near the ends of float32.

The fast path multiplies by reciprocals where `ms_eden` divides, which moves codes and scales at near-ties only, as often as the order of
the rotation's additions does.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.triton_kernels.ms_eden import fast_scale, peaks_of, round_rotated, scale_of
from quartet_compile.kernels.triton_kernels.numbers import (
    INTERPRET,
    bits_of,
    e2m1_nearest,
    e2m1_value,
    e4m3_stochastic,
    e4m3_value,
    from_bits,
    to_bfloat16,
)
from quartet_compile.kernels.triton_kernels.random import uniforms_of_groups

_SMALLEST_TENSOR_SCALE = tl.constexpr(2.0**-100)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def fast_values(y, seed, row, block, scale, STREAM: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """Rotated groups y [n, 8, 16] of rows `row` [n] -> values [n, 8, 16], and t [n, 8] as bits twice: the second time zeros are infinite.

    The groups are y * UNIT, a power of two; the values are multiplied by another one, `scale`.
    """
    peak, safe, factor = peaks_of(y)
    v = y * factor[:, :, None]
    q = e2m1_nearest(v)
    t_bits, s_bits = fast_scale(peak, safe, tl.sum(v * v, 2), tl.sum(v * q, 2), seed, row, block, STREAM, UNIT)
    return q * (from_bits(s_bits) * scale)[:, :, None], t_bits & 0x7FFFFFFF, tl.where(peak > 0, t_bits, INFINITY_BITS)


@triton.jit
def exact_values(y, peak_bits, seed, row, block, scale, STREAM: tl.constexpr):
    """As `fast_values`, once the bits of the largest t of all are known: the values of `ms_eden`, operation by operation."""
    n: tl.constexpr = y.shape[0]
    g, finite = scale_of(peak_bits)
    byte, t = round_rotated(y, False)
    s = e4m3_value(e4m3_stochastic(t * tl.div_rn(1.0, g), uniforms_of_groups(seed, row, block, STREAM)))
    codes = tl.join(e2m1_value(byte & 15), e2m1_value(byte >> 4)).reshape(n, 8, 16)
    values = codes * s[:, :, None] * (g * scale)
    return tl.where(finite, values, float("nan"))


@triton.jit
def _needs_exact(smallest_exponent, peak_bits, incoming):
    """1 where rows whose smallest t has this exponent (biased) must be made again, else 0.

    incoming: the power of two that the values carry besides g. The bound, 2^-6 * g, is a power of two: exponents decide.
    """
    g, finite = scale_of(peak_bits)
    total = g * incoming
    near_the_end = (g < _SMALLEST_TENSOR_SCALE) | (total < _SMALLEST_TENSOR_SCALE) | (finite == 0)
    return near_the_end.to(tl.int32) | (smallest_exponent < (bits_of(g) >> 23) - 6).to(tl.int32)


CHUNK_ROWS = tl.constexpr(16)
"""Rows that are made again together: as few as tensor cores take."""

CHECKED_CHUNKS = tl.constexpr(32)
"""Chunks that a program of a second launch looks at together."""

AGAIN = {"num_warps": 8}
"""Launch options of second launches: with fewer warps some Triton versions spill."""


@triton.jit
def chunks_that_need_exact(exponents, first, chunks, peak_bits, incoming):
    """Bit i: whether chunk first + i of `exponents`, uint8 [chunks, CHUNK_ROWS], must be made again."""
    i = tl.arange(0, CHECKED_CHUNKS)
    present = first + i < chunks
    at = (first + i)[:, None] * CHUNK_ROWS + tl.arange(0, CHUNK_ROWS)[None, :]
    smallest = tl.load(exponents + at, mask=present[:, None], other=255).to(tl.int32)
    return tl.sum((present.to(tl.int32) & _needs_exact(tl.min(smallest, 1), peak_bits, incoming)) << i, 0)


@triton.jit
def store_smallest(bits, exponents, tile):
    """The exponent of the smallest t of each row of a tile, bits [n, 8], to uint8 exponents [tiles, n]: no row waits for another."""
    n: tl.constexpr = bits.shape[0]
    tl.store(exponents + tile * n + tl.arange(0, n), (tl.min(bits, 1) >> 23).to(tl.uint8))


# ---------------------------------------------------------------- storing


@triton.jit
def _store_eight(pointer, present, a, b, c, d, e, f, g, h):
    """Eight neighbouring numbers of a thread as bfloat16 in one 16-byte store. tl.store would pass them through shared memory first."""
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred present; .reg .b32 w0, w1, w2, w3;
        setp.ne.b32 present, $2, 0;
        cvt.rn.bf16x2.f32 w0, $4, $3;  cvt.rn.bf16x2.f32 w1, $6, $5;  cvt.rn.bf16x2.f32 w2, $8, $7;  cvt.rn.bf16x2.f32 w3, $10, $9;
        @present st.global.v4.b32 [$1], {w0, w1, w2, w3};
        mov.b32 $0, 0;
        }
        """,
        "=r,l,r,f,f,f,f,f,f,f,f",
        [pointer, present, a, b, c, d, e, f, g, h],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_values(values, out, first_row, i, rows, block, blocks):
    """values [n, 8, 16] -> out [rows, 128 * blocks] at rows first_row + i and the columns of `block`, those in `product_order`.

    The four threads that hold a row own 32 columns each. In this order their k-th chunks of eight are neighbours: 64 bytes a store.
    """
    n: tl.constexpr = values.shape[0]
    chunk = tl.arange(0, 16)
    start = out + (first_row * tl.cast(blocks, tl.int64) + block) * 128
    at = i.to(tl.int64)[:, None] * (blocks * 128) + (((chunk & 3) << 2) | (chunk >> 2))[None, :] * 8
    present = (first_row + i < rows)[:, None]
    if INTERPRET:
        at = at[:, :, None] + tl.arange(0, 8)[None, None, :]
        tl.store(start + at, to_bfloat16(values.reshape(n, 16, 8)), mask=present[:, :, None])
    else:
        even, odd = tl.split(values.reshape(n, 16, 2, 2, 2))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        a, e = tl.split(a)
        b, f = tl.split(b)
        c, g = tl.split(c)
        d, h = tl.split(d)
        _store_eight((start + at).to(tl.int64), present.broadcast_to(n, 16).to(tl.int32), a, b, c, d, e, f, g, h)
