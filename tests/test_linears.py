"""Every way of writing a linear is found, and its three products equal an independent float64 computation with the same seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import float64_recipe as independent
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import capture, float64, off_by_more_than_rounding, recorded_seeds, relative_error, train_step
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("device")

I, O = 70, 66  # multiples of nothing


class Conv1D(nn.Module):
    """The linear of GPT-2: the weight is stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(I, O) / 8)
        self.bias = nn.Parameter(torch.randn(O))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, I), self.weight).view(*x.shape[:-1], O)


class AtWeight(nn.Module):
    """x @ W with W [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(I, O) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Functional(nn.Module):
    """F.linear with a parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Einsum(Functional):
    """A linear as an Einstein sum."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class WeightOnTheLeft(Functional):
    """W @ x of columns."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.reshape(-1, I).t()).t().view(*x.shape[:-1], O)


class BatchOfOne(Functional):
    """bmm with a batch of one matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.reshape(1, -1, I), self.weight.t().unsqueeze(0)).view(*x.shape[:-1], O)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(I, O),
    "linear without bias": lambda: nn.Linear(I, O, bias=False),
    "conv1d": Conv1D,
    "x @ W": AtWeight,
    "F.linear": Functional,
    "einsum": Einsum,
    "W @ x": WeightOnTheLeft,
    "bmm of one": BatchOfOne,
}
SHAPES = {"1-D": (I,), "2-D": (40, I), "one token": (1, I), "3-D": (2, 20, I), "4-D": (2, 5, 4, I)}


def weight_of(model: nn.Module) -> Tensor:
    """[O, I]."""
    weight = model.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(model, (nn.Linear, Functional)) else weight.t()


def check_float32(model: nn.Module, x: Tensor) -> None:
    y, e, seeds, report = train_step(model, x)
    (linear,) = report.linears
    assert linear.products == (("y", "dx", "dw") if x.requires_grad else ("y", "dw")), linear.reason
    x64, w64, e64 = (float64(t.reshape(-1, t.shape[-1])) for t in (x, weight_of(model), e))
    expected = independent.linear(x64, w64).reshape(y.shape)
    if getattr(model, "bias", None) is not None:
        expected = expected + float64(model.bias)
    # 1e-6: float32 sums of about 70 products; a single code that came out differently would show as 1e-4 or more
    assert relative_error(y, expected) < 1e-6
    dw = weight_of(model).grad if isinstance(model, (nn.Linear, Functional)) else model.weight.grad.t()
    assert relative_error(dw, independent.wgrad(e64, x64, seeds.transposed[-1])) < 1e-6
    if x.requires_grad:
        assert relative_error(x.grad.reshape(-1, I), independent.dgrad(e64, w64, seeds.plain[0])) < 1e-6


@pytest.mark.feature("Ways to write a linear", "{name}")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_in_float32(name: str, shape: str) -> None:
    torch.manual_seed(1)  # with 0 a draw of "W @ x" is within 3e-6 of the number that decides how a scale is rounded
    model = MODELS[name]()
    check_float32(model, torch.randn(SHAPES[shape], requires_grad=True))


def test_an_input_without_gradient_has_no_dgrad() -> None:
    check_float32(nn.Linear(I, O), torch.randn(40, I))


@pytest.mark.feature("Ways to train", "pure bfloat16")
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_results_are_rounded_once(autocast: bool, device: torch.device) -> None:
    """float32 weights under autocast, and a bfloat16 model: what the product would have read is quantized, its sum rounded once."""
    model = nn.Linear(I, O)
    x = torch.randn(2, 20, I, requires_grad=True)
    if not autocast:
        model, x = model.bfloat16(), x.detach().bfloat16().requires_grad_()
    y, e, seeds, report = train_step(model, x, torch.autocast(device.type, torch.bfloat16, enabled=autocast))
    assert report.linears[0].products == ("y", "dx", "dw")
    assert y.dtype == torch.bfloat16
    x64, w64, e64 = (float64(t.bfloat16().reshape(-1, t.shape[-1])) for t in (x, model.weight, e))
    expected = independent.linear(x64, w64) + float64(model.bias.bfloat16())
    # float32 and float64 sums round to different bfloat16 numbers only next to a midpoint: about 1e-4 of the elements
    assert off_by_more_than_rounding(y, expected.reshape(y.shape)) < 2e-3
    dx, dw = independent.dgrad(e64, w64, seeds.plain[0]), independent.wgrad(e64, x64, seeds.transposed[0])
    assert off_by_more_than_rounding(x.grad.reshape(-1, I).bfloat16(), dx) < 2e-3
    assert off_by_more_than_rounding(model.weight.grad.bfloat16(), dw) < 2e-3


@pytest.mark.feature("Ways to train", "float16")
def test_float16() -> None:
    model, x = nn.Linear(I, O).half(), torch.randn(40, I).half()
    compiled, _ = capture(model, min_features=1)
    with torch.no_grad():
        y = compiled(x)
    expected = independent.linear(float64(x), float64(model.weight)) + float64(model.bias)
    assert off_by_more_than_rounding(y, expected) < 2e-3


@pytest.mark.feature("Ways to write a linear", "frozen weight")
def test_a_frozen_weight_has_only_dgrad() -> None:
    model = nn.Linear(I, O).requires_grad_(False)
    x = torch.randn(40, I, requires_grad=True)
    _, e, seeds, report = train_step(model, x)
    assert report.linears[0].products == ("y", "dx")
    assert relative_error(x.grad, independent.dgrad(float64(e), float64(model.weight), seeds.plain[0])) < 1e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_frozen_weight_that_matmul_expands_over_the_batch(dynamic: bool) -> None:
    """No gradient for the weight, no bias, and tokens that do not lie one after the other: torch makes a batch of products of it."""
    model, x = nn.Linear(I, O, bias=False).requires_grad_(False), torch.randn(20, 2, I).transpose(0, 1).requires_grad_()
    backend = capture(model, min_features=1)[1]
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with recorded_seeds() as seeds:
        y = compiled(x)
        e = torch.randn_like(y)
        y.backward(e)
    (linear,) = backend.report(model).linears
    assert (linear.products, linear.shape) == (("y", "dx"), (40, I, O))
    x64, w64, e64 = (float64(t.reshape(-1, t.shape[-1])) for t in (x, model.weight, e))
    assert relative_error(y.reshape(-1, O), independent.linear(x64, w64)) < 1e-6
    assert relative_error(x.grad.reshape(-1, I), independent.dgrad(e64, w64, seeds.plain[0])) < 1e-6


@pytest.mark.feature("Ways to write a linear", "one weight used twice")
def test_one_weight_used_twice_is_two_sites_with_one_packed_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(80, 80, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(torch.tanh(self.l(x)))

    model, x = Twice(), torch.randn(40, 80, requires_grad=True)
    y, e, seeds, report = train_step(model, x)
    assert [linear.products for linear in report.linears] == [("y", "dx", "dw")] * 2
    assert report.graphs[0].forward.count("quartet.quantize.default") == 3, "two activations, one weight"
    w, e64, x64 = float64(model.l.weight), float64(e), float64(x)
    hidden = np.tanh(independent.linear(x64, w))
    assert relative_error(y, independent.linear(hidden, w)) < 1e-4  # a hidden value near a tie may move with float32
    # both products of the weight share its rotation; the second linear's backward runs first
    d_hidden = independent.dgrad(e64, w, seeds.plain[0]) * (1 - hidden**2)
    dw = independent.wgrad(e64, hidden, seeds.transposed[0]) + independent.wgrad(d_hidden, x64, seeds.transposed[1])
    assert seeds.plain[0] == seeds.plain[1]
    assert relative_error(model.l.weight.grad, dw) < 5e-3


@pytest.mark.feature("Ways to write a linear", "experts: {form}")
@pytest.mark.parametrize("form", ["bmm", "einsum", "weight on the left"])
def test_the_matrices_of_a_batch_are_linears_of_their_own(form: str) -> None:
    """As the experts of a mixture: each has its own tensor scales, rotations and draws."""
    experts = 3

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(experts, O, I) / 8 * torch.tensor([1.0, 100.0, 0.01])[:, None, None])

        def forward(self, x: Tensor) -> Tensor:
            if form == "einsum":
                return torch.einsum("eti,eoi->eto", x, self.w)
            if form == "bmm":
                return torch.bmm(x, self.w.transpose(1, 2))
            return torch.bmm(self.w, x.transpose(1, 2)).transpose(1, 2)

    model, x = Experts(), torch.randn(experts, 40, I, requires_grad=True)
    y, e, seeds, report = train_step(model, x)
    assert [linear.name for linear in report.linears] == [f"w[{i}]" for i in range(experts)]
    assert all(linear.products == ("y", "dx", "dw") for linear in report.linears)
    assert all(linear.shape == (40, I, O) for linear in report.linears)
    assert len(set(seeds.plain)) == len(set(seeds.transposed)) == experts
    for i in range(experts):
        x64, w64, e64 = (float64(t[i]) for t in (x, model.w, e))
        assert relative_error(y[i], independent.linear(x64, w64)) < 1e-6
        assert relative_error(x.grad[i], independent.dgrad(e64, w64, seeds.plain[i])) < 1e-6
        assert relative_error(model.w.grad[i], independent.wgrad(e64, x64, seeds.transposed[i])) < 1e-6


@pytest.mark.feature("Ways to write a linear", "experts that all read one input: {form}")
@pytest.mark.parametrize("form", ["expand", "unsqueeze and expand"])
def test_experts_that_read_one_input_quantize_it_once(form: str) -> None:
    experts = 3

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(experts, O, I) / 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.expand(experts, -1, -1) if form == "expand" else x.unsqueeze(0).expand(experts, -1, -1)
            return torch.bmm(x, self.w.transpose(1, 2))

    model, x = Experts(), torch.randn(40, I, requires_grad=True)
    y, e, seeds, report = train_step(model, x)
    assert [linear.name for linear in report.linears] == [f"w[{i}]" for i in range(experts)]
    assert report.graphs[0].forward.count("quartet.quantize.default(") == 1 + experts, "x, and each weight"
    assert len(set(seeds.transposed)) == 1, "a rotation belongs to what is saved"
    x64, w64, e64 = float64(x), float64(model.w), float64(e)
    dx = sum(independent.dgrad(e64[i], w64[i], seeds.plain[i]) for i in range(experts))
    assert relative_error(x.grad, dx) < 1e-6
    for i in range(experts):
        assert relative_error(y[i], independent.linear(x64, w64[i])) < 1e-6
        assert relative_error(model.w.grad[i], independent.wgrad(e64[i], x64, seeds.transposed[i])) < 1e-6


@pytest.mark.feature("Ways to compile", "inference: {mode}")
@pytest.mark.parametrize("mode", ["no_grad", "eval", "inference_mode"])
def test_inference(mode: str) -> None:
    model = nn.Sequential(nn.Linear(I, O), nn.Dropout(0.5)).eval()
    compiled, backend = capture(model, min_features=1)
    x = torch.randn(40, I)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "eval": contextlib.nullcontext}[mode]
    with context():
        y = compiled(x)
    assert relative_error(y, independent.linear(float64(x), float64(model[0].weight)) + float64(model[0].bias)) < 1e-6
    assert "y" in backend.report(model).linears[0].products


@pytest.mark.feature("Ways to compile", "dynamic batch and sequence length, compiled once")
def test_dynamic_batch_and_sequence_compile_once() -> None:
    model = nn.Linear(I, O)
    backend = capture(model, min_features=1)[1]
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in ((2, 20), (3, 17), (5, 64)):
        x = torch.randn(batch, length, I, requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad is not None
    assert len(backend.graphs) == 1
    assert backend.graphs[0].linears[0].products == ("y", "dx", "dw")


def test_an_input_stored_transposed() -> None:
    model, x = nn.Linear(80, 64), torch.randn(80, 40, requires_grad=True)
    compiled, backend = capture(model)
    with recorded_seeds() as seeds:
        y = compiled(x.t())
        e = torch.randn_like(y)
        y.backward(e)
    assert backend.report(model).linears[0].products == ("y", "dx", "dw")
    x64, w64, e64 = float64(x.t()), float64(model.weight), float64(e)
    assert relative_error(y, independent.linear(x64, w64) + float64(model.bias)) < 1e-6
    drawn = {*seeds.plain, *seeds.transposed}
    assert min(relative_error(x.grad.t(), independent.dgrad(e64, w64, s)) for s in drawn) < 1e-6
    assert min(relative_error(model.weight.grad, independent.wgrad(e64, x64, s)) for s in drawn) < 1e-6
