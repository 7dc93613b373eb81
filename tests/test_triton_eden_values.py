"""The backward operands as bfloat16 values, made in one pass: equal to what the packed operators of the reference stand for."""

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
    Calls,
    Packed,
    matrix,
    on_devices,
    packed_on,
    quiet_rows,
    reference_grad,
    seeds_on,
)

from quartet_compile.kernels import philox, reference_ops
from quartet_compile.kernels.value_ops import product_order, rotation_matrices, values_of

pytest.importorskip("triton")

from quartet_compile.kernels import triton_kernels
from quartet_compile.kernels.triton_kernels import gradient_values

SCALE = 2.0**-7


def assert_values(ours: Tensor, expected: Tensor, exact: bool = False) -> None:
    """Equal, but for near-ties: a code or a scale moved by the order of additions or a reciprocal (see `triton_support`)."""
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous()
    assert ours.shape == expected.shape
    different = (ours.cpu() != expected) & ~(ours.cpu().isnan() & expected.isnan())
    print(f"{int(different.sum())}/{different.numel()} values")
    groups = int(different.unflatten(1, (-1, 16)).any(2).sum()) if different.numel() else 0
    # A moved code changes one value, a moved scale those of its group.
    assert groups <= (0 if exact else (16 * 1.4e-5 + 1.6e-5) * different.numel() / 16 + 1)


def requantize_values(packed: Packed, columns: int, index: int = 0, rank: int = 0) -> Tensor:
    seeds = seeds_on(packed[0].device.type)
    return triton_kernels.requantize_values(*packed, columns, triton_kernels.rotations(seeds, rank), seeds, index, "ms_eden", rank)


def expected_requantize_values(packed: Packed, columns: int, index: int = 0, rank: int = 0) -> Tensor:
    again = reference_ops.requantize(*(t.cpu() for t in packed), columns, seeds_on("cpu"), index, "ms_eden", rank)
    return product_order(values_of(*again))


def assert_grad_values(e: Tensor, exact: bool = False, scale: float = SCALE, rank: int = 3, alone: bool = False) -> None:
    """Both orientations at once, and each `alone`, against the packed operator."""
    expected = [product_order(values_of(*reference_grad(e, k, bool(k), rank), scale=scale)) for k in (0, 1)]
    seeds = seeds_on(e.device.type)
    rotations = triton_kernels.rotations(seeds, rank)
    for asked in ((0, 1), (0, None), (None, 1)) if alone else ((0, 1),):
        results = triton_kernels.grad_values(e, rotations, seeds, *asked, "ms_eden", scale, rank)
        for index, ours, theirs in zip(asked, results, expected, strict=True):
            if index is None:
                assert ours is None
            else:
                assert_values(ours, theirs, exact)


@on_devices
def test_rotations(device):
    seeds = seeds_on(device)
    expected = torch.stack([rotation_matrices(philox.seed_for_rank(seed, 5)) for seed in seeds.tolist()])
    assert torch.equal(triton_kernels.rotations(seeds, 5).cpu().float(), expected)


@on_devices
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_grad_values(device, dtype, kind):
    for shape in (*SHAPES[:2], (130, 257)) if kind == "gauss" else SHAPES[:1]:
        assert_grad_values(matrix(kind, shape, dtype, device), exact=kind in EXACT_SUMS, alone=kind == "gauss")


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["transposed", "every_other", "inner", "one_row_expanded"])
def test_strides_of_a_gradient_do_not_matter(device, dtype, view):
    base = matrix("gauss", (150, 144), dtype, device)
    views = {
        "transposed": base[:37, :].t(),
        "every_other": base[:40, ::2],
        "inner": base[1:34, 3:74],
        "one_row_expanded": base[:1, :40].expand(21, 40),
    }
    assert_grad_values(views[view])


@on_devices
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e36), (torch.float32, 1e-32), (torch.bfloat16, 1e36), (torch.bfloat16, 1e-37)]
)
def test_gradients_of_extreme_size(device, dtype, factor):
    assert_grad_values((matrix("gauss", (37, 70), torch.float64, device) * factor).to(dtype), scale=1.0)


@on_devices
def test_groups_that_need_the_tensor_scale_are_made_again(device):
    e = quiet_rows(device)
    assert_grad_values(e)
    packed = packed_on(e.float(), device)
    assert_values(requantize_values(packed, e.shape[1]), expected_requantize_values(packed, e.shape[1]))


@on_devices
def test_without_the_second_launch_those_groups_would_be_wrong(device, monkeypatch):
    """So the test above tests it."""
    monkeypatch.setattr(gradient_values, "gradient_again_kernel", Calls(lambda *_, **__: None))
    e = quiet_rows(device)
    with pytest.raises(AssertionError):
        assert_grad_values(e)


@on_devices
@pytest.mark.parametrize("kind", MATRICES)
def test_requantize_values(device, kind):
    for rank, shape in enumerate(SHAPES if kind == "gauss" else SHAPES[:3]):
        packed = packed_on(matrix(kind, shape, torch.float32, device), device)
        arguments = (packed, shape[1], rank % 3, rank)
        assert_values(requantize_values(*arguments), expected_requantize_values(*arguments), exact=kind in EXACT_SUMS)


@on_devices
@pytest.mark.parametrize("factor", [1e36, 1e-30, 1e-36])
def test_saved_matrices_of_extreme_size(device, factor):
    packed = packed_on((matrix("gauss", (37, 70), torch.float64, device) * factor).float(), device)
    assert_values(requantize_values(packed, 70), expected_requantize_values(packed, 70))


@on_devices
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_a_number_that_is_not_finite_makes_all_values_nan(device, dtype, bad):
    e = matrix("gauss", (140, 140), dtype, device)
    e[17, 33] = bad
    seeds = seeds_on(device)
    for ours in triton_kernels.grad_values(e, triton_kernels.rotations(seeds, 0), seeds, 0, 1, "ms_eden", SCALE, 0):
        assert ours.isnan().all()
    packed = packed_on(e, device)
    assert requantize_values(packed, 140).isnan().all()


@on_devices
@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)])
def test_values_of_empty_matrices(device, shape):
    e = torch.empty(shape, dtype=torch.bfloat16, device=device)
    seeds = seeds_on(device)
    row, column = triton_kernels.grad_values(e, triton_kernels.rotations(seeds, 0), seeds, 0, 1, "ms_eden", SCALE, 0)
    assert row.shape == (shape[0], -(-shape[1] // 128) * 128)
    assert column.shape == (shape[1], -(-shape[0] // 128) * 128)
    assert not row.any()
    assert not column.any()
    packed = packed_on(e, device)
    assert requantize_values(packed, shape[1]).shape == column.shape
