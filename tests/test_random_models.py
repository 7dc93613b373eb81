"""Random models against an eager interpreter of the recipe: every linear is found, and outputs and gradients are the same."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis.strategies import just
from model_interpreter import Interpreter
from random_models import Model
from random_programs import Case, cases
from support import capture, one_seed, relative_error
from torch import Tensor

MORE = int(os.environ.get("QUARTET_EXAMPLES", "40"))
"""Models of the slow test: QUARTET_EXAMPLES=500 pytest -m slow tests/test_random_models.py"""

SECONDS = float(os.environ.get("QUARTET_SHRINKING_SECONDS", "60"))
"""How long smaller models are looked for that fail, too."""

ERROR = 1e-2
"""Relative, of an output or a gradient. Nearly all are equal bit for bit; where numbers are added in another order, as in W @ x against
x @ W.t(), one may be rounded differently, and a code with it. What belongs to another linear, or is missing, is off by about 1."""

random_settings = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


def step(model: Model, x: Tensor, run: Any, *ways: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the gradients of the input and of all parameters; with losses apart, none is a zero."""
    case = model.case
    x = x.clone().requires_grad_(case.input_gradient)
    with torch.autocast("cpu", case.autocast, enabled=case.autocast is not None):
        outputs = list(run(x, *ways))
    random = torch.Generator().manual_seed(7)
    losses = [(y, torch.randn(y.shape, generator=random).to(y.dtype)) for y in outputs]
    losses = [(y, e) for y, e in losses if y.requires_grad]
    wanted = [t for t in (x, *model.weights) if t.requires_grad]
    gradients: list[Any] = []
    if losses and case.losses_apart:
        gradients = [torch.zeros_like(t) for t in wanted]
        for i, (y, e) in enumerate(losses):
            own = torch.autograd.grad(y, wanted, e, allow_unused=True, retain_graph=i < len(losses) - 1)
            gradients = [total if g is None else total + g for total, g in zip(gradients, own, strict=True)]
    elif losses:
        ys, es = zip(*losses, strict=True)
        gradients = list(torch.autograd.grad(ys, wanted, es, allow_unused=True))
    return [y.detach() for y in outputs], gradients


def check(case: Case) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(case)
    x = torch.randn(case.batch, case.tokens, case.features).to(case.dtype)
    everything, excluded = ["*"] if case.everything else [], list(model.excluded)
    backend = capture(model, include=everything, exclude=excluded, min_features=case.min_features, recompute=case.recompute)[1]
    compiled = torch.compile(model, backend=backend, dynamic=case.dynamic_sizes or None)
    interpreter = Interpreter(case.everything, tuple(excluded), case.min_features)
    # A graph of dynamic shapes has its backward pass compiled before torch knows that it will run twice.
    with one_seed(), torch._functorch.config.patch(donated_buffer=not case.losses_apart):
        expected, expected_gradients = step(model, x, model, interpreter)
        outputs, gradients = step(model, x, compiled)
    report = backend.report(model)
    assert [(n.name, n.shape, n.products, n.left_because) for n in report.linears] == interpreter.seen, report
    assert all(bool(n.reason) == (not n.products) for n in report.linears), report
    assert report.not_captured == model.unused, report
    assert len(report.graphs) <= 1, "no graph breaks"
    assert [(y.dtype, y.shape) for y in outputs] == [(y.dtype, y.shape) for y in expected]
    for ours, theirs in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is None:
            continue
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        if not bool(theirs.any()):
            assert not bool(ours.any())
        elif bool(theirs.isfinite().all()):
            assert relative_error(ours, theirs) < ERROR


class Shrinking:
    """Checks cases, but some time after the first that failed only those that did: hypothesis has no limit of its own to set."""

    def __init__(self) -> None:
        self.failed: dict[Case, None] = {}
        self.until = float("inf")

    def check(self, case: Case) -> None:
        if time.monotonic() > self.until and case not in self.failed:
            reject()
        try:
            check(case)
        except Exception:
            self.until = min(self.until, time.monotonic() + SECONDS)
            self.failed[case] = None
            raise


def test_a_few_random_models() -> None:
    random_settings(given(cases(longest=2, dynamic=just(False)))(Shrinking().check))()


@pytest.mark.slow
def test_many_random_models() -> None:
    settings(random_settings, max_examples=MORE, derandomize=False)(given(cases(longest=4))(Shrinking().check))()
