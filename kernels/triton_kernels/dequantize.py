"""A packed matrix as a bfloat16 operand, for GPUs without FP4 tensor cores: code * scale * a power of two, exact.

0.5625 bytes an element read, 2 written. The power of two carries this operand's part of ``g_a * g_b * scale``, so that the product needs
nothing behind it; it is worked out in the kernel from the two tensor scales, which stay on the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet_compile.kernels.format import ceil_div
from quartet_compile.kernels.triton_kernels.launch import launch, on_device_of
from quartet_compile.kernels.triton_kernels.numbers import e2m1_value, e4m3_value, exponent_of, times_power_of_two


@triton.jit(do_not_specialize=["scale_exponent"])
def dequantize_kernel(
    codes, scales, a_scale, b_scale, scale_exponent, out, groups, SECOND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Flat groups of 8 code bytes -> 16 bfloat16. SECOND: the operand takes the upper half of the exponent, not the lower."""
    ga = tl.load(a_scale)
    gb = tl.load(b_scale)
    exponent = exponent_of(ga) + exponent_of(gb) + scale_exponent
    half = exponent >> 1
    if SECOND:
        half = exponent - half
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    present = first + i < groups
    byte = tl.load(codes + first * 8 + i[:, None] * 8 + tl.arange(0, 8)[None, :], mask=present[:, None], other=0).to(tl.int32)
    scale = tl.load(scales + first + i, mask=present, other=0).to(tl.int32)
    # Where a tensor scale is NaN so is every element: 0 * NaN.
    factor = e4m3_value(scale) + (ga + gb) * 0.0
    values = tl.join(e2m1_value(byte & 15), e2m1_value(byte >> 4)).reshape(BLOCK, 16) * factor[:, None]
    values = times_power_of_two(values, half).to(tl.bfloat16)
    tl.store(out + first * 16 + i[:, None] * 16 + tl.arange(0, 16)[None, :], values, mask=present[:, None])


def dequantize(codes: Tensor, scales: Tensor, a_scale: Tensor, b_scale: Tensor, scale_exponent: int, second: bool) -> Tensor:
    """Packed [M, K] -> bfloat16 [M, K]: its half of the product's scale 2^scale_exponent * a_scale * b_scale included."""
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty((codes.shape[0], codes.shape[1] * 2), dtype=torch.bfloat16, device=codes.device)
    groups, block = scales.numel(), 128
    if groups:
        with on_device_of(codes):
            launch(
                dequantize_kernel, ceil_div(groups, block),
                codes, scales.view(torch.uint8), a_scale, b_scale, scale_exponent, out, groups, SECOND=second, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out
