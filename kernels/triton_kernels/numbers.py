"""The two small number formats as Triton functions: rounding to them, their bits, and power-of-two tensor scales.

Everything is integer arithmetic and exact float32 steps, so that the results are the reference's bit for bit on every GPU from sm_80 on
and in Triton's interpreter, whose own conversions to 8-bit and 16-bit floats truncate. A rounding to a grid with spacing ``p/2^m`` is one
addition of ``p * 2^(23-m)``: the sum's own rounding, to nearest and ties to even, is the wanted one, and its low bits count the steps.

`NATIVE` selects the conversion instructions of Blackwell (PTX ISA, "cvt": e2m1x2, sm_100a and sm_120a), which round the same way.
The multiplications by powers of two may meet subnormal numbers: Triton does not flush them.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.format import E2M1_MAX, E4M3_MAX

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
"""Kernels run as NumPy code on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""

FINITE = tl.constexpr(0x7F800000)
"""Float32 magnitude bits from here on are infinities and NaN."""

_E2M1_MAX = tl.constexpr(E2M1_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """|x| as an integer. Integers order like the magnitudes, with infinity and NaN on top: their maximum, unlike tl.max, keeps a NaN."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def to_float32(x):
    """Exact. A bfloat16 is the upper half of a float32: in integers, because the interpreter's own conversion spoils subnormal numbers."""
    return from_bits(x.to(tl.int16, bitcast=True).to(tl.int32) << 16) if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def to_bfloat16(x):
    """Nearest, ties to even. The interpreter's own conversion truncates."""
    if INTERPRET:
        bits = bits_of(x)
        x = tl.where(x == x, from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536), x)
    return x.to(tl.bfloat16)


@triton.jit
def reciprocal(x):
    """1 / x to an ulp, where both are normal numbers: for decisions that an ulp does not move, or moves at near-ties only."""
    if INTERPRET:
        r = 1.0 / x
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return r


# ---------------------------------------------------------------- tensor scales


@triton.jit
def power_of_two_at_least(g):
    """2^ceil(log2 g) for g > 0, at least 2^-126."""
    bits = bits_of(g)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return from_bits(tl.maximum(exponent, 1) << 23)


@triton.jit
def tensor_scale(peak_bits, CEILING: tl.constexpr, TOP: tl.constexpr):
    """Magnitude bits of the largest value A -> (g, finite): g the power of two at or above A / CEILING / TOP, 1 for A = 0 or not finite."""
    finite = peak_bits < FINITE
    g = tl.div_rn(tl.div_rn(from_bits(tl.where(finite, peak_bits, 0)), CEILING), TOP)
    return power_of_two_at_least(tl.where(g == 0, 1.0, g)), finite


@triton.jit
def exponent_of(g):
    """e of a power of two g = 2^e, subnormal ones included; -1 for 0, as ``frexp`` has it."""
    small = g < 1.1754943508222875e-38
    bits = bits_of(tl.where(small, g * 8388608.0, g))
    return tl.where(g == 0, -1, (bits >> 23) - tl.where(small, 150, 127))


@triton.jit
def times_power_of_two(x, exponent):
    """x * 2^exponent for -252 <= exponent <= 254, rounded once: the first factor never takes x out of the range of normal numbers."""
    half = exponent >> 1
    return x * from_bits((half + 127) << 23) * from_bits((exponent - half + 127) << 23)


# ---------------------------------------------------------------- E2M1


@triton.jit
def e2m1(y):
    """f32 -> (nibble in int32, its value): nearest, ties to even, saturating at 6; the sign stays, also of a zero."""
    a = tl.minimum(tl.abs(y), _E2M1_MAX)
    sign = bits_of(y) & -2147483648
    binade = bits_of(tl.maximum(a, 1.0)) & 0x7F800000  # of 1, 2 or 4: the grid's spacing is half of it
    shift = from_bits(binade) * 4194304.0
    shifted = a + shift
    nibble = (bits_of(shifted) & 7) + (binade >> 22) - 254
    value = bits_of(shifted - shift) | sign
    return nibble | ((sign >> 28) & 8), from_bits(value)


@triton.jit
def e2m1_pair(even, odd, NATIVE: tl.constexpr):
    """Neighbouring elements -> (their byte in int32, the two rounded values), rounded as in `e2m1`."""
    if NATIVE and not INTERPRET:
        byte, even_value, odd_value = tl.inline_asm_elementwise(
            """{ .reg .b8 code; .reg .b32 pair; .reg .b16 low, high;
            cvt.rn.satfinite.e2m1x2.f32 code, $4, $3;  cvt.u32.u8 $0, code;
            cvt.rn.f16x2.e2m1x2 pair, code;  mov.b32 {low, high}, pair;
            cvt.f32.f16 $1, low;  cvt.f32.f16 $2, high; }""",
            "=r,=f,=f,f,f",
            [even, odd],
            dtype=(tl.int32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        low, even_value = e2m1(even)
        high, odd_value = e2m1(odd)
        byte = low | (high << 4)
    return byte, even_value, odd_value


@triton.jit
def e2m1_nearest(v):
    """Nearest E2M1 number, ties to even, for |v| < 7; the sign of a zero is lost. The sum's rounding keeps multiples of half v's binade."""
    binade = from_bits(bits_of(tl.maximum(tl.abs(v), 1.0)) & 0x7F800000)
    shift = binade * 6291456.0  # 1.5 * 2^22: the sum stays in its binade for both signs
    return (v + shift) - shift


@triton.jit
def e2m1_value(nibble):
    """Nibble in int32 -> f32. Codes from 2 on are the upper bits of a float32 already, counted from 1.0; 0 and 0.5 are not."""
    code = nibble & 7
    bits = tl.where(code < 2, code * 0x3F000000, (code + 252) << 22)
    return from_bits(bits | ((nibble & 8) << 28))


# ---------------------------------------------------------------- E4M3 (never negative here)


@triton.jit
def e4m3_nearest(c):
    """f32 >= 0 -> (E4M3 bits in int32, value): nearest, ties to even, saturating at 448."""
    c = tl.minimum(c, _E4M3_MAX)
    binade = bits_of(tl.maximum(c, 0.015625)) & 0x7F800000
    shift = from_bits(binade) * 1048576.0
    shifted = c + shift
    return (bits_of(shifted) & 31) + (binade >> 20) - 968, shifted - shift


@triton.jit
def e4m3_stochastic(c, u):
    """f32 in [0, 448], u in [0, 1) -> E4M3 bits in int32: the upper neighbour iff ``u < (c - lower) / (upper - lower)``."""
    binade = bits_of(tl.maximum(c, 0.015625)) & 0x7F800000
    steps = c * from_bits(0x7F000000 - binade) * 8.0  # c / (binade / 8), exact
    lower = steps.to(tl.int32)
    return lower + (u < steps - lower.to(tl.float32)).to(tl.int32) + (binade >> 20) - 968


@triton.jit
def e4m3_value(bits):
    """E4M3 bits in int32 -> f32: seven bits at the foot of the float32 exponent field, times the difference of the two biases."""
    return from_bits((bits & 127) << 20) * 1.329227995784916e36


# ---------------------------------------------------------------- sums over a group


@triton.jit
def _halve(x, N: tl.constexpr):
    """[..., N] -> [..., N/2], the second half added to the first. A sum of two has one result, whatever order tl.sum works in."""
    rows: tl.constexpr = x.numel // N
    return tl.sum(x.reshape(rows, 2, N // 2), 1)


@triton.jit
def group_sum(even, odd):
    """[..., 8] even and odd elements of groups of 16 -> [rows], in the reference's order: x0 + x8, x4 + x12, ... always halves."""
    even = _halve(_halve(_halve(even, 8), 4), 2)
    odd = _halve(_halve(_halve(odd, 8), 4), 2)
    return (even + odd).reshape(even.numel)
