"""The Triton kernels at sizes that only a GPU handles, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_support import DTYPES, assert_equal, assert_near_ties_only, differences, matrix, reference_grad, seeds_on

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.value_ops import product_order, values_of

pytest.importorskip("triton")

from quartet_compile.kernels import triton_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 5000)])
def test_large_matrices(dtype, shape):
    x = matrix("outliers", shape, dtype, "cuda")
    packed = triton_kernels.quantize(x, "four_over_six")
    expected = reference_ops.quantize(x.cpu(), "four_over_six")
    print(f"\n{shape} {dtype}: four_over_six", differences(packed, expected))
    assert_equal(packed, expected)
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on("cuda"), 0, "ms_eden", transpose, 0)
        print(f"quantize_grad transpose={transpose}:", end=" ")
        assert_near_ties_only(differences(ours, reference_grad(x, 0, transpose, 0)))
    ours = triton_kernels.requantize(*packed, shape[1], seeds_on("cuda"), 0, "ms_eden", 0)
    print("requantize:", end=" ")
    expected = reference_ops.requantize(*(t.cpu() for t in packed), shape[1], seeds_on("cpu"), 0, "ms_eden", 0)
    assert_near_ties_only(differences(ours, expected))


@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 5000), (16384, 768)])
def test_values_of_large_matrices(shape):
    x = matrix("outliers", shape, torch.bfloat16, "cuda")
    seeds = seeds_on("cuda")
    rotations = triton_kernels.rotations(seeds, 0)
    packed = triton_kernels.quantize(x, "four_over_six")
    again = reference_ops.requantize(*(t.cpu() for t in packed), shape[1], seeds_on("cpu"), 0, "ms_eden", 0)
    row, column = triton_kernels.grad_values(x, rotations, seeds, 0, 1, "ms_eden", 2.0**-7, 0)
    results = {
        "row": (row, product_order(values_of(*reference_grad(x, 0, False, 0), scale=2.0**-7))),
        "column": (column, product_order(values_of(*reference_grad(x, 1, True, 0), scale=2.0**-7))),
        "requantized": (
            triton_kernels.requantize_values(*packed, shape[1], rotations, seeds, 0, "ms_eden", 0),
            product_order(values_of(*again)),
        ),
        "forward": (
            triton_kernels.quantize_with_values(x, "four_over_six")[3],
            values_of(*reference_ops.quantize(x.cpu(), "four_over_six")),
        ),
    }
    for name, (ours, expected) in results.items():
        different = (ours.cpu() != expected).unflatten(1, (-1, 8)).any(2)
        print(f"{shape} {name}: {int(different.sum())} of {different.numel()} eighths of a row differ")
        assert int(different.sum()) <= (0 if name == "forward" else (8 * 1.4e-5 + 2 * 1.6e-5) * different.numel())


def test_values_of_more_than_two_to_the_31_elements():
    """As below: a tall matrix of equal strips, whose values differ by their random numbers alone, so by a rounding of the scale."""
    strip = matrix("gauss", (256, 8192), torch.bfloat16, "cuda")
    strips = 2**31 // strip.numel() + 2
    x = strip.repeat(strips, 1)
    forward, expected = (triton_kernels.quantize_with_values(t, "four_over_six")[3] for t in (x, strip))
    assert (forward.view(strips, 256, -1) == expected).all()
    del forward
    seeds = seeds_on("cuda")
    rotations = triton_kernels.rotations(seeds, 0)
    for asked in ((0, None), (None, 1)):
        big, small = (
            next(v for v in triton_kernels.grad_values(t, rotations, seeds, *asked, "ms_eden", 1.0, 0) if v is not None) for t in (x, strip)
        )
        big, small = (big.view(strips, 256, -1), small) if asked[1] is None else (big.view(8192, strips, -1), small.unsqueeze(1))
        assert ((big - small).abs() <= small.abs() / 7.9).all()


def test_more_than_two_to_the_31_elements():
    """A tall matrix of equal strips: so are its codes."""
    strip = matrix("gauss", (256, 8192), torch.bfloat16, "cuda")
    strips = 2**31 // strip.numel() + 2
    x = strip.repeat(strips, 1)
    codes, scales, g = triton_kernels.quantize(x, "four_over_six")
    first = triton_kernels.quantize(strip, "four_over_six")
    assert torch.equal(g, first[2])
    assert (codes.view(strips, 256, -1) == first[0]).all()
    assert (scales.view(torch.uint8).view(strips, 256, -1) == first[1].view(torch.uint8)).all()
    codes, _, _ = triton_kernels.quantize_grad(x, seeds_on("cuda"), 0, "ms_eden", False, 0)
    first = triton_kernels.quantize_grad(strip, seeds_on("cuda"), 0, "ms_eden", False, 0)
    assert (codes.view(strips, 256, -1) == first[0]).all()
    codes, _, _ = triton_kernels.quantize_grad(x, seeds_on("cuda"), 0, "ms_eden", True, 0)
    first = triton_kernels.quantize_grad(strip, seeds_on("cuda"), 0, "ms_eden", True, 0)
    assert (codes.view(8192, strips, -1) == first[0].unsqueeze(1)).all()


def test_a_step_is_captured_by_a_cuda_graph_and_never_waits():
    """Seeds are read on the GPU: a replay with other seeds and data gives what an eager call gives."""
    seeds = seeds_on("cuda")
    x, e = (matrix("gauss", (256, columns), torch.bfloat16, "cuda") for columns in (384, 128))
    w = triton_kernels.quantize(matrix("gauss", (128, 384), torch.bfloat16, "cuda", 2), "four_over_six")

    def step() -> tuple[Tensor, ...]:
        packed = triton_kernels.quantize(x, "four_over_six")
        y = triton_kernels.matmul(*packed, *w, None, 1.0, torch.bfloat16)
        left = triton_kernels.quantize_grad(e, seeds, 1, "ms_eden", True, 0)
        right = triton_kernels.requantize(*packed, 384, seeds, 1, "ms_eden", 0)
        return y, triton_kernels.matmul(*left, *right, None, 1 / 128, torch.float32), left[0], right[0], left[1].view(torch.uint8)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seeds.add_(99)
    x.mul_(-3)
    e.add_(0.5)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)
