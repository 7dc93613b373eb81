"""The product of two packed matrices from their packed bytes: on FP4 tensor cores, or decoded to bfloat16 on their way to others.

Blackwell multiplies codes and scales natively: sm_100 and sm_103 (tcgen05.mma), sm_120 (mma.sync), all ``kind::mxf4nvf4``. Elsewhere the
same loops decode ``code * scale``, exact in bfloat16, in registers: the same numbers from a quarter of the bytes, but much more arithmetic.

Two ways to the operands, SWIZZLED. Plain: pointers, masked at every edge; scales [rows, K/16]. Swizzled: tensor descriptors (TMA) and the
scales in the order of `format.swizzle_scales`, in which the tensor cores of sm_100 copy them straight from shared memory.

`accumulate` is what both the kernel here and Inductor's template (`kernels.lowerings`) are made of. The native form has been compiled and
inspected on machines without Blackwell, never run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ceil_div
from quartet_compile.kernels.triton_kernels.launch import EXACT, Target, launch, on_device_of, target_of
from quartet_compile.kernels.triton_kernels.numbers import INTERPRET, e2m1_value, e4m3_value, to_bfloat16, to_float32

BAND = 8
"""Tile rows that programs in flight share operands of in the L2 cache."""


@triton.jit
def tile_start(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """First row and first column of a program's tile of [M, N]: bands of BAND tile rows, column by column."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = program % (BAND * tiles_n)
    return (band * BAND + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _decoded(codes, scales):
    """uint8 [n, K/2], float8_e4m3fn [n, K/16] -> bfloat16 [n, K]: six significant bits, exact."""
    n: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = scales.shape[1]
    byte = codes.to(tl.int32)
    values = tl.join(e2m1_value(byte & 15), e2m1_value(byte >> 4)).reshape(n, groups, 16)
    scale = e4m3_value(scales.to(tl.uint8, bitcast=True).to(tl.int32))
    return (values * scale[:, :, None]).reshape(n, groups * 16).to(tl.bfloat16)


@triton.jit
def _multiply_add(a, a_scale, b, b_scale, accumulator, NATIVE: tl.constexpr):
    """accumulator [M, N] + a [M, K] times b [N, K] transposed, both packed."""
    if NATIVE:
        accumulator = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", accumulator)
    elif INTERPRET:  # whose products of bfloat16 are wrong
        accumulator += tl.dot(_decoded(a, a_scale).to(tl.float32), _decoded(b, b_scale).to(tl.float32).T)
    else:
        accumulator = tl.dot(_decoded(a, a_scale), _decoded(b, b_scale).T, accumulator)
    return accumulator


@triton.jit
def _load_plain(codes, scales, row, rows, groups, start, BLOCK_K: tl.constexpr):
    """Rows `row` [n] of plain codes and scales, BLOCK_K elements from group `start` on; zeros outside."""
    byte = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // 16)
    present = (row < rows)[:, None]
    at = row.to(tl.int64)[:, None] * groups + start
    block = tl.load(codes + at * 8 + byte[None, :], mask=present & (byte < (groups - start) * 8)[None, :], other=0)
    return block, tl.load(scales + at + group[None, :], mask=present & (group < groups - start)[None, :], other=0.0)


@triton.jit
def _describe(codes, scales, rows, groups, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Descriptors of codes [rows, K/2] and of swizzled scales, a tile of which is 512 bytes: [1, rows/128, K/64, 2, 256]."""
    row_bytes = tl.cast(groups, tl.int64) * 8
    tiles = tl.cdiv(groups, 4)
    return (
        tl.make_tensor_descriptor(codes, [rows, groups * 8], [row_bytes, 1], [BLOCK, BLOCK_K // 2]),
        tl.make_tensor_descriptor(
            scales,
            [1, tl.cdiv(rows, 128), tiles, 2, 256],
            [tl.cdiv(rows, 128) * tl.cast(tiles, tl.int64) * 512, tl.cast(tiles, tl.int64) * 512, 512, 256, 1],
            [1, BLOCK // 128, BLOCK_K // 64, 2, 256],
        ),
    )


@triton.jit
def _load_swizzled(codes, scales, first_row, start, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """As `_load_plain`, through the two descriptors; first_row: a multiple of BLOCK, itself one of 128."""
    block = codes.load([first_row, start * 8])
    tiles = scales.load([0, first_row // 128, start // 4, 0, 0])
    tiles = tiles.reshape(BLOCK // 128, BLOCK_K // 64, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return block, tiles.reshape(BLOCK, BLOCK_K // 16)


@triton.jit
def accumulate(
    a_codes, a_scales, b_codes, b_scales, first_m, first_n, M, N, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The float32 sums of a tile [BLOCK_M, BLOCK_N] of a [M, groups*16] times b [N, groups*16] transposed, tensor scales left out."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    groups = tl.cast(groups, tl.int32)
    if SWIZZLED:
        a_codes, a_scales = _describe(a_codes, a_scales, M, groups, BLOCK_M, BLOCK_K)
        b_codes, b_scales = _describe(b_codes, b_scales, N, groups, BLOCK_N, BLOCK_K)
        first_m = first_m.to(tl.int32)
        first_n = first_n.to(tl.int32)
    else:
        m = first_m + tl.arange(0, BLOCK_M)
        n = first_n + tl.arange(0, BLOCK_N)
    for start in range(0, groups, BLOCK_K // 16):
        if SWIZZLED:
            a, a_scale = _load_swizzled(a_codes, a_scales, first_m, start, BLOCK_M, BLOCK_K)
            b, b_scale = _load_swizzled(b_codes, b_scales, first_n, start, BLOCK_N, BLOCK_K)
        else:
            a, a_scale = _load_plain(a_codes, a_scales, m, M, groups, start, BLOCK_K)
            b, b_scale = _load_plain(b_codes, b_scales, n, N, groups, start, BLOCK_K)
        accumulator = _multiply_add(a, a_scale, b, b_scale, accumulator, NATIVE)
    return accumulator


@triton.jit
def column_slices(x, COUNT: tl.constexpr):
    """x [m, n] -> COUNT neighbouring parts [m, n / COUNT], a power of two: what follows holds one of them in registers at a time."""
    if COUNT == 1:
        return (x,)
    else:  # noqa: RET505  (Triton compiles what stands behind a return)
        m: tl.constexpr = x.shape[0]
        left, right = tl.split(x.reshape(m, 2, x.shape[1] // 2).permute(0, 2, 1))
        return column_slices(left, COUNT // 2) + column_slices(right, COUNT // 2)


@triton.jit
def packed_product_kernel(
    a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, out, scale, M, N, groups,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """a [M, groups*16] times b [N, groups*16] transposed -> out [M, N], all contiguous. Scales: float8_e4m3fn."""
    first_m, first_n = tile_start(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    y = accumulate(
        a_codes, a_scales, b_codes, b_scales, first_m, first_n, M, N, groups, BLOCK_M, BLOCK_N, BLOCK_K, SWIZZLED, NATIVE
    )  # fmt: skip
    # One factor after the other: the product of two tensor scales alone can leave the range of float32.
    ga = tl.load(a_tensor_scale)
    gb = tl.load(b_tensor_scale)
    m = first_m + tl.arange(0, BLOCK_M)
    parts = column_slices(y, SLICES)
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    for i in tl.static_range(SLICES):
        part = parts[i] * scale * ga * gb
        n = first_n + i * WIDTH + tl.arange(0, WIDTH)
        if HAS_BIAS:
            part += to_float32(tl.load(bias + n, mask=n < N, other=0.0))[None, :]
        part = to_bfloat16(part) if out.dtype.element_ty == tl.bfloat16 else part.to(out.dtype.element_ty)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out + at, part, mask=(m < M)[:, None] & (n < N)[None, :])


def product_tiles(target: Target, swizzled: bool) -> list[dict[str, int]]:
    """Tiles and launch options that compile without spilling (tests/test_triton_offline.py), the one to take unmeasured first."""
    sizes = {
        # BLOCK_M, BLOCK_N, BLOCK_K, SLICES, num_warps, num_stages
        ("tcgen05", True): [(128, 256, 256, 4, 4, 3), (128, 256, 256, 8, 4, 4), (128, 128, 256, 4, 4, 3), (128, 128, 256, 1, 8, 3)],
        ("tcgen05", False): [(128, 128, 128, 1, 8, 3), (128, 64, 128, 1, 4, 3)],
        ("mma.sync", True): [(128, 128, 128, 2, 8, 2), (128, 128, 128, 2, 8, 3)],
        ("mma.sync", False): [(128, 64, 128, 1, 8, 2), (64, 64, 128, 1, 4, 2)],
        ("decoded", True): [(128, 128, 128, 1, 8, 2)],
        ("decoded", False): [(64, 64, 128, 1, 4, 3), (128, 128, 64, 1, 8, 3), (16, 64, 128, 1, 4, 3)],
    }
    instruction = "decoded" if not target.native else "tcgen05" if target.capability < 120 else "mma.sync"
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SLICES", "num_warps", "num_stages")
    return [dict(zip(names, size, strict=True)) for size in sizes[instruction, swizzled]]


def matmul_packed(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype, swizzled: bool = False,
) -> Tensor:  # fmt: skip
    """Packed [M, K] times [N, K] transposed: the float32 sum, scaled, plus bias, rounded once to `out_dtype`. `scale`: a power of two.

    swizzled: the scales are flat, as `format.swizzle_scales` makes them; K is a multiple of 32, and the GPU has TMA (sm_90 on).
    """
    M, N = a_codes.shape[0], b_codes.shape[0]
    out = torch.empty((M, N), dtype=out_dtype, device=a_codes.device)
    if out.numel() == 0:
        return out
    target = target_of(a_codes)
    options = product_tiles(target, swizzled)[0]
    programs = ceil_div(M, options["BLOCK_M"]) * ceil_div(N, options["BLOCK_N"])
    with on_device_of(a_codes):
        if swizzled:  # room for the descriptors
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=a_codes.device))
        launch(
            packed_product_kernel, programs,
            a_codes.contiguous(), a_scales.contiguous(), a_tensor_scale, b_codes.contiguous(), b_scales.contiguous(), b_tensor_scale,
            None if bias is None else bias.contiguous(), out, scale, M, N, a_codes.shape[1] // 8,
            HAS_BIAS=bias is not None, SWIZZLED=swizzled, NATIVE=target.native, BAND=BAND, **options, **EXACT,
        )  # fmt: skip
    return out
