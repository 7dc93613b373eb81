"""MS-EDEN straight to bfloat16 values, in one pass: what the rotated operands of a product are on GPUs without FP4 tensor cores.

`ms_eden` rounds a group's scale t to ``E4M3_stochastic(t / g)`` once g, a power of two, is known. Dividing by g moves the exponent alone,
so as long as t / g is no subnormal E4M3 number, the rounding of its mantissa, and with it the value ``code * scale * g``, needs no g:
`fast_values` writes it in the pass that reads the data. It also keeps the smallest t of each row of a tile, and the smallest and the
largest of each program. These tell a second launch whether there is anything left for it: `exact_values` makes those rows again, exactly as
`ms_eden` does, that hold a subnormal scale or numbers near the ends of float32.

The fast path multiplies by reciprocals where `ms_eden` divides, which moves codes and scales at near-ties only, as often as the order of
the rotation's additions does.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.triton_kernels.ms_eden import INFINITY_BITS, fast_scale, peaks_of, round_rotated, scale_of
from quartet_compile.kernels.triton_kernels.numbers import (
    INTERPRET,
    e2m1_nearest,
    e2m1_value,
    e4m3_stochastic,
    e4m3_value,
    from_bits,
    to_bfloat16,
)
from quartet_compile.kernels.triton_kernels.random import uniforms_of_groups


@triton.jit
def fast_values(y, seed, first_row, i, block, scale, STREAM: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """Rotated groups y [n, 8, 16] of rows first_row + i [n] -> codes' numbers [n, 8, 16] and factors [n, 8], whose products are the values.

    And t [n, 8] as bits twice: the second time zeros are infinite. The groups are y * UNIT, a power of two; the values are multiplied by
    another one, `scale`.
    """
    peak, safe, factor = peaks_of(y)
    v = y * factor[:, :, None]
    q = e2m1_nearest(v)
    t_bits, s_bits = fast_scale(peak, safe, tl.sum(v * v, 2), tl.sum(v * q, 2), seed, first_row, i, block, STREAM, UNIT)
    return q, from_bits(s_bits) * scale, t_bits & 0x7FFFFFFF, tl.where(peak > 0, t_bits, INFINITY_BITS)


@triton.jit
def exact_values(y, peak_bits, seed, first_row, i, block, scale, STREAM: tl.constexpr):
    """Once the bits of the largest t of all are known: the values [n, 8, 16] of `ms_eden`, operation by operation, and factors of 1."""
    n: tl.constexpr = y.shape[0]
    g, finite = scale_of(peak_bits)
    byte, t = round_rotated(y, False)
    s = e4m3_value(e4m3_stochastic(t * tl.div_rn(1.0, g), uniforms_of_groups(seed, first_row, i, block, STREAM)))
    codes = tl.join(e2m1_value(byte & 15), e2m1_value(byte >> 4)).reshape(n, 8, 16)
    values = codes * s[:, :, None] * (g * scale)
    return tl.where(finite, values, float("nan")), tl.full((n, 8), 1.0, tl.float32)


# ---------------------------------------------------------------- what is made again

CHUNK_ROWS = tl.constexpr(16)
"""Rows that are made again together: as few as tensor cores take."""

CHECKED_CHUNKS = tl.constexpr(64)
"""Chunks that a program of a second launch looks at together."""

AGAIN = {"num_warps": 8, "maxnreg": 248}
"""Launch options of second launches. Unless told how many registers there are, ptxas spills rather than take more than 126."""


@triton.jit
def checks_of(chunks):
    """How many sets of CHECKED_CHUNKS there are: an odd number.

    Set c has the chunks c, c + checks_of, c + 2 checks_of and so on: rows that must be made again are often neighbours or a power of two
    apart (the first tokens of sequences, whose queries have no gradient), and every program should get its share.
    """
    return tl.cdiv(chunks, CHECKED_CHUNKS) | 1


@triton.jit
def chunks_below(exponents, check, chunks, limit):
    """Bit i, of 64: whether chunk i of the check'th set of `exponents`, uint8 [chunks, CHUNK_ROWS], has a row below the limit."""
    i = check + tl.arange(0, CHECKED_CHUNKS) * checks_of(chunks)
    at = i[:, None] * CHUNK_ROWS + tl.arange(0, CHUNK_ROWS)[None, :]
    present = i[:, None] < chunks
    smallest = tl.where(present, tl.load(exponents + at, mask=present, other=0).to(tl.int32), 256)
    return tl.sum((tl.min(smallest, 1) < limit).to(tl.int64) << tl.arange(0, CHECKED_CHUNKS), 0)


@triton.jit
def store_smallest(bits, exponents, tile):
    """The exponent of the smallest t of each row of a tile, bits [n, 8], to uint8 exponents [tiles, n]: no row waits for another.

    Each thread stores the rows that it holds; tl.store would exchange them through shared memory, with two barriers.
    """
    n: tl.constexpr = bits.shape[0]
    at = exponents + tile * n + tl.arange(0, n)
    exponent = tl.min(bits, 1) >> 23
    if INTERPRET:
        tl.store(at, exponent.to(tl.uint8))
    else:
        tl.inline_asm_elementwise(
            "st.global.u8 [$1], $2; mov.b32 $0, 0;", "=r,l,r", [at.to(tl.int64), exponent], dtype=tl.int32, is_pure=False, pack=1
        )


# ---------------------------------------------------------------- storing


@triton.jit
def _store_eight(pointer, present, factor, a, b, c, d, e, f, g, h):
    """Eight neighbouring numbers of a thread times a factor as bfloat16 in one 16-byte store.

    tl.store would pass them through shared memory first. The product of two bfloat16 pairs (with -0 added, as Ampere has no other) takes
    half as many instructions as one in float32.
    """
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred present; .reg .b32 w0, w1, w2, w3, twice, zero;
        setp.ne.b32 present, $2, 0;  mov.b32 zero, 0x80008000;  cvt.rn.bf16x2.f32 twice, $3, $3;
        cvt.rn.bf16x2.f32 w0, $5, $4;    fma.rn.bf16x2 w0, w0, twice, zero;
        cvt.rn.bf16x2.f32 w1, $7, $6;    fma.rn.bf16x2 w1, w1, twice, zero;
        cvt.rn.bf16x2.f32 w2, $9, $8;    fma.rn.bf16x2 w2, w2, twice, zero;
        cvt.rn.bf16x2.f32 w3, $11, $10;  fma.rn.bf16x2 w3, w3, twice, zero;
        @present st.global.v4.b32 [$1], {w0, w1, w2, w3};
        mov.b32 $0, 0;
        }
        """,
        "=r,l,r,f,f,f,f,f,f,f,f,f",
        [pointer, present, factor, a, b, c, d, e, f, g, h],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_values(numbers, factor, out, first_row, i, rows, block, blocks):
    """numbers [n, 8, 16] times factor [n, 8], both and their products bfloat16 numbers in float32 -> out [rows, 128 * blocks].

    At rows first_row + i and the columns of `block`, those in `product_order`: the four threads that hold a row own a group of each half.
    In this order their k-th chunks of eight are neighbours: 64 bytes a store.
    """
    n: tl.constexpr = numbers.shape[0]
    chunk = tl.arange(0, 16)
    start = out + (first_row * tl.cast(blocks, tl.int64) + block) * 128
    at = i.to(tl.int64)[:, None] * (blocks * 128) + ((chunk & 8) | ((chunk & 1) << 2) | ((chunk >> 1) & 3))[None, :] * 8
    present = (first_row + i < rows)[:, None]
    if INTERPRET:
        at = at[:, :, None] + tl.arange(0, 8)[None, None, :]
        values = to_bfloat16(numbers * factor[:, :, None])
        tl.store(start + at, values.reshape(n, 16, 8), mask=present[:, :, None])
    else:
        even, odd = tl.split(numbers.reshape(n, 16, 2, 2, 2))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        a, e = tl.split(a)
        b, f = tl.split(b)
        c, g = tl.split(c)
        d, h = tl.split(d)
        factor = tl.broadcast_to(factor[:, :, None], (n, 8, 2)).reshape(n, 16)
        _store_eight((start + at).to(tl.int64), present.broadcast_to(n, 16).to(tl.int32), factor, a, b, c, d, e, f, g, h)
