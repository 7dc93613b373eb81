"""A head that is tied to an embedding stays in the model's dtype, wherever the embedding is looked up."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import capture, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters

import quartet_compile as quartet
from quartet_compile.passes.pipeline import QuartetPass
from quartet_compile.passes.place import Policy
from quartet_compile.recipes import RECIPES

REASON = "its weight is also an embedding"

Lookup = Callable[[Tensor, Tensor], Tensor]


def embedding(table: Tensor, i: Tensor) -> Tensor:
    return F.embedding(i, table)


class Broken(nn.Module):
    """A lookup, a linear and, behind a graph break, a product with all of the table or, untied, with a weight of its own."""

    def __init__(self, *, tied: bool = True, lookup: Lookup = embedding) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, 64))
        self.body, self.project = nn.Linear(64, 64), nn.Linear(64, 100, bias=False)
        self.lookup = lookup
        if tied:
            self.project.weight = self.table

    def forward(self, i: Tensor, whole: bool = True) -> tuple[Tensor, ...]:
        x = self.body(self.lookup(self.table, i))
        torch._dynamo.graph_break()
        return (x, self.project(x)) if whole else (x.clone(),)


def indices() -> Tensor:
    return torch.randint(0, 100, (4, 8))


def reasons(report: Any) -> dict[str, str]:
    return {linear.name: linear.reason for linear in report.linears}


@pytest.mark.parametrize(
    "lookup",
    [
        embedding,
        lambda table, i: torch.embedding(table, i),
        lambda table, i: F.embedding_bag(i, table),
        lambda table, i: F.embedding(i, weight=table.bfloat16().float()),
        lambda table, i: F.embedding(i, table.T.contiguous().T),
        lambda table, i: torch.ops.aten.embedding(table, i),
    ],
    ids=["functional", "torch", "bag", "cast", "transposed", "aten"],
)
def test_a_head_behind_a_graph_break_is_left(lookup: Lookup) -> None:
    model = Broken(lookup=lookup)
    compiled, backend = capture(model)
    compiled(indices())
    report = backend.report(model)
    assert len(report.graphs) == 2
    assert reasons(report) == {"body": "", "project": REASON}


def test_explain_and_include_speak_of_it() -> None:
    model, i = Broken(), indices()
    assert reasons(quartet.explain(model, i)) == {"body": "", "project": REASON}
    assert reasons(quartet.explain(model, i, options={"quartet.include": "project"})) == {"body": "", "project": ""}


def test_a_lookup_in_eager_code_is_found_in_the_modules_being_called() -> None:
    """Dynamo does not compile a function with a graph break in a loop; a head may also be compiled alone."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(100, 64), nn.Linear(64, 64)

        def forward(self, i: Tensor) -> Tensor:
            x = self.table(i)
            for _ in range(2):
                torch._dynamo.graph_break()
                x = self.body(x)
            return x

    class Head(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.project = nn.Linear(64, 100)
            self.project.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Loop()
            self.outer = Head(self.inner.table.weight)

        def forward(self, i: Tensor) -> Tensor:
            return self.outer(self.inner(i))

    model = Model()
    compiled, backend = capture(model)
    compiled(indices())
    assert reasons(backend.report(model))["outer.project"] == REASON
    regional = Model()
    _, backend = capture(regional)
    torch._dynamo.reset()
    regional.outer.compile(backend=backend)
    regional(indices())
    assert reasons(backend.report(regional)) == {"outer.project": REASON}


def test_a_table_that_is_made_of_an_activation_marks_no_parameter() -> None:
    """The rows that are looked up are no parameter's, though one was multiplied by on the way."""

    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(64, 64)

        def forward(self, x: Tensor, i: Tensor, n: int) -> Tensor:
            y = F.embedding(i, self.project(x)) + F.embedding(i, torch.ones(n, 64))
            torch._dynamo.graph_break()
            return self.project(y)

    model = Codebook()
    compiled, backend = capture(model)
    for n in (100, 101):  # the second time a symbol
        compiled(torch.randn(100, 64), indices(), n)
    assert reasons(backend.report(model)) == {"project": ""}


def test_a_graph_that_serves_two_models_marks_the_tables_of_both() -> None:
    first, second, i = Broken(), Broken(), indices()
    compiled, backend = capture(first)
    compiled(i, whole=False)
    torch.compile(second, backend=backend)(i)
    assert [graph.linears[0].name for graph in backend.report(None).graphs if graph.linears] == ["body", "project"], "body serves both"
    assert reasons(backend.report(second))["project"] == REASON


def test_parts_that_ddp_makes_of_one_graph_agree() -> None:
    """They are all compiled, with fake tensors, before the first one runs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(100, 64), nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
            self.project = nn.Linear(64, 100, bias=False)
            self.project.weight = self.table.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.project(self.body(self.table(i)))

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
            model = Model()
            compiled, backend = capture(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02))
            compiled(indices())
    finally:
        dist.destroy_process_group()
    report = backend.report(model)
    assert len([graph for graph in report.graphs if graph.linears]) > 1
    assert [linear.reason for linear in report.linears] == ["", "", "", "", REASON]


# ---------------------------------------------------------------- the real backend


@pytest.mark.usefixtures("fresh_caches")
def test_caches_tell_a_tied_head_from_another(caplog: pytest.LogCaptureFixture) -> None:
    """The graphs of both heads are the same, node by node."""
    i = indices()

    def run(model: Broken) -> tuple[bool, int, list[str]]:
        """(whether the product is exact, how many of the two graphs were not in the cache, what was said of heads)"""
        torch._dynamo.reset()
        counters.clear()
        caplog.clear()
        compiled = torch.compile(model, backend="quartet")
        with caplog.at_level(logging.INFO, "quartet_compile"):
            x, y = compiled(i)
        y.sum().backward()
        exact = relative_error(y, F.linear(x.detach(), model.project.weight)) < 1e-5
        said = [REASON for record in caplog.records if "left: " in record.getMessage() and REASON in record.getMessage()]
        return exact, counters["aot_autograd"]["autograd_cache_miss"], said

    model = Broken()
    assert run(model) == (True, 2, [REASON])
    assert run(model) == (True, 0, [REASON]), "the same again is a hit"
    assert run(Broken()) == (True, 0, [REASON]), "one like it, too"
    assert run(Broken(tied=False)) == (False, 1, []), "the part before the graph break is a hit"
    assert run(Broken()) == (True, 0, [REASON])


def test_the_key_contains_which_inputs_are_embeddings() -> None:
    plain, tied, other = (QuartetPass({0: "a", 1: "b"}, Policy(RECIPES), embedded=frozenset(known)).uuid() for known in ((), (1,), (0,)))
    assert len({plain, tied, other}) == 3


def test_tables_are_not_kept_alive_and_can_be_swapped() -> None:
    """torch.utils.swap_tensors, which converts modules of DTensors, refuses tensors with weak references."""
    model = Broken()
    with torch.no_grad():
        torch.compile(model, backend="quartet")(indices())
    torch.utils.swap_tensors(model.table, nn.Parameter(torch.randn(100, 64)))
    alive = weakref.ref(model.table)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


def test_checkpoints_hold_no_marks() -> None:
    model = Broken()
    compiled, _ = capture(model)
    compiled(indices())
    assert not any(hasattr(t, name) for t in model.state_dict().values() for name in vars(model.table))
