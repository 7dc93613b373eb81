"""The report names the channel that decided each recipe: which decorator, context, call, option or rule; also where the graph breaks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import capture
from torch import Tensor, nn

import quartet_compile as quartet

BREAKS = pytest.mark.parametrize("breaks", [False, True], ids=["whole graph", "graph break"])


def pause(breaks: bool) -> None:
    if breaks:
        torch._dynamo.graph_break()


class Plain(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.q, self.k, self.breaks = nn.Linear(64, 64), nn.Linear(64, 64), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x)
        pause(self.breaks)
        return self.k(x)


@quartet.recipe("bf16")
class Decorated(Plain):
    pass


class WithMethod(Plain):
    @quartet.recipe("bf16")
    def both(self, x: Tensor) -> Tensor:
        x = self.q(x)
        pause(self.breaks)
        return self.k(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


@quartet.recipe("bf16")
def both(model: Plain, x: Tensor) -> Tensor:
    x = model.q(x)
    pause(model.breaks)
    return model.k(x)


class WithFunction(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return both(self, x)


class WithContext(Plain):
    """A graph break inside a context in compiled code is an error of torch's, so here it lies behind."""

    def forward(self, x: Tensor) -> Tensor:
        with quartet.recipe("bf16"):
            x = self.k(self.q(x))
        pause(self.breaks)
        return x * 2


class Outer(nn.Module):
    """A linear beside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def decided(model: nn.Module, breaks: bool, call: Callable[[Any, Tensor], Any] | None = None, **options: Any) -> dict[str, tuple[str, str]]:
    """name -> (recipe, who decided), of a model that breaks its graph or not."""
    compiled, backend = capture(model, **options)
    x = torch.randn(16, 64, requires_grad=True)
    y = call(compiled, x) if call else compiled(x)
    y.sum().backward()
    report = backend.report(model)
    assert (len(report.graphs) > 1) == breaks
    return {linear.name: (linear.recipe, linear.decided_by) for linear in report.linears}


DEFAULT = ("quartet2", "default")


@BREAKS
@pytest.mark.feature("Choosing recipes", "the report names the channel, across a graph break")
@pytest.mark.parametrize(
    ("kind", "channel"),
    [
        (Decorated, "decorator on class Decorated"),
        (WithMethod, "decorator on method WithMethod.both"),
        (WithFunction, "decorator on function both"),
        (WithContext, "context"),
    ],
)
def test_a_mark_in_the_models_code(kind: type[Plain], channel: str, breaks: bool) -> None:
    found = decided(Outer(kind(breaks)), breaks)
    assert found == {"inner.q": ("bf16", channel), "inner.k": ("bf16", channel), "out": DEFAULT}


@BREAKS
def test_a_context_around_the_call(breaks: bool) -> None:
    def call(compiled: Any, x: Tensor) -> Tensor:
        with quartet.recipe("bf16"):
            return compiled(x)

    assert set(decided(Plain(breaks), breaks, call).values()) == {("bf16", "context around the call")}


@BREAKS
def test_a_decorated_function_around_the_call(breaks: bool) -> None:
    @quartet.recipe("bf16")
    def train_step(compiled: Any, x: Tensor) -> Tensor:
        return compiled(x)

    assert set(decided(Plain(breaks), breaks, train_step).values()) == {("bf16", "decorator on function train_step")}


@BREAKS
def test_the_innermost_of_several_marks(breaks: bool) -> None:
    def call(compiled: Any, x: Tensor) -> Tensor:
        with quartet.recipe("quartet2"):
            return compiled(x)

    by_class = ("bf16", "decorator on class Decorated")
    assert decided(Outer(Decorated(breaks)), breaks, call) == {
        "inner.q": by_class, "inner.k": by_class, "out": ("quartet2", "context around the call"),
    }  # fmt: skip


@BREAKS
@pytest.mark.parametrize(
    ("only", "selector", "chosen"),
    [
        (None, "model", ("inner.q", "inner.k", "out")),
        ("inner", "only='inner'", ("inner.q", "inner.k")),
        ("*.k", "only='*.k'", ("inner.k",)),
        (Plain, "only=Plain", ("inner.q", "inner.k")),
    ],
)
def test_a_call_of_set_recipe_and_its_selector(only: Any, selector: str, chosen: tuple[str, ...], breaks: bool) -> None:
    model = Outer(Plain(breaks))
    quartet.set_recipe(model, "bf16", only=only)
    said = ("bf16", f"set_recipe({selector})")
    assert decided(model, breaks) == {name: said if name in chosen else DEFAULT for name in ("inner.q", "inner.k", "out")}


@BREAKS
def test_the_innermost_of_several_settings(breaks: bool) -> None:
    model = Outer(Plain(breaks))
    quartet.set_recipe(model, "quartet2")
    quartet.set_recipe(model, "bf16", only="inner")
    quartet.set_recipe(model, "quartet2", only="inner.k")
    assert decided(model, breaks) == {
        "inner.q": ("bf16", "set_recipe(only='inner')"),
        "inner.k": ("quartet2", "set_recipe(only='inner.k')"),
        "out": ("quartet2", "set_recipe(model)"),
    }


def test_a_setting_that_was_taken_back_since_is_not_named() -> None:
    model, x = Plain(False), torch.randn(16, 64)
    compiled, backend = capture(model)
    handle = quartet.set_recipe(model, "bf16", only="q")
    compiled(x)
    named = [linear.decided_by for linear in backend.report(model).linears]
    handle.remove()
    assert named == ["set_recipe(only='q')", "default"]
    assert [linear.decided_by for linear in backend.report(model).linears] == ["set_recipe", "default"]


def test_settings_of_linears_that_cannot_be_rewritten_are_named_too() -> None:
    model, x = Plain(False).double(), torch.randn(16, 64, dtype=torch.float64)
    quartet.set_recipe(model, "quartet2", only="q")
    compiled, backend = capture(model)
    compiled(x)
    assert [(linear.recipe, linear.decided_by) for linear in backend.report(model).linears] == [
        ("bf16", "set_recipe(only='q')"), ("bf16", "default"),
    ]  # fmt: skip


@BREAKS
def test_a_schedule(breaks: bool) -> None:
    model = Outer(Plain(breaks))
    quartet.RecipeSchedule(model, {0: "bf16"}, only="inner")
    said = ("bf16", "schedule (bf16 from step 0)")
    assert decided(model, breaks) == {"inner.q": said, "inner.k": said, "out": DEFAULT}


@BREAKS
def test_options_and_the_environment(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Globs see names as the graph has them: the rest of a module whose child broke the graph is compiled by itself."""
    monkeypatch.setenv("QUARTET_OPTIONS", "exclude=*k; include=out,(root)")
    assert decided(Outer(Plain(breaks)), breaks, exclude=["*q"]) == {
        "inner.q": ("bf16", "quartet.exclude '*q'"),
        "inner.k": ("bf16", "QUARTET_OPTIONS exclude '*k'"),
        "out": ("quartet2", f"QUARTET_OPTIONS include {'(root)' if breaks else 'out'!r}"),
    }


class Exceptions(nn.Module):
    """A linear for each default."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.tied = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
        self.tied.weight = self.embedding.weight
        self.router, self.small, self.scaled, self.head = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 64), nn.Linear(64, 64)
        self.up = nn.Linear(64, 64)

    def forward(self, i: Tensor) -> Tensor:
        x = self.embedding(i)
        x = self.up(self.router(x)) + self.small(x).sum()
        x = nn.functional.linear(x, self.scaled.weight * 2)
        return self.tied(x) + self.head(x)


def test_which_default() -> None:
    model = Exceptions()
    compiled, backend = capture(model)
    compiled(torch.randint(64, (16,)))
    found = {linear.name: linear.decided_by for linear in backend.report(model).linears}
    assert found == {
        "up": "default",
        "router": "default (router)",
        "small": "default (min_features)",
        "scaled": "default (computed weight)",
        "tied": "default (tied weight)",
        "head": "default (output head)",
    }
    options = {"quartet.recipe": "quartet2", "quartet.min_features": 48}
    report = quartet.explain(model, torch.randint(64, (16,)), options=options)
    given = {linear.name: linear.decided_by for linear in report.linears}
    assert given == found | {"up": "quartet.recipe", "small": "quartet.min_features"}


def test_logs_name_the_channel_of_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with caplog.at_level(logging.INFO, "quartet_compile"), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend="quartet", options={"quartet.exclude": "1"})(torch.randn(16, 64))
    assert "  left: 1: asked for bf16 [quartet.exclude '1']" in [record.getMessage() for record in caplog.records]
