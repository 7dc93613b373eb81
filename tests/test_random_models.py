"""Random models against an eager interpreter of the recipe: every linear is found, and outputs and gradients are the same."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("hypothesis")

import random_models
import torch
from hypothesis import HealthCheck, given, settings
from support import capture, one_seed, relative_error
from torch import Tensor

MORE = int(os.environ.get("QUARTET_EXAMPLES", "40"))
"""Models of the slow test: QUARTET_EXAMPLES=500 pytest -m slow tests/test_random_models.py"""

ERROR = 1e-2
"""Relative, of an output or a gradient. Nearly all are equal bit for bit; where numbers are added in another order, as in W @ x against
x @ W.t(), one may be rounded differently, and a code with it. What belongs to another linear, or is missing, is off by about 1."""

random_settings = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def step(model: random_models.Model, x: Tensor, run: object, **kwargs: bool) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of the input and of all parameters."""
    case = model.case
    x = x.clone().requires_grad_(case.input_gradient)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "autocast"):
        y = run(x, **kwargs)  # type: ignore[operator]
    wanted = [t for t in (x, *model.weights) if t.requires_grad]
    if not y.requires_grad:
        return y, []
    e = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return y.detach(), list(torch.autograd.grad(y, wanted, e, allow_unused=True))


def check(case: random_models.Case) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = random_models.Model(case)
    x = torch.randn(case.batch, case.tokens, case.features, dtype=torch.bfloat16 if case.precision == "bfloat16" else torch.float32)
    compiled, backend = capture(model)
    with one_seed():
        expected, expected_gradients = step(model, x, model, eager=True)
        y, gradients = step(model, x, compiled)
    report = backend.report(model)
    assert len(report.linears) == model.linears, report
    assert all("y" in linear.products for linear in report.linears), report
    assert len(report.graphs) <= 1, "no graph breaks"
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    for ours, theirs in zip([y, *gradients], [expected, *expected_gradients], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is None:
            continue
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        if not bool(theirs.any()):
            assert not bool(ours.any())
        elif bool(theirs.isfinite().all()):
            assert relative_error(ours, theirs) < ERROR


@random_settings
@given(random_models.CASES)
def test_a_few_random_models(case: random_models.Case) -> None:
    check(case)


@pytest.mark.slow
@settings(random_settings, max_examples=MORE, derandomize=False)
@given(random_models.CASES)
def test_many_random_models(case: random_models.Case) -> None:
    check(case)
