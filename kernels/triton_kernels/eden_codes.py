"""MS-EDEN to packed codes and scales, in one pass over the operand: what the rotated operands of a product are on FP4 tensor cores.

`ms_eden` rounds a group's scale t to ``E4M3_stochastic(t / g)`` once g, a power of two, is known. As long as t / g is no subnormal E4M3
number, g moves the exponent alone: `fast_codes` rounds codes and the mantissa of t in the pass that reads the data. Of each scale,
`store_provisional` writes a byte, with the exponent relative to the largest in a row of a tile, eight groups, and a byte with that exponent
for each row. The second launch, which knows g, has `align_blocks` read these 1.125 bytes a group and write E4M3. With `exact_codes` it
makes those blocks again, by the reference's steps, that hold a subnormal scale or numbers near the ends of float32, and all of them where
a number is not finite.

The fast path multiplies by reciprocals where `ms_eden` divides, which moves codes and scales at near-ties only, as often as the order of
the rotation's additions does.
"""

import triton
import triton.language as tl

from quartet_compile.kernels.format import ceil_div
from quartet_compile.kernels.triton_kernels.four_bytes import nonzero_bytes
from quartet_compile.kernels.triton_kernels.ms_eden import (
    INFINITY_BITS,
    SMALLEST_TENSOR_SCALE,
    exponent_limit,
    fast_scale,
    largest_peak,
    least_exponent,
    peaks_of,
    round_rotated,
    scale_of,
)
from quartet_compile.kernels.triton_kernels.numbers import (
    INTERPRET,
    bits_of,
    e2m1_nearest,
    e4m3_stochastic,
)
from quartet_compile.kernels.triton_kernels.random import uniforms_of_groups
from quartet_compile.kernels.triton_kernels.words import SIGNS, pack_codes, upper_halves

_SMALLEST_SCALE = tl.constexpr(9)
"""E4M3 byte behind that of 2^-6, the smallest normal number, to which a subnormal one may have been rounded up."""

CHUNK_ROWS = tl.constexpr(16)
"""Rows of a tile that are made again at a time: as few as tensor cores take, so that this rare path does not claim the registers."""


# ---------------------------------------------------------------- sixteen elements of a thread


def _reversed_bits(i: int, bits: int) -> int:
    return int(f"{i:0{bits}b}"[::-1], 2)


def _round_assembly() -> str:
    """$0, $1: codes of elements 0 to 7 and 8 to 15; $2: sum of v v; $3: sum of v q; $4 to $19: y, in the order of `_split`; $20: v / y."""
    lines = [
        ".reg .b64 factor, v, p, vv, vq;  .reg .b32 q;  .reg .b16 even, odd;  .reg .b8 c<8>;  .reg .f32 a, b;",
        "mov.b64 factor, {$20, $20};  mov.b64 vv, 0;  mov.b64 vq, 0;",
    ]
    for j in range(8):
        x, y = (f"${4 + _reversed_bits(2 * j + k, 4)}" for k in range(2))
        lines += [
            f"mov.b64 v, {{{x}, {y}}};  mul.rn.f32x2 v, v, factor;  mov.b64 {{a, b}}, v;",
            f"cvt.rn.satfinite.e2m1x2.f32 c{j}, b, a;  cvt.rn.f16x2.e2m1x2 q, c{j};  mov.b32 {{even, odd}}, q;",
            "cvt.f32.f16 a, even;  cvt.f32.f16 b, odd;  mov.b64 p, {a, b};",
            "fma.rn.f32x2 vv, v, v, vv;  fma.rn.f32x2 vq, v, p, vq;",
        ]
    lines.append("mov.b64 {a, b}, vv;  add.rn.f32 $2, a, b;  mov.b64 {a, b}, vq;  add.rn.f32 $3, a, b;")
    lines.append("mov.b32 $0, {c0, c1, c2, c3};  mov.b32 $1, {c4, c5, c6, c7};")
    return "{ " + "\n".join(lines) + " }"


_ROUND = tl.constexpr(_round_assembly())
_ROUND_CONSTRAINTS = tl.constexpr(",".join(["=r", "=r", "=f", "=f"] + ["f"] * 17))
_ROUND_RESULT = tl.constexpr((tl.int32, tl.int32, tl.float32, tl.float32))


@triton.jit
def _split(x, LEVELS: tl.constexpr):
    """[n, 8, 2^LEVELS] -> that many [n, 8], in the order of the reversed bits of their index."""
    parts = (x,)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(2**level):
            part = parts[i].reshape(x.shape[0] * 8, 2 ** (LEVELS - 1 - level), 2)
            a, b = tl.split(part)
            halves = halves + (a, b)  # noqa: RUF005
        parts = halves
    whole = ()
    for i in tl.static_range(2**LEVELS):
        whole = whole + (parts[i].reshape(x.shape[0], 8),)  # noqa: RUF005
    return whole


@triton.jit
def _round(y, factor, NATIVE: tl.constexpr):
    """v = y [n, 8, 16] times factor [n, 8], below 7, rounded to q -> codes, and sums over groups of v v and of v q.

    The codes of the first and of the last eight elements, int32 [n, 8] each.
    """
    n: tl.constexpr = y.shape[0]
    if NATIVE and not INTERPRET:
        front, back, numerator, denominator = tl.inline_asm_elementwise(
            _ROUND, _ROUND_CONSTRAINTS, _split(y, 4) + (factor,), dtype=_ROUND_RESULT, is_pure=True, pack=1  # noqa: RUF005
        )  # fmt: skip
    else:
        v = y * factor[:, :, None]
        q = e2m1_nearest(v)
        numerator = tl.sum(v * v, 2)
        denominator = tl.sum(v * q, 2)
        even, odd = tl.split(v.reshape(n, 8, 8, 2))
        even_q, odd_q = tl.split(q.reshape(n, 8, 8, 2))
        # q has two significant bits: its upper half is all of it. Zeros take the sign of v.
        w = _split((upper_halves(even_q, odd_q) & ~SIGNS) | (upper_halves(even, odd) & SIGNS), 3)
        front = pack_codes(w[0], w[4], w[2], w[6])
        back = pack_codes(w[1], w[5], w[3], w[7])
    return front, back, numerator, denominator


@triton.jit
def _words_of_bytes(byte):
    """Bytes int32 [n, 8, 8] -> the first four and the last four of each group, int32 [n, 8] each."""
    shift = (tl.arange(0, 4) * 8)[None, None, None, :]
    return tl.split(tl.sum(byte.reshape(byte.shape[0], 8, 2, 4) << shift, 3))


@triton.jit
def fast_codes(y, seed, first_row, i, block, STREAM: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr):
    """Rotated groups y [n, 8, 16] of rows first_row + i [n] -> their codes, eight to an int32, twice; bits of scales; t as bits: [n, 8].

    t twice: the second time zeros are infinite. The groups are y * UNIT, a power of two.
    """
    peak, safe, factor = peaks_of(y)
    front, back, numerator, denominator = _round(y, factor, NATIVE)
    t_bits, s_bits = fast_scale(peak, safe, numerator, denominator, seed, first_row, i, block, STREAM, UNIT)
    some = peak > 0  # whatever sign the tensor cores give to a sum of zeros
    least = tl.where(some, t_bits, INFINITY_BITS)
    return tl.where(some, front, 0), tl.where(some, back, 0), tl.where(some, s_bits, 0), t_bits & 0x7FFFFFFF, least


@triton.jit
def exact_codes(y, peak_bits, seed, first_row, i, block, STREAM: tl.constexpr, NATIVE: tl.constexpr):
    """As `fast_codes`, once the bits of the largest t of all are known: codes, and E4M3 bytes int32 [n, 8], by the reference's steps."""
    n: tl.constexpr = y.shape[0]
    g, finite = scale_of(peak_bits)
    byte, t = round_rotated(y, NATIVE)
    e4m3 = e4m3_stochastic(tl.where(finite, t * tl.div_rn(1.0, g), 0.0), uniforms_of_groups(seed, first_row, i, block, STREAM))
    front, back = _words_of_bytes(byte.reshape(n, 8, 8))
    return tl.where(finite, front, 0), tl.where(finite, back, 0), tl.where(finite, e4m3, 0)


# ---------------------------------------------------------------- storing


@triton.jit
def _store_group(codes, scales, present, front, back, byte):
    """A group of a thread: 8 bytes of codes, one of scales, which the L2 cache shall keep for the second launch.

    tl.store would pass them through shared memory first.
    """
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred present;  .reg .b64 keep;
        setp.ne.b32 present, $3, 0;
        createpolicy.fractional.L2::evict_last.b64 keep, 1.0;
        @present st.global.v2.b32 [$1], {$4, $5};
        @present st.global.L1::evict_last.L2::cache_hint.u8 [$2], $6, keep;
        mov.b32 $0, 0;
        }
        """,
        "=r,l,l,r,r,r,r",
        [codes, scales, present, front, back, byte],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_groups(front, back, bytes_, codes, scales, first_row, i, rows, block, blocks):
    """Codes and scale bytes, int32 [n, 8], of rows first_row + i [n] and of `block`, 128 columns -> codes int32, scales u8."""
    n: tl.constexpr = front.shape[0]
    at = (first_row * tl.cast(blocks, tl.int64) + block) + i.to(tl.int64)[:, None] * blocks
    present = (first_row + i < rows)[:, None]
    group = tl.arange(0, 8)[None, :]
    if INTERPRET:
        tl.store(codes + at * 16 + group * 2, front, mask=present)
        tl.store(codes + at * 16 + group * 2 + 1, back, mask=present)
        tl.store(scales + at * 8 + group, bytes_.to(tl.uint8), mask=present)
    else:
        _store_group(
            (codes + at * 16 + group * 2).to(tl.int64), (scales + at * 8 + group).to(tl.int64), present.broadcast_to(n, 8).to(tl.int32),
            front, back, bytes_,
        )  # fmt: skip


@triton.jit
def store_provisional(front, back, s_bits, codes, scales, exponents, tile, first_row, i, rows, block, blocks):
    """As `store_groups`, from the bits of rounded scales: bytes 1 to 255, 1 if a scale is 31 binades below the largest of its row, 0 for 0.

    exponents: u8 [tiles, n], that of each row's largest scale.
    """
    n: tl.constexpr = front.shape[0]
    largest = tl.max(s_bits, 1) >> 23
    bytes_ = tl.where(s_bits != 0, tl.maximum((s_bits >> 20) - (largest * 8 - 248)[:, None], 1), 0)
    store_groups(front, back, bytes_, codes, scales, first_row, i, rows, block, blocks)
    tl.store(exponents + tile * n + tl.arange(0, n), largest.to(tl.uint8), eviction_policy="evict_last")


@triton.jit
def _words_of_scales(bytes_):
    """Bytes in int32 [n, 8] -> int32 [n, 2], the first in the lowest bits."""
    n: tl.constexpr = bytes_.shape[0]
    return tl.sum(bytes_.reshape(n, 2, 4) << (tl.arange(0, 4) * 8)[None, None, :], 2)


@triton.jit
def store_swizzled(bytes_, swizzled, row, block, blocks, present):
    """Scale bytes int32 [n, 8] of rows `row` and blocks `block` [n] in the order of tensor cores (`format.swizzle_scales`), by words.

    swizzled: int32. Rows behind the end of the matrix are left as they are: they meet no element of a product that is kept.
    """
    words = _words_of_scales(bytes_)
    first = ((row >> 7).to(tl.int64) * blocks + block) * 256 + ((row & 31) * 4 + ((row >> 5) & 3))
    tl.store(swizzled + first[:, None] + tl.arange(0, 2)[None, :] * 128, words, mask=present[:, None])


# ---------------------------------------------------------------- aligning

ALIGNED_BLOCKS = tl.constexpr(16)
"""Blocks of 128 columns whose scales, of 128 rows, a program of a second launch aligns: 128 bytes of each row, a cache line."""


@triton.jit
def align_blocks(
    scales, swizzled, exponents, of_strip, of_block, order, peaks, programs, strip, first_block, rows, blocks, SWIZZLED: tl.constexpr
):  # fmt: skip
    """Provisional bytes of 128 rows, the strip'th, and of ALIGNED_BLOCKS blocks -> E4M3, in place or SWIZZLED.

    The exponent of row i [128] in a block is at strip * of_strip + block * of_block + order. peaks: the largest and, behind them, the least
    t of each program. Returns a mask of the blocks to be made again, left as they are, and the bits of the largest t of all.
    """
    i = tl.arange(0, 128)
    b = tl.arange(0, ALIGNED_BLOCKS)
    block = first_block + b
    present = (strip * 128 + i < rows)[:, None] & (block < blocks)[None, :]
    of_blocks = exponents + strip * tl.cast(of_strip, tl.int64) + block.to(tl.int64)[None, :] * of_block
    exponent = tl.load(of_blocks + order[:, None], mask=present, other=0).to(tl.int32)
    start = scales + (strip * tl.cast(blocks, tl.int64) * 128 + first_block) * 8
    row_of_words = start.to(tl.pointer_type(tl.int32)) + i[:, None] * (blocks * 2)
    at = row_of_words + tl.arange(0, 2 * ALIGNED_BLOCKS)[None, :]
    mask = present[:, :, None].broadcast_to(128, ALIGNED_BLOCKS, 2).reshape(128, 2 * ALIGNED_BLOCKS)
    word = tl.load(at, mask=mask, other=0)
    peak_bits, least = largest_peak(peaks, programs), least_exponent(peaks + programs, programs)
    g, _ = scale_of(peak_bits)
    added = exponent * 8 - 248 - ((bits_of(g) >> 23) - 7) * 8
    marked = 0
    if least >= exponent_limit(peak_bits, 1.0):
        # Every scale is a normal number: the same is added to all four bytes of a word but zeros, and nothing carries.
        word += nonzero_bytes(word) * added[:, :, None].broadcast_to(128, ALIGNED_BLOCKS, 2).reshape(128, 2 * ALIGNED_BLOCKS)
        if SWIZZLED:
            _store_swizzled_strip(word, swizzled, strip, block, blocks, present)
        else:
            tl.store(at, word, mask=mask)
    else:
        again = _align_any(start, swizzled, added, present, strip, block, blocks, peak_bits, SWIZZLED)
        marked = tl.sum(again << b, 0)
    return marked, peak_bits


@triton.jit
def _align_any(start, swizzled, added, present, strip, block, blocks, peak_bits, SWIZZLED: tl.constexpr):
    """A byte at a time. Returns which blocks have to be made again, [n] of 0 and 1."""
    n: tl.constexpr = block.shape[0]
    # Bytes of a row are one dimension, so that neighbouring threads have neighbouring ones.
    at = start + tl.arange(0, 128)[:, None] * (blocks * 8) + tl.arange(0, 8 * n)[None, :]
    mask = present[:, :, None].broadcast_to(128, n, 8).reshape(128, 8 * n)
    provisional = tl.load(at, mask=mask, other=0).to(tl.int32).reshape(128, n, 8)
    byte = tl.where(provisional == 0, 0, provisional + added[:, :, None])
    small = ((provisional != 0) & (byte < _SMALLEST_SCALE)).to(tl.int32)
    g, finite = scale_of(peak_bits)
    everything = ((g < SMALLEST_TENSOR_SCALE) | (not finite)).to(tl.int32)
    again = tl.where(block < blocks, tl.max(tl.max(small, 2), 0) | everything, 0)
    done = present & (again == 0)[None, :]
    if SWIZZLED:
        words = _words_of_scales(byte.reshape(128 * n, 8)).reshape(128, 2 * n)
        _store_swizzled_strip(words, swizzled, strip, block, blocks, done)
    else:
        mask = done[:, :, None].broadcast_to(128, n, 8).reshape(128, 8 * n)
        tl.store(at, byte.to(tl.uint8).reshape(128, 8 * n), mask=mask)
    return again


def aligning_programs(rows: int, columns: int) -> int:
    """Programs of a second launch for an operand [rows, columns]."""
    return ceil_div(rows, 128) * ceil_div(ceil_div(columns, 128), ALIGNED_BLOCKS.value)


@triton.jit
def _store_swizzled_strip(words, swizzled, strip, block, blocks, present):
    """Words int32 [128, 2 n] of the scales of 128 rows and n blocks, as `store_swizzled` has them: a block is a kilobyte in a row."""
    n: tl.constexpr = block.shape[0]
    at = (strip * tl.cast(blocks, tl.int64) + block)[:, None, None, None] * 256 + tl.arange(0, 256).reshape(1, 2, 32, 4)
    mask = present.reshape(4, 32, n).permute(2, 1, 0).reshape(n, 1, 32, 4).broadcast_to(n, 2, 32, 4)
    tl.store(swizzled + at, words.reshape(4, 32, n, 2).permute(2, 3, 1, 0), mask=mask)


@triton.jit
def store_tensor_scale(peak_bits, incoming, out):
    """The tensor scale times the `incoming` one, NaN where a number is not finite: by the first program."""
    g, finite = scale_of(peak_bits)
    if tl.program_id(0) == 0:
        tl.store(out, tl.where(finite, g, float("nan")) * incoming)
