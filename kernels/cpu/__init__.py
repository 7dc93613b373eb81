"""The operators on a CPU: `kernels.cpp`, or the reference where there is no C++ compiler.

Same arguments, results and bits as `reference_ops`. The environment variable QUARTET_CPU_KERNELS=reference forces the reference.
"""

from __future__ import annotations

import ctypes
import math
import os

import torch
from torch import Tensor

from quartet_compile.kernels import philox, reference_ops
from quartet_compile.kernels.cpu import build
from quartet_compile.kernels.format import GROUP, ROTATION, ceil_to
from quartet_compile.kernels.reference_ops import Packed

__all__ = ["matmul", "quantize", "quantize_grad", "quantize_grad_both", "requantize"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As the enum at the end of kernels.cpp."""

ELEMENTS_PER_THREAD = 16384
"""Work below which another thread costs more than it saves: 16384 elements are some 20 microseconds."""


def _kernels() -> ctypes.CDLL | None:
    choice = os.environ.get("QUARTET_CPU_KERNELS", "")
    if choice == "reference":
        return None
    if choice:
        raise ValueError(f"QUARTET_CPU_KERNELS must be 'reference' or unset, not {choice!r}")
    return build.load()


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD))


def _empty(rows: int, columns: int) -> Packed:
    return (
        torch.empty((rows, columns // 2), dtype=torch.uint8),
        torch.empty((rows, columns // GROUP), dtype=torch.float8_e4m3fn),
        torch.empty((), dtype=torch.float32),
    )


def quantize(x: Tensor, rule: str) -> Packed:
    """See `reference_ops.quantize`."""
    kernels = _kernels()
    if kernels is None or rule != "four_over_six" or x.numel() == 0:
        return reference_ops.quantize(x, rule)
    rows, columns = x.shape
    codes, scales, g = _empty(rows, ceil_to(columns, GROUP))
    kernels.quartet_four_over_six(
        x.data_ptr(), _DTYPES[x.dtype], rows, columns, *x.stride(), codes.data_ptr(), scales.data_ptr(), g.data_ptr(), _threads(x.numel())
    )
    return codes, scales, g


def quantize_grad(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, rank: int) -> Packed:
    """See `reference_ops.quantize_grad`."""
    kernels = _kernels()
    if kernels is None or e.numel() == 0:
        return reference_ops.quantize_grad(e, seeds, index, rule, transpose, rank)
    assert rule == "ms_eden"
    seed = philox.seed_for_rank(int(seeds[index]), rank)
    operand = e.t() if transpose else e
    rows, columns = operand.shape
    codes, scales, g = _empty(rows, ceil_to(columns, ROTATION))
    exact_scales = torch.empty(scales.shape, dtype=torch.float32)
    kernels.quartet_ms_eden(
        operand.data_ptr(), _DTYPES[e.dtype], rows, columns, *operand.stride(), seed, philox.STREAM_GRADIENT,
        codes.data_ptr(), scales.data_ptr(), g.data_ptr(), exact_scales.data_ptr(), _threads(e.numel()),
    )  # fmt: skip
    return codes, scales, g


def quantize_grad_both(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str, rank: int) -> tuple[Tensor, ...]:
    """See `reference_ops.quantize_grad_both`."""
    return *quantize_grad(e, seeds, index, rule, False, rank), *quantize_grad(e, seeds, transposed_index, rule, True, rank)


def requantize(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str, rank: int
) -> Packed:
    """See `reference_ops.requantize`."""
    kernels = _kernels()
    if kernels is None or codes.numel() == 0 or columns == 0:
        return reference_ops.requantize(codes, scales, tensor_scale, columns, seeds, index, rule, rank)
    assert rule == "ms_eden"
    seed = philox.seed_for_rank(int(seeds[index]), rank)
    codes, scales = codes.contiguous(), scales.contiguous()
    new_codes, new_scales, g = _empty(columns, ceil_to(codes.shape[0], ROTATION))
    exact_scales = torch.empty(new_scales.shape, dtype=torch.float32)
    kernels.quartet_requantize(
        codes.data_ptr(), scales.data_ptr(), *scales.shape, columns, seed, philox.STREAM_SAVED,
        new_codes.data_ptr(), new_scales.data_ptr(), g.data_ptr(), exact_scales.data_ptr(), _threads(codes.numel() * 2),
    )  # fmt: skip
    return new_codes, new_scales, g * tensor_scale


def _split_scale(a_scale: float, b_scale: float, scale: float) -> tuple[float, float]:
    """`reference_ops.split_scale` on Python numbers: a dozen operators on scalars cost as much as a small product."""
    if not (math.isfinite(a_scale) and math.isfinite(b_scale)):
        return math.nan, math.nan
    exponents = math.frexp(a_scale)[1] + math.frexp(b_scale)[1] - 2 + int(math.log2(scale))
    half = exponents // 2
    return math.ldexp(1.0, half), math.ldexp(1.0, exponents - half)


def _dequantize(kernels: ctypes.CDLL, codes: Tensor, scales: Tensor, factor: float) -> Tensor:
    """``code * scale * factor``: float32 [M, K]."""
    codes, scales = codes.contiguous(), scales.contiguous()
    values = torch.empty((codes.shape[0], codes.shape[1] * 2), dtype=torch.float32)
    kernels.quartet_dequantize(
        codes.data_ptr(), scales.data_ptr(), scales.numel(), factor, values.data_ptr(), _threads(values.numel())
    )
    return values


def matmul(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `reference_ops.matmul`.

    The operands have at most six significant bits, so `torch.set_float32_matmul_precision`, which lets the product round them to
    bfloat16, changes none of them.
    """
    kernels = _kernels()
    if kernels is None:
        return reference_ops.matmul(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)
    factor_a, factor_b = _split_scale(a_tensor_scale.item(), b_tensor_scale.item(), scale)
    y = _dequantize(kernels, a_codes, a_scales, factor_a) @ _dequantize(kernels, b_codes, b_scales, factor_b).t()
    if bias is not None:
        y += bias.float()
    return y.to(out_dtype)
