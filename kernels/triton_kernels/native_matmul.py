"""The NVFP4 product on Blackwell's FP4 tensor cores: sm_100, sm_103 (tcgen05.mma) and sm_120 (mma.sync), all ``kind::mxf4nvf4``.

Codes and scales are loaded through pointers in their plain layouts, masked at every edge; the accumulator is scaled, given its bias and
rounded once. Compiled and inspected on a machine without a GPU, never timed: TMA and swizzled scales are the known next step on sm_100.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.triton_kernels.launch import EXACT, on_device_of, target_of


@triton.jit
def native_matmul_kernel(
    a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, out, scale, M, N, groups,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """a [M, groups*16] times b [N, groups*16] transposed -> out [M, N], all contiguous. Scales: float8_e4m3fn."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Bands of BAND tile rows: the programs in flight share operands in the L2 cache.
    band = tl.program_id(0) // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * tiles_n)
    m = (band * BAND + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    BYTES: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // 16
    byte = tl.arange(0, BYTES)
    group = tl.arange(0, GROUPS)
    in_m = (m < M)[:, None]
    in_n = (n < N)[:, None]
    a_row = m.to(tl.int64)[:, None] * groups
    b_row = n.to(tl.int64)[:, None] * groups
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, groups, GROUPS):
        in_bytes = (byte < (groups - start) * 8)[None, :]
        in_groups = (group < groups - start)[None, :]
        a = tl.load(a_codes + a_row * 8 + start * 8 + byte[None, :], mask=in_m & in_bytes, other=0)
        b = tl.load(b_codes + b_row * 8 + start * 8 + byte[None, :], mask=in_n & in_bytes, other=0)
        a_scale = tl.load(a_scales + a_row + start + group[None, :], mask=in_m & in_groups, other=0.0)
        b_scale = tl.load(b_scales + b_row + start + group[None, :], mask=in_n & in_groups, other=0.0)
        accumulator = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", accumulator)
    # One factor after the other: the product of two tensor scales alone can leave the range of float32.
    y = accumulator * scale * tl.load(a_tensor_scale) * tl.load(b_tensor_scale)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=in_m & (n < N)[None, :])


def product_tile(capability: int) -> dict[str, int]:
    """Tile and launch options that compile without spilling on the two kinds of Blackwell (tests/test_triton_offline.py)."""
    if capability < 120:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}


def native_matmul(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operator `quartet::matmul` for operands whose K is not 0."""
    M, N = a_codes.shape[0], b_codes.shape[0]
    out = torch.empty((M, N), dtype=out_dtype, device=a_codes.device)
    if out.numel() == 0:
        return out
    options = product_tile(target_of(a_codes).capability)
    programs = triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"])
    with on_device_of(a_codes):
        native_matmul_kernel[(programs,)](
            a_codes.contiguous(), a_scales.contiguous(), a_tensor_scale, b_codes.contiguous(), b_scales.contiguous(), b_tensor_scale,
            None if bias is None else bias.contiguous(), out, scale, M, N, a_scales.shape[1],
            HAS_BIAS=bias is not None, BAND=8, **options, **EXACT,
        )  # fmt: skip
    return out
