"""The product of packed matrices on a GPU: exact operands, and the error of float32 sums and one rounding."""

from __future__ import annotations

import math

import pytest
import torch
from triton_support import DTYPES, matrix, on_devices, packed_on

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import Quantized, swizzle_scales

pytest.importorskip("triton")

from quartet_compile.kernels import triton_kernels
from quartet_compile.kernels.triton_kernels.dequantize import dequantize


@on_devices
@pytest.mark.parametrize(
    ("a_exponent", "b_exponent", "scale"), [(0, 0, 1.0), (-7, 3, 1 / 128), (-100, -20, 1.0), (60, 59, 1 / 128), (-126, 118, 1.0)]
)
def test_dequantized_operands_are_exact(device, a_exponent, b_exponent, scale):
    codes, scales, _ = packed_on(matrix("wide", (37, 70), torch.float32, device), device)
    ga, gb = (torch.tensor(2.0**e, device=device) for e in (a_exponent, b_exponent))
    factors = reference_ops.split_scale(ga.cpu(), gb.cpu(), scale)
    for second in (False, True):
        ours = dequantize(codes, scales, ga, gb, round(math.log2(scale)), second)
        expected = Quantized(codes.cpu(), scales.cpu(), ga.cpu()).dequantize_unscaled(torch.float64) * factors[second].double()
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours.cpu().double(), expected)


@on_devices
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32])
def test_matmul_of_exact_sums_equals_the_reference(device, out_dtype, bias_dtype):
    """Integers small enough that the float32 sum is exact: one rounding, which everyone must make alike."""
    for M, N, K in ((37, 21, 70), (1, 1, 16), (130, 140, 257)):
        a, b = (packed_on(matrix("ties", (rows, K), torch.float32, device, seed=rows), device) for rows in (M, N))
        bias = None if bias_dtype is None else matrix("gauss", (1, N), bias_dtype, device)[0]
        ours = triton_kernels.matmul(*a, *b, bias, 1 / 128, out_dtype)
        expected = reference_ops.matmul(*(t.cpu() for t in (*a, *b)), None if bias is None else bias.cpu(), 1 / 128, out_dtype)
        assert ours.dtype == out_dtype
        assert torch.equal(ours.cpu(), expected)


HAS_TMA = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9


@on_devices
@pytest.mark.parametrize("swizzled", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_TMA, reason="no TMA before sm_90"))])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_of_packed_bytes_equals_the_reference(device, swizzled, with_bias):
    """The kernel that Blackwell runs, its operands decoded where there are no FP4 tensor cores: loads, edges, swizzled scales, factors."""
    for M, N, K in ((37, 21, 96), (1, 1, 32), (130, 140, 288), (256, 128, 64)):
        a, b = (packed_on(matrix("ties", (rows, K), torch.float32, device, seed=rows), device) for rows in (M, N))
        bias = matrix("gauss", (1, N), torch.bfloat16, device)[0] if with_bias else None
        expected = reference_ops.matmul(*(t.cpu() for t in (*a, *b)), None if bias is None else bias.cpu(), 1 / 128, torch.bfloat16)
        if swizzled:
            a, b = ((codes, swizzle_scales(scales), g) for codes, scales, g in (a, b))
        ours = triton_kernels.matmul_packed(*a, *b, bias, 1 / 128, torch.bfloat16, swizzled=swizzled)
        assert torch.equal(ours.cpu(), expected)


@on_devices
def test_a_matrix_that_is_not_finite_makes_the_product_of_packed_bytes_nan(device):
    x = matrix("gauss", (40, 64), torch.float32, device)
    x[3, 5] = float("inf")
    a, b = packed_on(x, device), packed_on(matrix("gauss", (24, 64), torch.float32, device), device)
    assert triton_kernels.matmul_packed(*a, *b, None, 1.0, torch.bfloat16).isnan().all()


@on_devices
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_matmul_error_is_that_of_float32_sums(device, out_dtype):
    """Against float64. A float32 sum of K terms is off by at most K * 2^-24 of the sum of magnitudes, then comes one rounding."""
    M, N, K = (45, 67, 300) if device == "cpu" else (500, 700, 1100)
    a, b = (packed_on(matrix("gauss", (rows, K), torch.float32, device, seed=rows), device) for rows in (M, N))
    bias = matrix("gauss", (1, N), torch.bfloat16, device)[0]
    ours = triton_kernels.matmul(*a, *b, bias, 1.0, out_dtype).cpu().double()
    left, right = (Quantized(*(t.cpu() for t in q)).dequantize(torch.float64) for q in (a, b))
    expected = left @ right.t() + bias.cpu().double()
    rounding = torch.finfo(out_dtype).eps / 2
    bound = K * 2.0**-24 * (left.abs() @ right.abs().t() + bias.cpu().double().abs())
    assert ((ours - expected).abs() <= bound * (1 + rounding) + rounding * expected.abs()).all()


@on_devices
def test_matmul_leaves_the_settings_of_torch_alone(device):
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    a = packed_on(matrix("gauss", (4, 16), torch.float32, device), device)
    triton_kernels.matmul(*a, *a, None, 1.0, torch.bfloat16)
    assert settings.allow_bf16_reduced_precision_reduction == before
