"""The backward pass is unbiased: over many draws, dW and dX converge to the gradient at the quantized point as 1/B."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quartet_compile.kernels import ops  # noqa: F401  (registers torch.ops.quartet)
from quartet_compile.kernels.format import Quantized

quartet = torch.ops.quartet

# One linear with T = 512, I = O = 256 and Gaussian data; measured by a float64 model of the recipe, independent of this package.
SINGLE_DRAW_ERROR = 1.90e-2


def weight_gradient(e: Tensor, packed: tuple[Tensor, Tensor, Tensor], seed: int) -> Tensor:
    seeds = torch.tensor([seed])
    left = quartet.quantize_grad(e, seeds, 0, "ms_eden", True)
    right = quartet.requantize(*packed, 256, seeds, 0, "ms_eden")
    return quartet.matmul(*left, *right, None, 1 / 128, torch.float32).double()


def input_gradient(e: Tensor, packed: tuple[Tensor, Tensor, Tensor], seed: int) -> Tensor:
    seeds = torch.tensor([seed])
    left = quartet.quantize_grad(e, seeds, 0, "ms_eden", False)
    right = quartet.requantize(*packed, 256, seeds, 0, "ms_eden")
    return quartet.matmul(*left, *right, None, 1 / 128, torch.float32).double()


@pytest.mark.parametrize("product", ["dw", "dx"])
def test_the_mean_of_draws_converges_as_one_over_their_number(product: str) -> None:
    e = torch.randn(512, 256)
    packed = quartet.quantize(torch.randn(512 if product == "dw" else 256, 256), "four_over_six")
    saved = Quantized(*packed).dequantize(torch.float64)
    exact = e.double().t() @ saved if product == "dw" else e.double() @ saved
    gradient = weight_gradient if product == "dw" else input_gradient
    draws = torch.stack([gradient(e, packed, seed) for seed in range(64)])
    for count in (1, 4, 16, 64):
        means = draws.unflatten(0, (-1, count)).mean(1)
        errors = (means - exact).flatten(1).norm(dim=1) ** 2 / exact.norm() ** 2
        # 65,536 elements and more: a relative standard error of about 0.6% for one mean, so 5% is eight of them
        assert float(errors.mean()) == pytest.approx(SINGLE_DRAW_ERROR / count, rel=0.05), count


def test_the_two_operands_of_a_product_draw_different_numbers() -> None:
    """The same matrix as gradient and as saved operand: one rotation, hence equal codes, but scales rounded by different draws."""
    packed = quartet.quantize(torch.randn(512, 64), "four_over_six")
    saved = Quantized(*packed).dequantize()
    seeds = torch.tensor([7])
    left = quartet.quantize_grad(saved, seeds, 0, "ms_eden", True)
    right = quartet.requantize(*packed, 64, seeds, 0, "ms_eden")
    assert (left[0] != right[0]).float().mean() < 1e-3, "codes; the tensor scale enters float32 sums in other places"
    differ = (left[1].view(torch.uint8) != right[1].view(torch.uint8)).float().mean()
    # Two independent roundings up with probability p differ with 2p(1 - p), 1/3 on average; 2,048 groups: standard error 0.01.
    assert float(differ) == pytest.approx(1 / 3, abs=0.05)
