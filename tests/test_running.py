"""`quartet.report`: what a running model was compiled to, whatever happened on the way."""

from __future__ import annotations

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import Breaking, Model, tokens
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile import backend, compilations, names
from quartet_compile.passes.pipeline import Result
from quartet_compile.reports import GraphReport, Report


def plain(graph: GraphReport) -> GraphReport:
    """A graph without what only Dynamo knows."""
    return dataclasses.replace(graph, compile_id="", graph_break="", recompiled="", cached=False)


def compiled_lines(report: Report) -> list[tuple[Any, ...]]:
    return [(linear.name, linear.recipe, linear.decided_by, linear.products, linear.reason) for linear in report.linears]


def test_it_is_what_explain_says_and_what_the_pass_decided(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    results: list[Result] = []
    monkeypatch.setattr(compilations.Compilation, "decided", lambda self, result: results.append(result))
    model, i = Model(), tokens()
    step = torch.compile(model, backend="quartet", options={"quartet.exclude": ["layers.0.k"], "quartet.recompute": "operands"})
    with torch.autocast("cpu", torch.bfloat16):
        step(i).sum().backward()
        expected = quartet.explain(model, i, options={"quartet.exclude": ["layers.0.k"], "quartet.recompute": "operands"})
    report = quartet.report(step)  # outside of autocast
    assert {linear.dtype for linear in report.linears} == {"bfloat16"}
    assert list(map(plain, report.graphs)) == list(map(plain, expected.graphs))
    assert report.not_captured == expected.not_captured == ("unused",)
    (result,) = results
    assert [d.linear.place.name for d in result.decisions] == [linear.name for linear in report.linears]
    assert [d.recipe.name for d in result.decisions] == [linear.recipe for linear in report.linears]
    assert "another compilation" not in str(report)


def test_code_from_torchs_cache_is_reported_and_named(fresh_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_into: list[Any] = []
    monkeypatch.setattr(backend, "tell_cached", looked_into.append)
    model, i = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
    reports = []
    for _ in range(2):
        torch._dynamo.reset()
        step = torch.compile(model, backend="quartet")
        step(i).sum().backward()
        reports.append(quartet.report(step))
    assert not looked_into, "nobody reads logs here"
    assert [graph.cached for report in reports for graph in report.graphs] == [False, True]
    assert plain(reports[0].graphs[0]) == plain(reports[1].graphs[0])
    assert "graph 0 came from torch's cache" in str(reports[1])


def test_graph_breaks_and_recompilations() -> None:
    model = Breaking()
    step = torch.compile(model, backend="quartet")
    step(torch.randn(8, 64)).sum().backward()
    first = quartet.report(step)
    assert sorted(name for linear in first.linears for name in linear.names) == [
        "first", "first", "last", "layers.0.up", "layers.1.up", "layers.2.up",
    ]  # fmt: skip
    assert first.not_captured == ()
    broken = [graph for graph in first.graphs if graph.graph_break]
    assert broken
    assert all("graph_break()" in graph.graph_break and "test_report.py:" in graph.graph_break for graph in broken)

    step(torch.randn(24, 64)).sum().backward()  # compiled again, for a number of tokens that is dynamic
    second = quartet.report(step)
    assert len(second.graphs) == 2 * len(first.graphs)
    assert [graph.superseded for graph in second.graphs] == [True] * len(first.graphs) + [False] * len(first.graphs)
    assert "size mismatch" in second.graphs[-1].recompiled
    assert second.graphs[-1].compile_id.endswith("/1")
    assert [linear.names for linear in second.linears] == [linear.names for linear in first.linears]
    assert second.flops == 3 * first.flops, "the earlier ones are not counted"

    with torch.no_grad():
        step(torch.randn(24, 64))
    third = quartet.report(step)
    assert not any(graph.superseded for graph in third.graphs if graph.backward and graph.compile_id.endswith("/1"))
    assert sum(not graph.superseded for graph in third.graphs) == 2 * len(first.graphs), "training and inference stand beside each other"


def test_code_that_is_used_again_counts_again() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
    step = torch.compile(model, backend="quartet")

    def now() -> tuple[str, list[bool]]:
        step(x).sum().backward()
        report = quartet.report(step)
        (linear,) = report.linears
        return linear.recipe, [graph.superseded for graph in report.graphs]

    assert now() == ("quartet2", [False])
    handle = quartet.set_recipe(model, "bf16")
    assert now() == ("bf16", [True, False])
    handle.remove()
    assert now() == ("quartet2", [False, True])
    with quartet.recipe("bf16"):
        assert now() == ("bf16", [True, True, False])
    assert now() == ("quartet2", [False, True, True])
    first, by_setting, by_context = (graph.recompiled for graph in quartet.report(step).graphs)
    assert first == ""
    assert by_setting.startswith("a recipe was set on a module, or taken back (")
    assert by_context.startswith("it is called in another context, such as quartet.recipe or torch.device (")


@pytest.mark.parametrize("elements", [1000, None])
def test_what_was_compiled_to_observe_is_no_earlier_compilation(elements: int | None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
    step = torch.compile(model, backend="quartet")
    quartet.observe(step, every=2, file=None, elements=elements)
    for _ in range(2):
        step(x).sum().backward()
    (graph,) = quartet.report(step).graphs
    assert graph.compile_id.endswith("/1")
    assert graph.recompiled == ""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu()


def test_blocks_that_are_compiled_one_by_one() -> None:
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(8, 64, requires_grad=True)
    for block in model:
        block.compile(backend="quartet")
    model(x).sum().backward()
    report = quartet.report(model)
    (linear,) = report.linears
    assert linear.names == ("0.up", "1.up", "2.up")
    (linear,) = quartet.report(model[1]).linears
    assert linear.names == ("up",)


def test_functions_and_two_compilations_of_one_model() -> None:
    model, x = nn.Linear(64, 64), torch.randn(8, 64)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    step = torch.compile(loss, backend="quartet")
    other = torch.compile(model, backend="quartet", options={"quartet.recipe": "bf16"})
    step(x).backward()
    other(x).sum().backward()
    assert [linear.recipe for linear in quartet.report(step).linears] == ["quartet2"]
    assert [linear.recipe for linear in quartet.report(other).linears] == ["bf16"]
    assert [linear.recipe for linear in quartet.report(model).linears] == ["quartet2", "bf16"]


def test_what_was_never_called_is_an_error() -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="has compiled nothing of Linear yet; call it first"):
        quartet.report(torch.compile(model, backend="quartet"))


@pytest.mark.slow
def test_nothing_is_run_compiled_or_changed(tmp_path: Path) -> None:
    model, i = Model(), tokens()
    step = torch.compile(model, backend="quartet")
    step(i).sum().backward()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with torch._dynamo.config.patch(error_on_recompile=True):
        quartet.report(step)
        step(i).sum().backward()
    model.load_state_dict(state)
    torch.set_rng_state(random)
    quartet.report(step)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    del gradients
    # parameters carry plain data only: a model can still be saved whole, and is another one when it is loaded by another process
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert set(loaded.state_dict()) == set(state)
    (mine,) = quartet.report(step).graphs[0].linears[:1]
    assert mine.names == ("layers.0.q",)
    assert not any(names.Entered().names_of(p) for p in loaded.parameters())


def test_a_compilation_goes_with_its_code() -> None:
    model = nn.Linear(64, 64)
    step = torch.compile(model, backend="quartet")
    step(torch.randn(8, 64)).sum().backward()
    (mine,) = [c for c in compilations.compilations() if c.entered.names_of(model.weight)]
    number = mine.entered.number
    del step, mine
    torch._dynamo.reset()
    gc.collect()
    assert number not in [c.entered.number for c in compilations.compilations()]
