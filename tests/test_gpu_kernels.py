"""The Triton kernels at sizes that only a GPU handles, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_support import DTYPES, assert_equal, assert_near_ties_only, differences, matrix, reference_grad, seeds_on

from quartet_compile.kernels import reference_ops

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
