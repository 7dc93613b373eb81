"""Whose gradient is whose: backward products are given to the linear that they belong to."""

from __future__ import annotations

from typing import Any

import float64_recipe as independent
import torch
from support import capture, relative_error, train_step
from torch import Tensor, nn


def test_a_linear_without_gradient_takes_none_from_the_linear_before_it() -> None:
    """Operators outside the autograd graph carry the sequence number of the differentiable one before them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained, self.frozen = nn.Linear(80, 80), nn.Linear(80, 80).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.trained(x) + self.frozen(x)

    model, x = Model(), torch.randn(40, 80)
    compiled, backend = capture(model, exclude=["trained"])
    y = compiled(x)
    e = torch.randn_like(y)
    y.backward(e)
    trained, frozen = backend.report(model).linears
    assert (trained.products, frozen.products) == ((), ("y",))
    torch.testing.assert_close(model.trained.weight.grad, e.t() @ x)


def test_student_and_teacher_keep_apart() -> None:
    student, teacher, x = nn.Linear(80, 80), nn.Linear(80, 80), torch.randn(40, 80)

    def distil(x: Tensor) -> Tensor:
        y = student(x)
        with torch.no_grad():
            t = teacher(x)
        return (y - t).square().sum()

    compiled, backend = capture(distil)
    compiled(x).backward()
    assert [linear.products for linear in backend.report(None).linears] == [("y", "dw"), ("y",)]
    assert teacher.weight.grad is None


def test_products_in_a_custom_backward_are_gradients_and_no_forward_linears() -> None:
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx: Any, e: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return e @ w, e.t() @ x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(80, 80))

        def forward(self, x: Tensor) -> Tensor:
            return Custom.apply(x, self.weight)

    model, x = Model(), torch.randn(40, 80, requires_grad=True)
    _, e, seeds, report = train_step(model, x)
    (linear,) = report.linears
    assert linear.products == ("y", "dx", "dw")
    x64, w64, e64 = (t.detach().double().numpy() for t in (x, model.weight, e))
    assert relative_error(x.grad, independent.dgrad(e64, w64, seeds.plain[0])) < 1e-6
    assert relative_error(model.weight.grad, independent.wgrad(e64, x64, seeds.transposed[0])) < 1e-6
