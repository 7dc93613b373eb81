"""One candidate of the deterministic rules on GPUs with FP4 conversions (sm_100 on), for the first pass of `forward` over bfloat16.

Elements are pairs of float32 numbers, which sm_100 multiplies and adds two at a time. A product of 16-bit numbers with a float32 sum
(`fma.rn.f32.bf16`) takes them out of their words, and codes turned back into numbers out of theirs. PTX ISA 8.6: "cvt" to and from e2m1x2,
"mul", "add" and "fma" of f32x2, mixed-precision "fma". Seven instructions an element for both candidates, 11 on sm_120, whose pairs are
two instructions.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.triton_kernels.numbers import INTERPRET, e2m1, from_bits, reciprocal
from quartet_compile.kernels.triton_kernels.words import high, low


def _elements_assembly() -> str:
    """$0 to $15: elements; $16 to $23: words; $24: the unit, f32; $25: what is added."""
    lines = [".reg .b16 unit, even, odd;", "cvt.rn.bf16.f32 unit, $24;"]
    for j in range(8):
        lines.append(f"mov.b32 {{even, odd}}, ${16 + j};")
        lines.append(f"fma.rn.f32.bf16 ${2 * j}, even, unit, $25;  fma.rn.f32.bf16 ${2 * j + 1}, odd, unit, $25;")
    return "{ " + "\n".join(lines) + " }"


def _candidate_assembly() -> str:
    """$0, $1: codes of elements 0 to 7 and 8 to 15; $2: the error; $3 to $18: elements; $19: h; $20: minus the scale."""
    lines = [
        ".reg .b64 v, h, y, d<8>;  .reg .b32 q;  .reg .b16 s, even, odd;  .reg .b8 c<8>;  .reg .f32 a, b;",
        "mov.b64 h, {$19, $19};  cvt.rn.f16x2.f32 q, $20, $20;  mov.b32 {s, even}, q;",
    ]
    for j in range(8):
        v = f"${2 * j + 3}", f"${2 * j + 4}"
        lines += [
            f"mov.b64 v, {{{v[0]}, {v[1]}}};  fma.rn.f32x2 y, v, h, v;  mov.b64 {{a, b}}, y;",
            f"cvt.rn.satfinite.e2m1x2.f32 c{j}, b, a;  cvt.rn.f16x2.e2m1x2 q, c{j};  mov.b32 {{even, odd}}, q;",
            f"fma.rn.f32.f16 a, even, s, {v[0]};  fma.rn.f32.f16 b, odd, s, {v[1]};  mov.b64 d{j}, {{a, b}};",
        ]
    # The order of `reference._group_sum`: halves of the group, then halves of what is left.
    for j in range(4):
        lines.append(f"mul.rn.f32x2 d{j + 4}, d{j + 4}, d{j + 4};  fma.rn.f32x2 d{j}, d{j}, d{j}, d{j + 4};")
    lines.append("add.rn.f32x2 d0, d0, d2;  add.rn.f32x2 d1, d1, d3;  add.rn.f32x2 d0, d0, d1;  mov.b64 {a, b}, d0;  add.rn.f32 $2, a, b;")
    lines.append("mov.b32 $0, {c0, c1, c2, c3};  mov.b32 $1, {c4, c5, c6, c7};")
    return "{ " + "\n".join(lines) + " }"


_ELEMENTS = tl.constexpr(_elements_assembly())
_ELEMENTS_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 16 + ["r"] * 8 + ["f"] * 2))
_CANDIDATE = tl.constexpr(_candidate_assembly())
_CANDIDATE_CONSTRAINTS = tl.constexpr(",".join(["=r", "=r", "=f"] + ["f"] * 18))
_SIXTEEN = tl.constexpr((tl.float32,) * 16)
_RESULT = tl.constexpr((tl.int32, tl.int32, tl.float32))


@triton.jit
def scaled_elements(w, unit, present):
    """Eight words [n] -> their sixteen elements [n] times a power of two. Zeros keep their sign, unless nothing is `present`."""
    zero = from_bits(tl.where(present, -2147483648, 0))
    if INTERPRET:
        v = ()
        for j in tl.static_range(8):
            v = v + (low(w[j]) * unit + zero, high(w[j]) * unit + zero)  # noqa: RUF005
    else:
        v = tl.inline_asm_elementwise(
            _ELEMENTS, _ELEMENTS_CONSTRAINTS, w + (unit, zero), dtype=_SIXTEEN, is_pure=True, pack=1  # noqa: RUF005
        )
    return v


@triton.jit
def _stretch(minus_s):
    """1 / s - 1 to the last bit, for scales s of four bits in [0.34375, 1], whichever neighbour of 1 / s the GPU has for a reciprocal."""
    r = reciprocal(-minus_s)
    h = (1.0 + minus_s) * r
    return tl.fma(tl.fma(minus_s, h, 1.0 + minus_s), r, h)


@triton.jit
def native_candidate(v, minus_s):
    """Sixteen elements [n] below 4, minus a scale [n] of four bits in [0.34375, 1] -> two words of eight codes, and the squared error.

    ``v + v * h``, h = `_stretch` of s, falls on the same side of each rounding boundary as v / s: v has eight bits and a boundary times s
    seven, so they are equal or 2^-8 apart. Where they are equal, the sum is the boundary b: h is off by less than its last bit's half, so
    v * h = b * s * h by less than 2^-25 b, which is nearer than any other number. h is not negative: zeros keep their sign.
    """
    h = _stretch(minus_s)
    if INTERPRET:
        front = tl.zeros(minus_s.shape, tl.int32)
        back = tl.zeros(minus_s.shape, tl.int32)
        d = ()
        for j in tl.static_range(16):
            code, q = e2m1(tl.fma(v[j], h, v[j]))
            d = d + (v[j] + q * minus_s,)  # noqa: RUF005
            if j < 8:
                front |= code << (4 * j)
            else:
                back |= code << (4 * j - 32)
        e0, e1 = _squares(d, 0), _squares(d, 1)
        e2, e3 = _squares(d, 2), _squares(d, 3)
        e4, e5 = _squares(d, 4), _squares(d, 5)
        e6, e7 = _squares(d, 6), _squares(d, 7)
        error = ((e0 + e4) + (e2 + e6)) + ((e1 + e5) + (e3 + e7))
    else:
        front, back, error = tl.inline_asm_elementwise(
            _CANDIDATE, _CANDIDATE_CONSTRAINTS, v + (h, minus_s), dtype=_RESULT, is_pure=True, pack=1  # noqa: RUF005
        )
    return front, back, error


@triton.jit
def _squares(d, j: tl.constexpr):
    """Squares have 16 bits: the sum is rounded once, fused or not."""
    return d[j] * d[j] + d[j + 8] * d[j + 8]
