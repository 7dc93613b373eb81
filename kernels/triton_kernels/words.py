"""Two bfloat16 numbers in an int32 *word*, the even element in the lower half: one instruction works on both.

Products and sums are `fma.rn.bf16x2` (PTX ISA, sm_80 on; subnormal numbers stay), rounded once. Triton has no such type, hence assembly;
its interpreter, which knows none, gets the same in float32, whose second rounding changes nothing where the exact result has at most 24
bits or lies far from a tie: true of every use here.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.triton_kernels.numbers import INTERPRET, bits_of, e2m1, from_bits

SIGNS = tl.constexpr(-0x7FFF8000)
_MINUS_ZEROS = tl.constexpr(-0x7FFF8000)


@triton.jit
def low(w):
    """The even elements: f32."""
    return from_bits(w << 16)


@triton.jit
def high(w):
    """The odd elements: f32."""
    return from_bits(w & -65536)


@triton.jit
def _upper_half(x):
    """f32 -> the bits of the nearest bfloat16, ties to even, in the upper half of an int32."""
    bits = bits_of(x)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


@triton.jit
def _word(even, odd):
    """Two f32 -> word, for the interpreter."""
    return ((_upper_half(even) >> 16) & 0xFFFF) | _upper_half(odd)


@triton.jit
def upper_halves(even, odd):
    """Two f32 -> word of their upper halves."""
    if INTERPRET:
        w = ((bits_of(even) >> 16) & 0xFFFF) | (bits_of(odd) & -65536)
    else:
        w = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1)
    return w


@triton.jit
def twice(x):
    """f32 -> its nearest bfloat16 in both halves."""
    if INTERPRET:
        w = _word(x, x)
    else:
        w = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return w


@triton.jit
def fma2(a, b, c):
    """Words: a * b + c."""
    if INTERPRET:
        w = _word(low(a) * low(b) + low(c), high(a) * high(b) + high(c))
    else:
        w = tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)
    return w


@triton.jit
def mul2(a, b):
    """Words: a * b. (`mul.rn.bf16x2` needs sm_90; adding -0 changes nothing, not the sign of a zero either.)"""
    return fma2(a, b, tl.full(a.shape, _MINUS_ZEROS, tl.int32))


@triton.jit
def max_magnitude2(a, b, XORSIGN: tl.constexpr):
    """Words: a number whose magnitude is the larger of |a| and |b|, NaN if either is NaN. Signs are arbitrary.

    XORSIGN: the GPU has an instruction for it (sm_86 on), the sign of which is the product's; else the magnitudes are taken first.
    """
    if INTERPRET:
        w = tl.maximum(a & 0x7FFF, b & 0x7FFF) | tl.maximum(a & 0x7FFF0000, b & 0x7FFF0000)
    elif XORSIGN:
        w = tl.inline_asm_elementwise("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        w = tl.inline_asm_elementwise(
            "{ .reg .b32 u, v; abs.bf16x2 u, $1; abs.bf16x2 v, $2; max.NaN.bf16x2 $0, u, v; }",
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return w


@triton.jit
def largest_bits(w):
    """Word -> float32 bits of the larger magnitude; NaN is the largest of all."""
    return tl.maximum((w << 16) & 0x7FFFFFFF, w & 0x7FFF0000)


@triton.jit
def _at_least_one2(w):
    """Words of positive numbers: the larger of each and 1."""
    if INTERPRET:
        w = tl.maximum(w & 0xFFFF, 0x3F80) | tl.maximum(w & -65536, 0x3F800000)
    else:
        w = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3F803F80; max.bf16x2 $0, $1, one; }", "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1
        )
    return w


@triton.jit
def nearest_e2m1_2(y):
    """Words: the nearest E2M1 numbers, ties to even, for |y| < 7. Zeros come out positive.

    With p = 1, 2 or 4 the binade of y, the grid's spacing is p / 2, which is also that of bfloat16 around 96p: the sum's rounding is it.
    """
    binade = _at_least_one2(y & 0x7F807F80)
    shifted = fma2(binade, tl.full(y.shape, 0x42C042C0, tl.int32), y)
    return fma2(binade, tl.full(y.shape, -0x3D3F3D40, tl.int32), shifted)


@triton.jit
def pack_codes(a, b, c, d):
    """Four words of E2M1 numbers -> their eight codes in an int32, the first element in the lowest nibble.

    A number times 2^-126 has its code in bits 6 to 8 of the bfloat16 (the formats differ in bias only) and zeros but for the sign below and
    above. One product with three powers of two moves code, sign and the odd code next to each other into the top byte, without a carry.
    """
    if INTERPRET:
        codes = tl.zeros(a.shape, tl.int32)
        words = (a, b, c, d)
        for i in tl.static_range(4):
            even, _ = e2m1(low(words[i]))
            odd, _ = e2m1(high(words[i]))
            codes |= (even | (odd << 4)) << (8 * i)
    else:
        codes = tl.inline_asm_elementwise(
            """{ .reg .b32 bias, zero, sign, a, b, c, d, p, q;
            mov.b32 bias, 0x00800080;  mov.b32 zero, 0x80008000;  mov.b32 sign, 0x80000000;
            fma.rn.bf16x2 a, $1, bias, zero;  mul.lo.u32 p, a, 0x00041040;  lop3.b32 a, p, a, sign, 0xD8;
            fma.rn.bf16x2 b, $2, bias, zero;  mul.lo.u32 p, b, 0x00041040;  lop3.b32 b, p, b, sign, 0xD8;
            fma.rn.bf16x2 c, $3, bias, zero;  mul.lo.u32 p, c, 0x00041040;  lop3.b32 c, p, c, sign, 0xD8;
            fma.rn.bf16x2 d, $4, bias, zero;  mul.lo.u32 p, d, 0x00041040;  lop3.b32 d, p, d, sign, 0xD8;
            prmt.b32 p, a, b, 0x0073;  prmt.b32 q, c, d, 0x0073;  prmt.b32 $0, p, q, 0x5410; }""",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return codes


@triton.jit
def four_words(w, n: tl.constexpr):
    """int32 [n, 4] -> its columns."""
    even, odd = tl.split(w.reshape(n, 2, 2))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def join_words(a, b, c, d):
    """Four int32 [n] -> [n, 4]."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4)


@triton.jit
def store_groups_of_words(start, i, w0, w1, w2, w3, w4, w5, w6, w7):
    """Eight words of each group i [n] to start + 8 * i, 32 bytes. A thread has a group, but writes half of its own and half of another's.

    Neighbouring threads exchange halves, so that each instruction writes whole sectors of 32 bytes: the L2 cache takes half a sector in the
    time of a whole one. They tell each other their i, so it does not matter which groups they have.
    """
    if INTERPRET:
        half = i[:, None] * 8 + tl.arange(0, 4)[None, :]
        tl.store(start + half, join_words(w0, w1, w2, w3))
        tl.store(start + half + 4, join_words(w4, w5, w6, w7))
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred odd; .reg .b32 lane, other, first, second, a, b, c, d; .reg .b64 half, p, q;
            mov.u32 lane, %laneid;  and.b32 lane, lane, 1;  setp.ne.u32 odd, lane, 0;
            shfl.sync.bfly.b32 other, $2, 1, 0x1f, 0xffffffff;
            selp.b32 first, other, $2, odd;  selp.b32 second, $2, other, odd;
            mad.wide.u32 half, lane, 16, $1;  mad.wide.s32 p, first, 32, half;  mad.wide.s32 q, second, 32, half;
            selp.b32 a, $3, $7, odd;   shfl.sync.bfly.b32 a, a, 1, 0x1f, 0xffffffff;
            selp.b32 b, $4, $8, odd;   shfl.sync.bfly.b32 b, b, 1, 0x1f, 0xffffffff;
            selp.b32 c, $5, $9, odd;   shfl.sync.bfly.b32 c, c, 1, 0x1f, 0xffffffff;
            selp.b32 d, $6, $10, odd;  shfl.sync.bfly.b32 d, d, 1, 0x1f, 0xffffffff;
            .reg .b32 e, f, g, h;
            selp.b32 e, a, $3, odd;  selp.b32 f, b, $4, odd;  selp.b32 g, c, $5, odd;  selp.b32 h, d, $6, odd;
            st.global.v4.b32 [p], {e, f, g, h};
            selp.b32 e, $7, a, odd;  selp.b32 f, $8, b, odd;  selp.b32 g, $9, c, odd;  selp.b32 h, $10, d, odd;
            st.global.v4.b32 [q], {e, f, g, h};
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r,r,r,r,r,r,r",
            [tl.cast(start, tl.int64) + tl.zeros(i.shape, tl.int64), i, w0, w1, w2, w3, w4, w5, w6, w7],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
