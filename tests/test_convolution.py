"""Convolutions with a kernel of one element: the linear of each pixel's channels."""

from __future__ import annotations

from typing import Any

import float64_recipe as independent
import pytest
import torch
from support import capture, float64, graph_code, one_seed, recorded_seeds, relative_error, train_step
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("device")

CASES = [
    pytest.param(nn.Conv1d, (5,), id="1d"),
    pytest.param(nn.Conv2d, (3, 6), id="2d"),
    pytest.param(nn.Conv3d, (2, 3, 4), id="3d"),
]


def matrix(image: Tensor) -> Any:
    """[N, C, ...] -> float64 [pixels, C]."""
    return float64(image.movedim(1, -1).flatten(0, -2))


@pytest.mark.feature("Ways to write a linear", "convolution with a kernel of one element")
@pytest.mark.parametrize(("kind", "sizes"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_equals_the_independent_recipe(kind: Any, sizes: tuple[int, ...], bias: bool, device: torch.device) -> None:
    flips = 0 if device.type == "cpu" else 1
    model, x = kind(70, 66, 1, bias=bias), torch.randn(4, 70, *sizes, requires_grad=True)
    y, e, seeds, report = train_step(model, x)
    (linear,) = report.linears
    pixels = 4 * torch.Size(sizes).numel()
    assert (linear.name, linear.shape, linear.products) == ("(root)", (pixels, 70, 66), ("y", "dx", "dw"))
    w = float64(model.weight.flatten(1))
    shift = float64(model.bias) if bias else 0
    assert y.shape == model(x).shape
    assert relative_error(matrix(y), independent.linear(matrix(x), w) + shift) < 1e-6
    assert relative_error(matrix(x.grad), independent.dgrad(matrix(e), w, seeds.plain[0]), flips=flips) < 1e-6
    dw = independent.wgrad(matrix(e), matrix(x), seeds.transposed[0])
    assert relative_error(model.weight.grad.flatten(1), dw, flips=flips) < 1e-6
    if bias:
        assert relative_error(model.bias.grad, matrix(e).sum(0)) < 1e-6


def test_channels_last_and_a_frozen_weight() -> None:
    model = nn.Conv2d(64, 96, 1).requires_grad_(False)
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    _, e, seeds, report = train_step(model, x)
    assert report.linears[0].products == ("y", "dx")
    w = float64(model.weight.flatten(1))
    assert relative_error(matrix(x.grad), independent.dgrad(matrix(e), w, seeds.plain[0])) < 1e-6


def test_views_behind_it_find_the_order_in_memory_that_they_were_traced_with() -> None:
    """Forward and backward: the product has channels last, an image has them first."""

    class Model(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.convolution, self.flat = nn.Linear(80, 70, bias=False), nn.Conv1d(64, 96, 1), flat

        def forward(self, x: Tensor) -> Tensor:
            y = self.convolution(self.linear(x))
            return y.view(2, -1) if self.flat else y

    x, results = torch.randn(2, 64, 80), []
    for flat in (True, False):
        model = Model(flat)
        compiled, backend = capture(model)
        with one_seed():
            y = compiled(x)
            y.square().sum().backward()
        assert [linear.products for linear in backend.report(model).linears] == [("y", "dw"), ("y", "dx", "dw")]
        assert y.stride() == model(x).stride()
        results.append([y.detach().flatten(), *(p.grad for p in model.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_what_is_excluded_stays_a_convolution() -> None:
    compiled, backend = capture(nn.Conv2d(64, 64, 1), exclude=["*"])
    compiled(torch.randn(2, 64, 8, 8)).sum().backward()
    (graph,) = backend.graphs
    assert "aten.convolution.default" in graph.forward
    assert graph.backward.count("aten.convolution_backward.default") == 1
    assert "quartet" not in graph_code(graph.forward) + graph_code(graph.backward)


def test_between_other_convolutions(device: torch.device) -> None:
    """A bottleneck: the middle one is left as it is, the others are linears; one wraps the weights of several pixels."""
    model = nn.Sequential(nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 1))
    compiled, backend = capture(model)
    with recorded_seeds() as seeds:
        compiled(torch.randn(2, 64, 8, 8)).sum().backward()
    assert [(linear.name, linear.products) for linear in backend.report(model).linears] == [("0", ("y", "dw")), ("4", ("y", "dx", "dw"))]
    assert (len(seeds.plain), len(seeds.transposed)) == (1, 2)
    backward = backend.graphs[0].backward
    if device.type == "cpu":
        assert backward.count("aten.convolution_backward") == 3
        assert backward.count("[True, True, True]") == 1
        assert backward.count("[False, False, True]") == 2, "only the bias is left of those that are rewritten"
    else:  # there torch sums the gradient of a bias by itself
        assert backward.count("aten.convolution_backward") == 1
        assert backward.count("[True, True, False]") == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiled_with_a_dynamic_batch_and_size() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.GELU(), nn.Conv2d(64, 64, 1))
    compiled = torch.compile(model, backend="quartet", dynamic=True, fullgraph=True)
    for shape in ((2, 64, 5, 7), (3, 64, 8, 4), (5, 64, 9, 9)):
        x = torch.randn(shape, requires_grad=True)
        y = compiled(x)
        y.square().sum().backward()
        assert 0.05 < relative_error(y, model(x).detach()) < 0.25
        assert x.grad.shape == shape
