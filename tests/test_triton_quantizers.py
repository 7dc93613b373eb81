"""The Triton quantizers equal `reference_ops`: codes, scales and tensor scales byte for byte, but for near-ties in rotated operands."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_support import (
    BFLOAT16_FIRST,
    EXACT_SUMS,
    MATRICES,
    SHAPES,
    assert_equal,
    assert_near_ties_only,
    differences,
    first,
    matrix,
    on_devices,
    packed_on,
    quiet_rows,
    reference_grad,
    seeds_on,
    unsigned_zeros,
)

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import ceil_to, swizzle_scales, unpack, unswizzle_scales

pytest.importorskip("triton")

import triton.language as tl

from quartet_compile.kernels import triton_kernels
from quartet_compile.kernels.triton_kernels import gradient_codes, launch, saved_codes

# ---------------------------------------------------------------- deterministic rules


@on_devices
@pytest.mark.parametrize("rule", first("four_over_six", "nearest"))
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_quantize_equals_the_reference(device, dtype, kind, rule):
    for shape in SHAPES[:3] if kind != "gauss" else SHAPES:
        x = matrix(kind, shape, dtype, device)
        assert_equal(triton_kernels.quantize(x, rule), reference_ops.quantize(x.cpu(), rule))


@on_devices
@pytest.mark.parametrize("factor", first(3e38, 1e-42, 1e30, 1e-30, 1e-37, 1e-45, fast=2))
@pytest.mark.parametrize("dtype", first(torch.bfloat16, torch.float32))
def test_quantize_at_the_ends_of_the_range(device, dtype, factor):
    x = (matrix("wide", (19, 48), torch.float64, device).clamp(-1, 1) * factor).to(dtype)
    assert_equal(triton_kernels.quantize(x, "four_over_six"), reference_ops.quantize(x.cpu(), "four_over_six"))


def strided_views(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    base = matrix("gauss", (150, 144), dtype, device)
    return {
        "transposed": base[:37, :].t(),
        "every_other": base[:40, ::2],
        "inner": base[1:34, 3:74],
        "one_row_expanded": base[:1, :40].expand(21, 40),
        "one_number_expanded": base[0, 0].expand(17, 33),
    }


@on_devices
@pytest.mark.parametrize("view", strided_views(torch.float32, "cpu"))
@pytest.mark.parametrize("dtype", first(torch.bfloat16, torch.float32))
def test_strides_do_not_matter(device, dtype, view):
    x = strided_views(dtype, device)[view]
    assert_equal(triton_kernels.quantize(x, "four_over_six"), reference_ops.quantize(x.cpu(), "four_over_six"))
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on(device), 0, "ms_eden", transpose, 0)
        assert_near_ties_only(differences(ours, reference_grad(x, 0, transpose, 0)))


# ---------------------------------------------------------------- rotated operands


@on_devices
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", ["gauss", "outliers", "wide", "ties", "zero"])
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_quantize_grad_equals_the_reference(device, dtype, kind, transpose):
    for rank, shape in enumerate(SHAPES if kind == "gauss" else SHAPES[:2]):
        e = matrix(kind, shape, dtype, device, seed=rank)
        ours = triton_kernels.quantize_grad(e, seeds_on(device), rank % 3, "ms_eden", transpose, rank)
        expected = reference_grad(e, rank % 3, transpose, rank)
        if kind in EXACT_SUMS:
            assert_equal(unsigned_zeros(ours), unsigned_zeros(expected))
        else:
            assert_near_ties_only(differences(ours, expected))


@on_devices
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_rotated_zeros(device, dtype):
    """A sum that cancels exactly is +0 here. The reference's butterflies can make it -0 where the data itself has zeros: the one
    difference in signs that is not a near-tie, and it changes no value."""
    e = matrix("sparse", (37, 200), dtype, device)
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(e, seeds_on(device), 1, "ms_eden", transpose, 0)
        expected = reference_grad(e, 1, transpose, 0)
        assert_equal(unsigned_zeros(ours), unsigned_zeros(expected))
        other_sign = unpack(ours[0].cpu()) != unpack(expected[0])
        assert (unpack(ours[0].cpu())[other_sign] == 0).all()


@on_devices
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e36), (torch.float32, 1e-32), (torch.bfloat16, 1e36), (torch.bfloat16, 1e-37)]
)
def test_gradients_of_extreme_size(device, dtype, factor):
    e = (matrix("gauss", (37, 70), torch.float64, device) * factor).to(dtype)
    ours = triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", False, 0)
    assert_near_ties_only(differences(ours, reference_grad(e, 0, False, 0)))


@on_devices
@pytest.mark.parametrize("kind", ["gauss", "outliers", "wide", "ties", "sparse", "zero"])
def test_requantize_equals_the_reference(device, kind):
    for rank, shape in enumerate(SHAPES if kind == "gauss" else SHAPES[:3]):
        packed = packed_on(matrix(kind, shape, torch.float32, device), device)
        ours = triton_kernels.requantize(*packed, shape[1], seeds_on(device), rank % 3, "ms_eden", rank)
        expected = reference_ops.requantize(*(t.cpu() for t in packed), shape[1], seeds_on("cpu"), rank % 3, "ms_eden", rank)
        if kind in EXACT_SUMS:
            assert_equal(unsigned_zeros(ours), unsigned_zeros(expected))
        else:
            assert_near_ties_only(differences(ours, expected))


@on_devices
def test_the_form_for_other_gpus_changes_nothing(device, monkeypatch):
    if device == "cuda":
        pytest.skip("a GPU runs the one that suits it")
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target(0, native=False, permuted=False, processors=1))
    e = quiet_rows(device)[:150]
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", transpose, 0)
        assert_near_ties_only(differences(ours, reference_grad(e, 0, transpose, 0)))
    packed = packed_on(e.float(), device)
    ours = triton_kernels.requantize(*packed, e.shape[1], seeds_on(device), 0, "ms_eden", 0)
    expected = reference_ops.requantize(*(t.cpu() for t in packed), e.shape[1], seeds_on("cpu"), 0, "ms_eden", 0)
    assert_near_ties_only(differences(ours, expected))


@on_devices
@pytest.mark.parametrize("kind", ["gauss", "wide", "ties", "zero"])
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_both_orientations_from_one_read(device, dtype, kind):
    for shape in ((37, 70), (130, 257)) if kind == "gauss" else ((37, 70),):
        e = matrix(kind, shape, dtype, device)
        ours = triton_kernels.quantize_grad_both(e, seeds_on(device), 1, 2, "ms_eden", 3)
        for k, packed in enumerate((ours[:3], ours[3:])):
            expected = reference_grad(e, k + 1, bool(k), 3)
            if kind in EXACT_SUMS:
                assert_equal(unsigned_zeros(packed), unsigned_zeros(expected))
            else:
                assert_near_ties_only(differences(packed, expected))


# ---------------------------------------------------------------- tiles that need the tensor scale


def assert_quiet_gradients_equal(device: str) -> None:
    """Both orientations. Most scales of these rows are subnormal: there, bytes must be equal and not only nearly so."""
    e = quiet_rows(device)
    ours = triton_kernels.quantize_grad_both(e, seeds_on(device), 0, 1, "ms_eden", 0)
    for k, packed in enumerate((ours[:3], ours[3:])):
        assert_near_ties_only(differences(packed, reference_grad(e, k, bool(k), 0)))


def assert_quiet_operands_equal(device: str) -> None:
    """Likewise of a saved operand."""
    packed = packed_on(quiet_rows(device).float(), device)
    columns = quiet_rows(device).shape[1]
    again = triton_kernels.requantize(*packed, columns, seeds_on(device), 0, "ms_eden", 0)
    expected = reference_ops.requantize(*(t.cpu() for t in packed), columns, seeds_on("cpu"), 0, "ms_eden", 0)
    assert_near_ties_only(differences(again, expected))


QUIET = [(gradient_codes, assert_quiet_gradients_equal), (saved_codes, assert_quiet_operands_equal)]


@on_devices
@pytest.mark.parametrize(("kernels", "assert_equal_where_quiet"), QUIET, ids=["gradients", "saved operands"])
def test_subnormal_scales_are_rounded_again(device, kernels, assert_equal_where_quiet):
    assert_equal_where_quiet(device)


@on_devices
@pytest.mark.parametrize(("kernels", "assert_equal_where_quiet"), QUIET, ids=["gradients", "saved operands"])
def test_they_would_be_wrong_otherwise(device, kernels, assert_equal_where_quiet, monkeypatch):
    """So the test above tests it."""
    if device == "cuda":
        pytest.skip("the compiled kernel does not look at the module again")
    monkeypatch.setattr(kernels, "exact_codes", lambda y, *_: (*(tl.zeros((y.shape[0], 8), tl.int32) for _ in range(3)),))
    with pytest.raises(AssertionError):
        assert_equal_where_quiet(device)


@on_devices
@pytest.mark.parametrize("kind", first("gauss", "quiet rows", "one number", "none"))
def test_swizzled_scales_are_the_same_in_another_order(device, kind):
    """Of rows that are there; what stands for others meets nothing."""
    shape = {"one number": (1, 1), "none": (0, 64)}.get(kind, (130, 257))
    e = quiet_rows(device) if kind == "quiet rows" else matrix("gauss", shape, torch.bfloat16, device)
    rows, columns = e.shape
    plain = triton_kernels.quantize_grad_both(e, seeds_on(device), 0, 1, "ms_eden", 0)
    ours = triton_kernels.quantize_grad_both(e, seeds_on(device), 0, 1, "ms_eden", 0, swizzled=True)
    assert_same_but_swizzled(ours[:3], plain[:3], rows)
    assert_same_but_swizzled(ours[3:], plain[3:], columns)
    for transpose in (False, True):
        plain, ours = (triton_kernels.quantize_grad(e, seeds_on(device), 2, "ms_eden", transpose, 0, swizzled=s) for s in (False, True))
        assert_same_but_swizzled(ours, plain, columns if transpose else rows)
    packed = packed_on(e.float(), device)
    plain, ours = (triton_kernels.requantize(*packed, columns, seeds_on(device), 0, "ms_eden", 0, swizzled=s) for s in (False, True))
    assert_same_but_swizzled(ours, plain, columns)


def assert_same_but_swizzled(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], rows: int) -> None:
    groups = plain[1].shape[1]
    assert ours[1].shape == swizzle_scales(plain[1]).shape
    assert_equal((ours[0], unswizzle_scales(ours[1], rows, groups), ours[2]), plain)


@on_devices
def test_every_exponent_below_the_largest(device):
    """Scales at every distance from their row's largest and from the tensor's, through E4M3's subnormal numbers down to zero."""
    e = matrix("gauss", (48, 16), torch.float32, device).repeat(1, 40)
    e *= torch.exp2(-torch.arange(48, device=device)[:, None].float()) * torch.exp2(-torch.arange(40, device=device).repeat_interleave(16))
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", transpose, 0)
        assert_near_ties_only(differences(ours, reference_grad(e, 0, transpose, 0)))


# ---------------------------------------------------------------- numbers that are not finite, empty matrices, wrong arguments


@on_devices
@pytest.mark.parametrize("where", first(((17, 33), math.nan), ((0, 0), math.inf), ((36, 69), -math.inf), ((36, 0), math.nan)), ids=str)
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_a_number_that_is_not_finite_makes_everything_nan(device, dtype, where):
    at, bad = where
    x = matrix("gauss", (37, 70), dtype, device)
    x[at] = bad
    results = [(triton_kernels.quantize(x, "four_over_six"), reference_ops.quantize(x.cpu(), "four_over_six"))]
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on(device), 0, "ms_eden", transpose, 0)
        results.append((ours, reference_grad(x, 0, transpose, 0)))
    for ours, expected in results:
        assert ours[2].isnan()
        assert not ours[0].any()
        assert not ours[1].view(torch.uint8).any()
        assert_equal(ours, expected)
    nan_packed = results[0][0]
    assert triton_kernels.requantize(*nan_packed, 70, seeds_on(device), 0, "ms_eden", 0)[2].isnan()
    other = packed_on(matrix("gauss", (5, 70), dtype, device), device)
    assert triton_kernels.matmul(*nan_packed, *other, None, 1.0, torch.bfloat16).isnan().all()
    assert triton_kernels.matmul(*other, *nan_packed, None, 1.0, torch.float32).isnan().all()


@on_devices
def test_infinities_of_both_signs_in_one_rotated_block(device):
    e = matrix("gauss", (3, 128), torch.bfloat16, device)
    e[1, 5], e[1, 90] = math.inf, -math.inf
    assert_equal(triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", False, 0), reference_grad(e, 0, False, 0))


@on_devices
@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)])
def test_empty_matrices(device, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    packed = triton_kernels.quantize(x, "four_over_six")
    assert_equal(packed, reference_ops.quantize(x.cpu(), "four_over_six"))
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on(device), 0, "ms_eden", transpose, 0)
        assert_equal(ours, reference_grad(x, 0, transpose, 0))
    both = triton_kernels.quantize_grad_both(x, seeds_on(device), 0, 1, "ms_eden", 0)
    assert_equal(both[:3], reference_grad(x, 0, False, 0))
    assert_equal(both[3:], reference_grad(x, 1, True, 0))
    again = triton_kernels.requantize(*packed, shape[1], seeds_on(device), 0, "ms_eden", 0)
    assert again[0].shape == (shape[1], ceil_to(shape[0], 128) // 2)
    other = triton_kernels.quantize(torch.ones(3, shape[1], dtype=torch.bfloat16, device=device), "four_over_six")
    bias = torch.ones(3, device=device)
    y = triton_kernels.matmul(*packed, *other, bias, 1.0, torch.float32)
    assert y.shape == (shape[0], 3)
    assert (y == 1).all()


def test_rules_that_do_not_exist():
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="no deterministic rule"):
        triton_kernels.quantize(x, "stochastic")
    with pytest.raises(ValueError, match="no backward rule"):
        triton_kernels.quantize_grad(x, seeds_on("cpu"), 0, "nearest", False, 0)
