"""The self-tests of `quartet doctor`: every operator has one, and each sees a single wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DEVICES
from torch import Tensor

from quartet_compile.cli import cases, observed_cases, operators, step

OPERATORS = operators.operators()


def test_every_operator_has_a_self_test() -> None:
    assert "matmul" in OPERATORS
    assert sorted(operators.CASES) == OPERATORS


def test_an_operator_without_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(operators.CASES, "swizzle")
    assert operators.operator("swizzle", "cpu").status == "fail"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_equal_the_reference(name: str, device: str) -> None:
    check = operators.operator(name, device)
    assert check.status == "ok", check.finding
    assert device != "cpu" or check.finding == "equals the reference"


def test_an_operator_that_a_gpu_never_runs_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert operators.operator("matmul_swizzled", "cuda:0").finding == "not used on this GPU"


class OneWrongNumber:
    """The operators, of which one gives a wrong first number in one of its results."""

    def __init__(self, name: str, result: int) -> None:
        self.name, self.result = name, result

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.quartet, name)
        return self.broken(operator) if name == self.name else operator

    def broken(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results = operator(*args)
            wrong = (results if isinstance(results, (tuple, list)) else [results])[self.result]
            if wrong.dtype in (torch.uint8, torch.float8_e4m3fn):
                wrong.view(torch.uint8).view(-1)[0] ^= 1
            elif wrong.dtype == torch.float64:  # sums, which are compared but for their last bits
                wrong.view(-1)[0] *= 1.001
            else:
                wrong.view(-1)[0] += 2
            return results

        return call


def results_of(name: str) -> int:
    return len(getattr(torch.ops.quartet, name).default._schema.returns)


@pytest.mark.parametrize(("name", "result"), [(name, i) for name in OPERATORS for i in range(results_of(name))])
def test_one_wrong_number_is_seen(name: str, result: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for of in (cases, observed_cases):
        monkeypatch.setattr(of, "quartet", OneWrongNumber(name, result))
    check = operators.operator(name, "cpu")
    assert check.status == "fail"
    assert "differ" in check.finding
    assert check.advice


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_is_the_recipes(device: str) -> None:
    check = step.training_step(device)
    assert check.status == "ok", check.finding


def test_another_seed_or_none_at_all_would_be_seen() -> None:
    x, w, bias, e = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).double() for i, shape in enumerate(step._shapes()))
    y, dx, dw = step.recipe_step(x, w, bias, e, [1, 2])

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    _, other_dx, other_dw = step.recipe_step(x, w, bias, e, [3, 4])
    exact = x @ w.t() + bias, e @ w, e.t() @ x
    for ours, expected in ((other_dx, dx), (other_dw, dw), (exact[0], y), (exact[1], dx), (exact[2], dw)):
        assert 5 * step.FLIPS < apart(ours, expected) < 0.3
