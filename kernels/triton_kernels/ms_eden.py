"""MS-EDEN after the rotation: a device function that rounds a tile in registers, and the kernel that aligns the scales afterwards.

Codes do not depend on the tensor scale, so the data is read once: the first kernel (`backward`) writes codes and float32 scales t, and
keeps the largest t; `align_scales_kernel` then reads 4 bytes a group, rounds stochastically and writes 1. Both follow the reference
operation by operation; a difference can only come from the order in which the rotation's additions were done.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import E2M1_MAX
from quartet_compile.kernels.reference import MS_EDEN_OVERRIDE, SCALE_CEILING
from quartet_compile.kernels.triton_kernels.launch import EXACT
from quartet_compile.kernels.triton_kernels.numbers import e2m1_pair, e4m3_stochastic, group_sum, magnitude_bits, tensor_scale
from quartet_compile.kernels.triton_kernels.random import seed_of_rank, uniform

_TOP = tl.constexpr(E2M1_MAX / MS_EDEN_OVERRIDE)
_CEILING = tl.constexpr(SCALE_CEILING["ms_eden"])


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def round_rotated(y, NATIVE: tl.constexpr):
    """y float32 [rows, 8, 16] -> bytes int32 [rows, 64], t float32 [rows, 8]. Where y is not finite, t is not either."""
    rows: tl.constexpr = y.shape[0]
    peak = tl.max(tl.abs(y), 2)
    m = tl.div_rn(peak, _TOP)
    v = tl.div_rn(y, _or_one(m)[:, :, None])
    even, odd = tl.split(v.reshape(rows, 8, 8, 2))
    byte, even_value, odd_value = e2m1_pair(even, odd, NATIVE)
    numerator = group_sum(even * even, odd * odd).reshape(rows, 8)
    denominator = group_sum(even * even_value, odd * odd_value).reshape(rows, 8)
    t = m * tl.where(denominator == 0, 1.0, tl.div_rn(numerator, _or_one(denominator)))
    byte = tl.where((peak > 0)[:, :, None], byte, 0)  # whatever sign the tensor cores give to a sum of zeros
    return byte.reshape(rows, 64), t


@triton.jit
def store_rounded(byte, t, row, block, codes, provisional, peak_bits, rows, blocks):
    """Store a tile of `round_rotated`: row int32 [n] the rows of the output, `block` which 128 columns."""
    n: tl.constexpr = row.shape[0]
    at = (row.to(tl.int64) * blocks + block)[:, None]
    present = (row < rows)[:, None]
    tl.store(codes + at * 64 + tl.arange(0, 64)[None, :], byte.to(tl.uint8), mask=present)
    tl.store(provisional + at * 8 + tl.arange(0, 8)[None, :], t, mask=present)
    # One flat maximum: two in a row crash Triton 3.6 on sm_100 when their operand comes from the tensor cores.
    tl.atomic_max(peak_bits, tl.max(magnitude_bits(t).reshape(n * 8), 0), sem="relaxed")


@triton.jit(do_not_specialize=["index", "rank"])
def align_scales_kernel(
    provisional, peak_bits, incoming, codes, scales, out_tensor_scale, seeds, index, rank, groups, groups_per_row,
    STREAM: tl.constexpr, INCOMING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t -> E4M3 bytes and the tensor scale, times the `incoming` one. If some t is not finite: NaN, and codes and scales 0."""
    g, finite = tensor_scale(tl.load(peak_bits), _CEILING, 1.0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < groups
    if finite:
        c = tl.load(provisional + at, mask=present, other=0.0) * tl.div_rn(1.0, g)
        seed = seed_of_rank(seeds, index, rank)
        u = uniform(seed, (at % groups_per_row).to(tl.int32), (at // groups_per_row).to(tl.int32), STREAM)
        tl.store(scales + at, e4m3_stochastic(c, u).to(tl.uint8), mask=present)
    else:
        nothing = tl.zeros((BLOCK,), tl.uint8)
        tl.store(scales + at, nothing, mask=present)
        for j in range(8):
            tl.store(codes + at * 8 + j, nothing, mask=present)
    if tl.program_id(0) == 0:
        g = tl.where(finite, g, float("nan"))
        if INCOMING:
            g *= tl.load(incoming)
        tl.store(out_tensor_scale, g)


def align_scales(
    provisional: Tensor, peak_bits: Tensor, incoming: Tensor | None, packed: tuple[Tensor, Tensor, Tensor],
    seeds: Tensor, index: int, rank: int, stream: int,
) -> None:  # fmt: skip
    """Fill the scales and the tensor scale of `packed` from the first kernel's results."""
    codes, scales, g = packed
    groups, block = scales.numel(), 512
    align_scales_kernel[(triton.cdiv(groups, block),)](
        provisional, peak_bits, incoming, codes, scales.view(torch.uint8), g, seeds, index, rank, groups, scales.shape[1],
        STREAM=stream, INCOMING=incoming is not None, BLOCK=block, num_warps=4, **EXACT,
    )  # fmt: skip
