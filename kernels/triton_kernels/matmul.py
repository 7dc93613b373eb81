"""The product of two NVFP4 matrices: on FP4 tensor cores where there are some, else with exact bfloat16 operands in cuBLAS.

code * scale has at most six significant bits and all tensor scales are powers of two, so the emulation multiplies the very same numbers
with float32 accumulation; only the order of the additions differs. Moving the operands costs 2.5625 bytes an element each: 2% of the
product at 8192 x 4096 x 4096 on an H100.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quartet_compile.kernels.triton_kernels.dequantize import dequantize
from quartet_compile.kernels.triton_kernels.launch import target_of
from quartet_compile.kernels.triton_kernels.packed_product import matmul_packed


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """cuBLAS may otherwise add partial sums in bfloat16. Newer versions of torch keep a second switch beside the first: restore both."""
    settings, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before = getattr(settings, name)
    split_k = getattr(settings, f"{name}_split_k", None)
    if split_k is not None and isinstance(before, bool):
        before = (before, split_k)
    setattr(settings, name, False)
    try:
        yield
    finally:
        setattr(settings, name, before)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] times b [N, K] transposed, plus bias, from the float32 accumulator to `out_dtype` in one rounding."""
    if not a.is_cuda or a.numel() == 0 or b.numel() == 0:
        y = a.float() @ b.float().t()
    elif out_dtype == torch.bfloat16 and bias is None:
        return torch.mm(a, b.t())
    elif out_dtype == torch.bfloat16 and bias is not None and bias.dtype == torch.bfloat16:
        return torch.addmm(bias, a, b.t())  # cuBLAS adds the bias to its accumulator
    else:
        y = torch.mm(a, b.t(), out_dtype=torch.float32)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def matmul(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """a [M, K] times b [N, K] transposed: the float32 sum, scaled, plus bias, rounded once to `out_dtype`. `scale`: a power of two."""
    if target_of(a_codes).native and a_codes.shape[1]:
        return matmul_packed(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        raise ValueError(f"the scale of a product must be a power of two, not {scale}")
    a = dequantize(a_codes, a_scales, a_tensor_scale, b_tensor_scale, exponent - 1, second=False)
    b = dequantize(b_codes, b_scales, a_tensor_scale, b_tensor_scale, exponent - 1, second=True)
    return matmul_values(a, b, bias, out_dtype)


def matmul_values(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """bfloat16 a [M, K] times b [N, K] transposed, accumulated in float32, plus bias [N], rounded once to `out_dtype`."""
    with full_precision_sums():
        return _product(a, b, bias, out_dtype)
