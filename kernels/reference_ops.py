"""The operators in terms of the reference rules: what every device's implementation must equal.

Plain PyTorch on any device. The CPU uses it where no C++ compiler is found, every device for rules that have no kernels
(`ops.WITHOUT_KERNELS`); tests compare the C++ and the Triton kernels with it.
Arguments and results are those of the operators in `ops`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quartet_compile.kernels import philox, reference
from quartet_compile.kernels.format import ROTATION, Quantized, ceil_to

Packed = tuple[Tensor, Tensor, Tensor]
"""codes, scales, tensor_scale."""


def quantize(x: Tensor, rule: str) -> Packed:
    """Quantize the rows of x [M, K] by a deterministic rule."""
    q = reference.FORWARD_FORMULAS[rule](x)
    return q.codes, q.scales, q.tensor_scale


def quantize_grad(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, rank: int) -> Packed:
    """Rotate and quantize e [M, N] along N, or along M into [N, ...] with `transpose`."""
    assert rule == "ms_eden"
    seed = philox.seed_for_rank(int(seeds[index]), rank)
    operand = e.t() if transpose else e
    return _rotate_and_round(operand.float(), seed, philox.STREAM_GRADIENT)


def quantize_grad_both(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str, rank: int) -> tuple[Tensor, ...]:
    """`quantize_grad` along N by rotation `index`, then along M by `transposed_index`: six tensors."""
    return *quantize_grad(e, seeds, index, rule, False, rank), *quantize_grad(e, seeds, transposed_index, rule, True, rank)


def requantize(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str, rank: int
) -> Packed:
    """Dequantize, transpose, rotate and quantize a packed [M, columns] into [columns, ceil(M/128)*128]."""
    assert rule == "ms_eden"
    seed = philox.seed_for_rank(int(seeds[index]), rank)
    values = Quantized(codes, scales, tensor_scale).dequantize_unscaled(torch.float32)[:, :columns]
    out_codes, out_scales, g = _rotate_and_round(values.t(), seed, philox.STREAM_SAVED)
    return out_codes, out_scales, g * tensor_scale


def _rotate_and_round(operand: Tensor, seed: int, stream: int) -> Packed:
    rows, columns = operand.shape
    signs = philox.rotation_signs(seed, operand.device)
    uniforms = philox.uniforms(seed, rows, ceil_to(columns, ROTATION) // 16, stream, operand.device)
    q = reference.ms_eden(reference.rotate(operand, signs), uniforms)
    return q.codes, q.scales, q.tensor_scale


def split_scale(a_scale: Tensor, b_scale: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Two powers of two whose product is ``a_scale * b_scale * scale``, one for each operand of a product.

    The exponent is halved so that neither operand leaves the range of bfloat16 where the result does not; all three factors must be
    powers of two. NaN in, NaN out.
    """
    exponents = torch.frexp(a_scale).exponent + torch.frexp(b_scale).exponent - 2 + int(math.log2(scale))
    half = torch.div(exponents, 2, rounding_mode="floor")
    nan = (a_scale + b_scale) * 0
    one = torch.ones_like(a_scale)
    return torch.ldexp(one, half) + nan, torch.ldexp(one, exponents - half) + nan


def matmul(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """a [M, K] times b [N, K] transposed: the float32 sum, scaled, plus bias, rounded once to `out_dtype`."""
    fa, fb = split_scale(a_tensor_scale, b_tensor_scale, scale)
    a = Quantized(a_codes, a_scales, a_tensor_scale).dequantize_unscaled(torch.float32) * fa
    b = Quantized(b_codes, b_scales, b_tensor_scale).dequantize_unscaled(torch.float32) * fb
    y = a @ b.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)
