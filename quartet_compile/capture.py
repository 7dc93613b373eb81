"""`explain`: capture a model as torch.compile would, rewrite it, and report what happened, without compiling code.

The graphs go through Dynamo, AOTAutograd, our pass and the partitioner, exactly as in a compilation, and are then run by the interpreter
instead of Inductor. Caches are neither read nor written, so the report never depends on them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule, Node

from quartet_compile import embeddings
from quartet_compile.account import NOTHING, kinds_of, lines, products, saved_bytes
from quartet_compile.backend import Decompositions, active_scope, only_in_scope, parameter_names
from quartet_compile.circumstances import Circumstances, circumstances
from quartet_compile.kernels.chosen import Choice
from quartet_compile.marks import setting_of
from quartet_compile.names import Entered, parameter_paths
from quartet_compile.options import Options, split_options
from quartet_compile.passes import compat
from quartet_compile.passes.locate import ROOT_NAME
from quartet_compile.passes.pipeline import Result, run
from quartet_compile.passes.place import SET_RECIPE, Scope
from quartet_compile.reports import GraphReport, LinearReport, Report
from quartet_compile.source import source


def explain(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="quartet", options=options)`` would do for these arguments.

    model: a module or function; args, kwargs: what it is called with. One forward pass is run; parameters, buffers, gradients, the random
    state and earlier compilations are left as they were. Raises what the compilation would raise: ValueError for unknown options and
    recipes, an error for an unsupported linear under quartet.strict.
    """
    ours, others = split_options(options)
    collector = GraphCapture(ours, compat.autotunes(compat.inductor_settings(ours.mode, others)))
    model = getattr(model, "_orig_mod", model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _buffers_restored(model):
        torch.compile(_fresh_callable(model), backend=collector, **compat.fresh_compile_options())(*args, **kwargs)
    report = collector.report(model)
    for entered in collector.entered:
        entered.forget(model)
    return report


@contextmanager
def _buffers_restored(model: Any) -> Iterator[None]:
    """Give a module's buffers back the tensors and values that they had, also if the model raises."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tensors = [dict(module._buffers) for module in modules]
    lazy = torch.nn.parameter.is_lazy
    values = [{n: b.clone() for n, b in own.items() if b is not None and not lazy(b)} for own in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, own, before in zip(modules, tensors, values, strict=True):
                module._buffers.clear()
                module._buffers.update(own)
                for name, value in before.items():
                    own[name].copy_(value)  # type: ignore[union-attr]


def _fresh_callable(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable with a code object of its own, so that what Dynamo remembers of this capture is forgotten with it.

    A function is copied, because a frame around it would add to the names of its linears.
    """
    if isinstance(model, types.FunctionType):
        copy = types.FunctionType(model.__code__.replace(), model.__globals__, model.__name__, model.__defaults__, model.__closure__)
        copy.__kwdefaults__ = model.__kwdefaults__
        return copy

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


class GraphCapture:
    """A backend that rewrites and partitions like the real one, runs the graphs by the interpreter and reports on them."""

    def __init__(self, options: Options | None = None, autotuned: bool = False) -> None:
        self.options = options or Options()
        self.autotuned = autotuned
        self.graphs: list[GraphReport] = []
        self.results: list[Result] = []
        self.entered: list[Entered] = []
        """For each graph, the parameters that it was called with."""

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        tables = embeddings.mark_all(gm, example_inputs)
        parameters, embedded = parameter_names(gm, example_inputs), embeddings.marked(example_inputs)
        entered = Entered()
        scope, around = active_scope(), circumstances(gm)
        compiled = self.trace(gm, example_inputs, parameters, embedded, self.options, scope, around, entered, self.autotuned)
        return only_in_scope(embeddings.marking(entered.watching(compiled, parameters), tables), scope)

    def trace(
        self, gm: GraphModule, example_inputs: Sequence[Any], parameters: Mapping[int, str], embedded: Set[int], options: Options,
        scope: Scope, around: Circumstances, entered: Entered, autotuned: bool = False, chosen: Mapping[str, Choice] = NOTHING,
    ) -> Callable[..., Any]:  # fmt: skip
        """Rewrite and partition one graph of Dynamo's, and report on it. example_inputs: may be fake. entered: the parameters of its
        calls. autotuned: whether Inductor measures its choices for products. chosen: what it took (`account.lines`)."""
        policy = options.policy(scope)

        def add(joint: GraphModule, partition: Callable[[GraphModule], Any] | None, outputs: int) -> tuple[GraphModule, GraphModule | None]:
            plain = _copy(joint)
            before = partition(plain) if partition else (plain, None)
            kept_before = saved_bytes(before[0], outputs, kinds_of(joint.graph, parameters)) if partition else (0, 0)
            found = products(joint.graph)
            result = run(joint.graph, parameters, policy, options.recompute, embedded)
            joint.recompile()
            kinds = kinds_of(joint.graph, parameters)
            after = partition(joint) if partition else (joint, None)
            kept_after = saved_bytes(after[0], outputs, kinds) if partition else (0, 0)
            linears, others = lines(result, found, autotuned, chosen)
            self.results.append(result)
            self.entered.append(entered)
            forward, backward, forward_before, backward_before = map(source, (*after, *before))
            self.graphs.append(
                GraphReport(
                    linears, others, len(found), sum(p.flops for p in found.values()), kept_before[0], kept_after[0], kept_before[1],
                    kept_after[1], forward, backward, forward_before, backward_before, around.compile_id, around.graph_break,
                    around.recompiled,
                )
            )  # fmt: skip
            return after

        def partition(joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            def split(graph: GraphModule) -> Any:
                return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **kwargs)

            return add(joint, split, kwargs["num_fwd_outputs"])

        def inference(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return _boxed(add(graph, None, 0)[0], inputs)

        return aot_autograd(
            fw_compiler=_boxed, bw_compiler=_boxed, inference_compiler=inference, partition_fn=partition, decompositions=Decompositions()
        )(gm, example_inputs)

    def report(self, model: Any) -> Report:
        globs = [set(r.unmatched) for r in self.results]
        unmatched = set.intersection(*globs) if globs else set()
        paths = parameter_paths(model)
        graphs = []
        for graph, entered in zip(self.graphs, self.entered, strict=True):
            graphs.append(replace(graph, linears=tuple(_with_call(entered.in_model(linear, paths), model) for linear in graph.linears)))
        return Report(tuple(graphs), tuple(self._not_captured(model)), tuple(sorted(unmatched)))

    def _not_captured(self, model: Any) -> Iterator[str]:
        """Names of the weights that entered no graph, or of linears of which none was found in the graphs that they entered."""
        seen = {linear.name for graph in self.graphs for linear in graph.linears}
        entered = {p: {name for graph in self.entered for name in graph.names_of(p)} for p in parameter_paths(model)}
        seen_or_entered = seen.union(*entered.values())
        found: dict[nn.Module | nn.Parameter, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ():
            if isinstance(module, nn.Linear):
                there = entered.get(module.weight, ())
                if not any((name.removesuffix("weight").rstrip(".") or ROOT_NAME) in seen for name in there):
                    found.setdefault(module, []).append(path or ROOT_NAME)
            elif not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                for name, parameter in module.named_parameters(path, recurse=False):
                    if parameter.dim() >= 2 and not entered[parameter]:
                        found.setdefault(parameter, []).append(name)
        return (own[0] for own in found.values() if not seen_or_entered.intersection(own))


def _with_call(linear: LinearReport, model: Any) -> LinearReport:
    """The linear with the call of `set_recipe` or the schedule that decided, looked up in the model as it is now."""
    if linear.decided_by != SET_RECIPE:
        return linear
    settings = dict.fromkeys(filter(None, (setting_of(model, name) for name in linear.names)))
    calls = [call for recipe, call in settings if recipe == linear.recipe or linear.left_because == "unsupported"]
    return replace(linear, decided_by=f"{calls[0]} and {len(calls) - 1} more" if len(calls) > 1 else calls[0]) if calls else linear


def _copy(gm: GraphModule) -> GraphModule:
    """A graph that can be partitioned without changing the original; node metadata is copied flat."""
    graph = torch.fx.Graph()
    nodes: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, nodes))
    output.meta.update(gm.graph.find_nodes(op="output")[0].meta)
    return GraphModule(gm, graph)


def _boxed(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return make_boxed_func(gm.forward)
