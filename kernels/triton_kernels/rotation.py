"""The randomized Hadamard transform of 128 elements: two tensor-core products with matrices of +1 and -1, a sum and a difference.

    [f, b] H128 = [f H64 + b H64, f H64 - b H64]

A matrix holds the signs of its 64 elements too. The products are exact and the tensor cores add in float32, so only the order of the
additions differs from the reference's butterflies. Products with all of H128 take twice the tensor cores and the shared memory: that is
done on sm_100 only, where both are plenty and the additions are not.

A float32 operand is cut into three bfloat16 numbers of eight significant bits each, which together are exactly it (down to 2^-110; below,
bfloat16 ends first): three products instead of one, where a float32 product without TF32 would run outside the tensor cores and spill.
The packed quantizers make the matrices in registers, about five integer instructions an entry, once for all tiles of a program. Those of
values read them from memory, where one launch a step has written the matrices of all rotations.

PERMUTED: everywhere else a thread holds the accumulator columns 8j + 2c and 8j + 2c + 1 for one c and all j. The columns of a matrix are
therefore permuted so that they are the logical columns 16c + 2j and 16c + 2j + 1: each thread then owns group c of both halves.
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
    """The matrices of a rotation, in the dtype of x, bfloat16 for float32. PERMUTED: F and B [64, 64]; else [F, F] and [B, -B] [64, 128].

    Entry (i, n) of F is (-1)^popcount(i & n) times the sign of i, that of B times the sign of 64 + i.
    """
    i = tl.arange(0, 64)
    n = tl.arange(0, 64)
    if PERMUTED:
        n = ((n >> 1) & 3) * 16 + (n >> 3) * 2 + (n & 1)
    common = i[:, None] & n[None, :]
    common ^= common >> 4
    parity = 0x6996 >> (common & 15)  # bit k of 0x6996 is the parity of k
    front = parity ^ rotation_sign_bits(seed, i)[:, None]
    back = parity ^ rotation_sign_bits(seed, 64 + i)[:, None]
    if not PERMUTED:
        front = tl.join(front, front).permute(0, 2, 1).reshape(64, 128)
        back = tl.join(back, ~back).permute(0, 2, 1).reshape(64, 128)
    return _plus_or_minus_one(front, DTYPE), _plus_or_minus_one(back, DTYPE)


@triton.jit
def _plus_or_minus_one(negative, DTYPE: tl.constexpr):
    """Minus one where bit 0 is set."""
    ENTRY: tl.constexpr = tl.float16 if DTYPE is tl.float16 else tl.bfloat16
    ONE: tl.constexpr = 0x3C00 if DTYPE is tl.float16 else 0x3F80
    return (ONE | ((negative & 1) << 15)).to(tl.int16).to(ENTRY, bitcast=True)


@triton.jit(do_not_specialize=["rank"])
def rotations_kernel(seeds, rank, out):
    """The matrices [2, 64, 64] of one rotation a program, columns permuted."""
    i = tl.arange(0, 64)
    front, back = signed_hadamard(seed_of_rank(seeds, tl.program_id(0), rank), tl.bfloat16, True)
    at = out + tl.program_id(0).to(tl.int64) * 8192 + i[:, None] * 64 + i[None, :]
    tl.store(at, front)
    tl.store(at + 4096, back)


def rotations(seeds: Tensor, rank: int) -> Tensor:
    """The matrices of the rotations of int64 seeds [n]: bfloat16 [n, 2, 64, 64], for kernels whose programs are too short to make them."""
    out = torch.empty((seeds.shape[0], 2, 64, 64), dtype=torch.bfloat16, device=seeds.device)
    if seeds.numel():
        with on_device_of(seeds):
            launch(rotations_kernel, seeds.shape[0], seeds, rank, out, num_warps=4)
    return out


@triton.jit
def load_rotation(rotations, index, DTYPE: tl.constexpr):
    """The matrices of rotation `index`, in the dtype in which x of dtype DTYPE is multiplied."""
    i = tl.arange(0, 64)
    at = rotations + index * 8192 + i[:, None] * 64 + i[None, :]
    front, back = tl.load(at), tl.load(at + 4096)
    if DTYPE is tl.float16:
        front, back = to_float32(front).to(tl.float16), to_float32(back).to(tl.float16)
    return front, back


@triton.jit
def _dot(x, hadamard, total=None):
    return tl.dot(to_float32(x), to_float32(hadamard), total) if INTERPRET else tl.dot(x, hadamard, total)


@triton.jit
def _upper_half(x):
    """The upper 16 bits of a float32: its first eight significant bits. Not the nearest bfloat16, which may be infinite."""
    return from_bits(bits_of(x) & -65536)


@triton.jit
def _product(x, matrix, total=None):
    """total + x [rows, 64] times a matrix, float32."""
    if x.dtype == tl.float32:
        high = _upper_half(x)
        middle = _upper_half(x - high)
        low = x - high - middle
        y = _dot(low.to(tl.bfloat16), matrix, total)
        y = _dot(middle.to(tl.bfloat16), matrix, y)
        y = _dot(high.to(tl.bfloat16), matrix, y)
    else:
        y = _dot(x, matrix, total)
    return y


@triton.jit
def rotate(halves, rotation, PERMUTED: tl.constexpr):
    """The halves of x [rows, 128], each [rows, 64], and the matrices of a rotation -> float32 [rows, 8, 16], the rotated groups."""
    rows: tl.constexpr = halves[0].shape[0]
    y = _product(halves[0], rotation[0])
    if PERMUTED:
        z = _product(halves[1], rotation[1])
        y = tl.join(y + z, y - z).reshape(rows, 8, 4, 2, 2).permute(0, 4, 2, 1, 3)
    else:
        y = _product(halves[1], rotation[1], y)
    return y.reshape(rows, 8, 16)
