"""The randomized Hadamard transform of 128 elements as one tensor-core product with a matrix of +1 and -1.

The products are exact and the tensor cores add in float32, so only the order of the additions differs from the reference's butterflies.
A float32 operand is cut into three bfloat16 numbers of eight significant bits each, which together are exactly it (down to 2^-110; below,
bfloat16 ends first): three products instead of one, where a float32 product without TF32 would run outside the tensor cores and spill.
The packed quantizers make the matrix in registers, about six integer instructions an entry, once for all tiles of a program. Those of
values read it from memory, where one launch a step has written the matrices of all rotations.

PERMUTED: on Hopper a thread holds the accumulator columns 8j + 2c and 8j + 2c + 1 for one c and all j. The columns of the matrix are
therefore permuted so that they are the logical columns 32c + 2j and 32c + 2j + 1: each thread then owns whole groups of 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.triton_kernels.launch import launch, on_device_of
from quartet_compile.kernels.triton_kernels.numbers import INTERPRET, bits_of, from_bits, to_float32
from quartet_compile.kernels.triton_kernels.random import rotation_sign_bits, seed_of_rank


@triton.jit
def signed_hadamard(seed, DTYPE: tl.constexpr, PERMUTED: tl.constexpr):
    """[128, 128] such that x @ it is ``H (signs * x)``: entry (i, n) is the sign of i times (-1)^popcount(i & n).

    In the dtype of x, bfloat16 for float32.
    """
    i = tl.arange(0, 128)
    n = tl.arange(0, 128)
    if PERMUTED:
        n = ((n >> 1) & 3) * 32 + (n >> 3) * 2 + (n & 1)
    common = i[:, None] & n[None, :]
    common ^= common >> 4
    parity = 0x6996 >> (common & 15)  # bit k of 0x6996 is the parity of k
    odd = (parity ^ rotation_sign_bits(seed, i)[:, None]) & 1
    ENTRY: tl.constexpr = tl.float16 if DTYPE is tl.float16 else tl.bfloat16
    ONE: tl.constexpr = 0x3C00 if DTYPE is tl.float16 else 0x3F80
    return (ONE | (odd << 15)).to(tl.int16).to(ENTRY, bitcast=True)


@triton.jit(do_not_specialize=["rank"])
def rotations_kernel(seeds, rank, out):
    """The matrix [128, 128] of one rotation a program, columns permuted."""
    i = tl.arange(0, 128)
    matrix = signed_hadamard(seed_of_rank(seeds, tl.program_id(0), rank), tl.bfloat16, True)
    tl.store(out + tl.program_id(0).to(tl.int64) * 16384 + i[:, None] * 128 + i[None, :], matrix)


def rotations(seeds: Tensor, rank: int) -> Tensor:
    """The matrices of the rotations of int64 seeds [n]: bfloat16 [n, 128, 128], for kernels whose programs are too short to make them."""
    out = torch.empty((seeds.shape[0], 128, 128), dtype=torch.bfloat16, device=seeds.device)
    if seeds.numel():
        with on_device_of(seeds):
            launch(rotations_kernel, seeds.shape[0], seeds, rank, out, num_warps=8)
    return out


@triton.jit
def load_rotation(rotations, index, DTYPE: tl.constexpr):
    """Matrix `index`, +1 and -1, in the dtype in which x of dtype DTYPE is multiplied."""
    i = tl.arange(0, 128)
    matrix = tl.load(rotations + index * 16384 + i[:, None] * 128 + i[None, :])
    return to_float32(matrix).to(tl.float16) if DTYPE is tl.float16 else matrix


@triton.jit
def _dot(x, hadamard, total=None):
    return tl.dot(to_float32(x), to_float32(hadamard), total) if INTERPRET else tl.dot(x, hadamard, total)


@triton.jit
def _upper_half(x):
    """The upper 16 bits of a float32: its first eight significant bits. Not the nearest bfloat16, which may be infinite."""
    return from_bits(bits_of(x) & -65536)


@triton.jit
def rotate(x, hadamard, PERMUTED: tl.constexpr):
    """x [rows, 128] -> float32 [rows, 8, 16], the rotated groups."""
    rows: tl.constexpr = x.shape[0]
    if x.dtype == tl.float32:
        high = _upper_half(x)
        middle = _upper_half(x - high)
        low = x - high - middle
        y = _dot(low.to(tl.bfloat16), hadamard)
        y = _dot(middle.to(tl.bfloat16), hadamard, y)
        y = _dot(high.to(tl.bfloat16), hadamard, y)
    else:
        y = _dot(x, hadamard)
    if PERMUTED:
        y = y.reshape(rows, 16, 4, 2).permute(0, 2, 1, 3)
    return y.reshape(rows, 8, 16)
