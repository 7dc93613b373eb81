"""`report`: what a model that runs already was compiled to.

The backend remembers every graph that it was given. Here each goes once more through AOTAutograd, our pass and the partitioner, on fake
tensors, under the circumstances in which it was compiled. So the report is the same if torch took the code from its caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from quartet_compile.capture import GraphCapture
from quartet_compile.compilations import Compilation, compilations
from quartet_compile.names import parameter_paths
from quartet_compile.reports import GraphReport, Report


def report(compiled: Callable[..., Any]) -> Report:
    """What the backend made of a model or function in the calls up to now.

    compiled: what torch.compile returned, a module after ``module.compile``, or a module around such ones. The report has every graph:
    those between graph breaks, and those of earlier compilations, marked as superseded; not the second versions that `observe` has
    compiled. Nothing is compiled or run. Raises ValueError if the backend has compiled nothing of it yet.
    """
    model = getattr(compiled, "_orig_mod", compiled)
    chosen = _compilations_of(compiled, model)
    if not chosen:
        name = getattr(compiled, "__name__", type(model).__name__)
        raise ValueError(
            f'quartet.report: backend="quartet" has compiled nothing of {name} yet; call it first, or use quartet.explain, which calls it'
        )
    whole = look_into(chosen).report(model)
    graphs = [
        dataclasses.replace(graph, cached=c.cached, recompiled="" if _first_but_for_observed(c) else graph.recompiled)
        for graph, c in zip(whole.graphs, chosen, strict=True)
    ]
    return dataclasses.replace(whole, graphs=tuple(_mark_superseded(graphs, chosen, model)))


def _first_but_for_observed(c: Compilation) -> bool:
    """Whether the same code was compiled before only by `observe`. Numbers of frames begin anew after `torch._dynamo.reset`."""
    earlier = [
        o for o in compilations()
        if o.around.frame == c.around.frame and o.entered.number < c.entered.number and o.around.callers & c.around.callers
    ]  # fmt: skip
    return bool(earlier) and all(o.scope.observed is not None for o in earlier)


def look_into(compilations: Sequence[Compilation]) -> GraphCapture:
    """The graphs of these compilations, rewritten again."""
    capture = GraphCapture()
    for c in compilations:
        with c.surroundings():
            capture.trace(c.gm, c.inputs, c.parameters, c.embedded, c.options, c.scope, c.around, c.entered, c.autotuned, c.chosen)
    return capture


def _compilations_of(compiled: Callable[..., Any], model: Any) -> list[Compilation]:
    """Those in a call of the model, or that its parameters entered; only those of `compiled` itself, if there are any."""
    parameters = parameter_paths(model)
    context = _context(compiled)

    def is_own(c: Compilation) -> bool:
        return context is not None and any(other() is context for other in c.around.contexts)

    def concerns(c: Compilation) -> bool:
        return is_own(c) or any(m() is model for m in c.around.modules) or any(c.entered.names_of(p) for p in parameters)

    found = [c for c in compilations() if c.scope.observed is None and concerns(c)]
    return list(filter(is_own, found)) or found


def _context(compiled: Any) -> Any:
    """Dynamo's context of what torch.compile returned: it tells apart two compilations of one model."""
    if hasattr(compiled, "dynamo_ctx"):
        return compiled.dynamo_ctx
    function = getattr(compiled, "_compiled_call_impl", None) if isinstance(compiled, nn.Module) else compiled
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index("self")].cell_contents if "self" in names else None  # type: ignore[union-attr]


def _mark_superseded(graphs: list[GraphReport], chosen: list[Compilation], model: Any) -> list[GraphReport]:
    """Of graphs of the same code, for training or for inference, the one that a parameter of the model entered last counts for it.

    That is not always the last that was compiled: code of before is used again where a recipe comes back."""
    parameters = parameter_paths(model)
    marked, later = dict[int, GraphReport](), list[tuple[str, bool, set[int]]]()
    for i in sorted(range(len(chosen)), key=lambda i: -chosen[i].entered.last_call):
        graph, c = graphs[i], chosen[i]
        kind = c.around.frame, bool(graph.backward)
        entered = {id(p) for p in parameters if c.entered.names_of(p)}
        superseded = any(kind == (frame, trains) and (entered & own or not entered | own) for frame, trains, own in later)
        marked[i] = dataclasses.replace(graph, superseded=superseded)
        later.append((*kind, entered))
    return [marked[i] for i in range(len(graphs))]
