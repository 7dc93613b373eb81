"""The deterministic rules, four-over-six and nearest: a pass for the largest magnitude, then one that rounds.

Bytes an element of a bfloat16 matrix: 2 read by the first pass; 2 read and 0.5625 written by the second. A thread of the second pass owns
a whole group of 16, so its maximum and its sums stay in registers. Divisions are IEEE ones: a tie of the quotient decides a code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import E2M1_MAX, GROUP, ceil_to
from quartet_compile.kernels.reference import SCALE_CEILING
from quartet_compile.kernels.triton_kernels.launch import EXACT, empty_packed, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.numbers import e2m1_pair, e4m3_nearest, group_sum, magnitude_bits, tensor_scale, to_float32

_E2M1_MAX = tl.constexpr(E2M1_MAX)


@triton.jit
def largest_magnitude_kernel(x, peak_bits, elements, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """peak_bits[0] = max(peak_bits[0], float32 bits of max |x|), over x as a flat array."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    offsets = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        start = first + step * BLOCK
        values = tl.load(x + start + offsets, mask=start + offsets < elements, other=0.0)
        peak = tl.maximum(peak, magnitude_bits(to_float32(values)))
    tl.atomic_max(peak_bits, tl.max(peak, 0), sem="relaxed")


@triton.jit
def candidate(even, odd, s, NATIVE: tl.constexpr):
    """Elements [n, 8] in units of g, group scales [n] -> their bytes, and the squared error of each group."""
    s = s[:, None]
    byte, even_value, odd_value = e2m1_pair(tl.div_rn(even, s), tl.div_rn(odd, s), NATIVE)
    even_error = even_value * s - even
    odd_error = odd_value * s - odd
    return byte, group_sum(even_error * even_error, odd_error * odd_error)


@triton.jit
def _group_scale(c):
    """E4M3 bits and value nearest to c, 1 instead of 0."""
    bits, value = e4m3_nearest(c)
    return tl.where(bits == 0, 0x38, bits), tl.where(bits == 0, 1.0, value)


@triton.jit
def load_groups(x, first, groups, columns, groups_per_row, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Groups first, first + 1, ... of contiguous x [M, columns] -> f32 [BLOCK, 16], zeros behind the end of a row."""
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, 8)[None, :]
    present = (first + i < groups)[:, None]
    # Two loads of 8 elements, so that with 16-bit inputs the 16 of a group meet in one thread.
    if RAGGED:
        column = (first + i) % groups_per_row * 16
        start = x + ((first + i) // groups_per_row * columns + column)[:, None]
        left = columns - column[:, None]
        front = tl.load(start + j, mask=present & (j < left), other=0.0)
        back = tl.load(start + j + 8, mask=present & (j + 8 < left), other=0.0)
    else:
        start = x + first * 16 + i[:, None] * 16
        front = tl.load(start + j, mask=present, other=0.0)
        back = tl.load(start + j + 8, mask=present, other=0.0)
    return tl.join(to_float32(front), to_float32(back)).permute(0, 2, 1).reshape(BLOCK, 16)


@triton.jit
def round_groups(numbers, g, FOUR: tl.constexpr, NATIVE: tl.constexpr):
    """float32 [n, 16], the tensor scale -> code bytes int32 [n, 8], E4M3 bits and value of each group's scale."""
    n: tl.constexpr = numbers.shape[0]
    peak = tl.max(tl.abs(numbers), 1)
    inverse = tl.div_rn(1.0, g)
    base = tl.div_rn(peak, _E2M1_MAX) * inverse
    even, odd = tl.split((numbers * inverse).reshape(n, 8, 2))
    bits, s = _group_scale(base)
    byte, error = candidate(even, odd, s, NATIVE)
    if FOUR:
        bits4, s4 = _group_scale(base * 1.5)
        byte4, error4 = candidate(even, odd, s4, NATIVE)
        four = error4 < error
        bits = tl.where(four, bits4, bits)
        s = tl.where(four, s4, s)
        byte = tl.where(four[:, None], byte4, byte)
    return tl.where((peak > 0)[:, None], byte, 0), bits, s


@triton.jit
def round_groups_kernel(
    x, peak_bits, codes, scales, out_tensor_scale, groups, columns, groups_per_row,
    CEILING: tl.constexpr, FOUR: tl.constexpr, RAGGED: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Contiguous x [M, columns] -> codes, E4M3 bytes and tensor scale. RAGGED: `columns` is no multiple of 16, so groups end early."""
    g, finite = tensor_scale(tl.load(peak_bits), CEILING, _E2M1_MAX)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, 8)[None, :]
    present = first + i < groups
    byte, bits, _ = round_groups(load_groups(x, first, groups, columns, groups_per_row, RAGGED, BLOCK), g, FOUR, NATIVE)
    tl.store(codes + first * 8 + i[:, None] * 8 + j, tl.where(finite, byte, 0).to(tl.uint8), mask=present[:, None])
    tl.store(scales + first + i, tl.where(finite, bits, 0).to(tl.uint8), mask=present)
    if tl.program_id(0) == 0:
        tl.store(out_tensor_scale, tl.where(finite, g, float("nan")))


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of x [M, K] by "four_over_six" or "nearest"."""
    if rule not in ("four_over_six", "nearest"):
        raise ValueError(f"no deterministic rule {rule!r}")
    x = x.contiguous()
    rows, columns = x.shape
    codes, scales, g = empty_packed(x, rows, ceil_to(columns, GROUP))
    groups = scales.numel()
    if groups == 0:
        return codes, scales, g.fill_(1.0)
    peak_bits = torch.zeros((), dtype=torch.int32, device=x.device)
    block, steps, group_block = 2048, 8, 128
    with on_device_of(x):
        largest_magnitude_kernel[(triton.cdiv(x.numel(), block * steps),)](x, peak_bits, x.numel(), block, steps, num_warps=8)
        round_groups_kernel[(triton.cdiv(groups, group_block),)](
            x, peak_bits, codes, scales.view(torch.uint8), g, groups, columns, scales.shape[1],
            CEILING=SCALE_CEILING[rule], FOUR=rule == "four_over_six", RAGGED=columns % GROUP != 0, NATIVE=target_of(x).native,
            BLOCK=group_block, num_warps=4, **EXACT,
        )  # fmt: skip
    return codes, scales, g
