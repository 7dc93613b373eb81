"""`explain`: capture a model as torch.compile would, rewrite it, and report what happened, without compiling code.

The graphs go through Dynamo, AOTAutograd, our pass and the partitioner, exactly as in a compilation, and are then run by the interpreter
instead of Inductor. Caches are neither read nor written, so the report never depends on them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from quartet_compile import embeddings
from quartet_compile.backend import Decompositions, active_scope, only_in_scope, parameter_names
from quartet_compile.flops import hint, product_flops
from quartet_compile.kernels.format import GROUP, ROTATION, ceil_to
from quartet_compile.kernels.grouped_ops import padded_rows
from quartet_compile.marks import setting_of
from quartet_compile.names import Entered, parameter_paths
from quartet_compile.options import Options, split_options
from quartet_compile.passes import compat
from quartet_compile.passes.locate import ROOT_NAME
from quartet_compile.passes.operand import Operand
from quartet_compile.passes.pipeline import Result, run
from quartet_compile.passes.place import SET_RECIPE, Decision
from quartet_compile.passes.provenance import Kind, origins
from quartet_compile.passes.site import Site
from quartet_compile.report import GraphReport, LinearReport, Report


def explain(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="quartet", options=options)`` would do for these arguments.

    model: a module or function; args, kwargs: what it is called with. One forward pass is run; parameters, buffers, gradients, the random
    state and earlier compilations are left as they were. Raises what the compilation would raise: ValueError for unknown options and
    recipes, an error for an unsupported linear under quartet.strict.
    """
    ours, others = split_options(options)
    compat.inductor_settings(ours.mode, others)  # for its checks
    collector = GraphCapture(ours)
    model = getattr(model, "_orig_mod", model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _buffers_restored(model):
        torch.compile(_fresh_callable(model), backend=collector, **compat.fresh_compile_options())(*args, **kwargs)
    return collector.report(model)


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

    def __init__(self, options: Options) -> None:
        self.options = options
        self.graphs: list[GraphReport] = []
        self.results: list[Result] = []
        self.entered: list[Entered] = []
        """For each graph, the parameters that it was called with."""

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        tables = embeddings.mark_all(gm, example_inputs)
        parameters, embedded = parameter_names(gm, example_inputs), embeddings.marked(example_inputs)
        policy = self.options.policy(active_scope())

        def partition(joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[GraphModule, GraphModule]:
            outputs = kwargs["num_fwd_outputs"]
            plain, _ = min_cut_rematerialization_partition(_copy(joint), inputs, compiler="inductor", **kwargs)
            before = _saved_bytes(plain, outputs, _kinds(joint, parameters))
            flops = product_flops(joint.graph)
            result = run(joint.graph, parameters, policy, self.options.recompute, embedded)
            kinds = _kinds(joint, parameters)
            forward, backward = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **kwargs)
            self.add(result, before, _saved_bytes(forward, outputs, kinds), forward, backward, flops)
            return forward, backward

        def inference(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            flops = product_flops(graph.graph)
            result = run(graph.graph, parameters, policy, self.options.recompute, embedded)
            graph.recompile()
            self.add(result, (0, 0), (0, 0), graph, None, flops)
            return _boxed(graph, inputs)

        first = len(self.graphs)
        compiled = aot_autograd(
            fw_compiler=_boxed, bw_compiler=_boxed, inference_compiler=inference, partition_fn=partition, decompositions=Decompositions()
        )(gm, example_inputs)

        entered = self.entered[first:]

        @functools.wraps(compiled)
        def called(*args: Any) -> Any:
            for graph in entered:
                for index, name in parameters.items():
                    graph.add(args[index], name)
            return compiled(*args)

        return only_in_scope(embeddings.marking(called, tables), active_scope())

    def add(
        self, result: Result, before: tuple[int, int], after: tuple[int, int], forward: GraphModule, backward: GraphModule | None,
        flops: int,
    ) -> None:  # fmt: skip
        self.results.append(result)
        linears = _linears(result)
        self.entered.append(Entered())
        sources = _source(forward), _source(backward)
        self.graphs.append(GraphReport(linears, before[0], after[0], before[1], after[1], *sources, flops))

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
        entered: Any = WeakTensorKeyDictionary()
        for graph in self.entered:
            for parameter, names in graph.names.items():
                entered.setdefault(parameter, set()).update(names)
        seen_or_entered = seen.union(*entered.values())
        found: dict[nn.Module | nn.Parameter, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ():
            if isinstance(module, nn.Linear):
                there = entered.get(module.weight, ())
                if not any((name.removesuffix("weight").rstrip(".") or ROOT_NAME) in seen for name in there):
                    found.setdefault(module, []).append(path or ROOT_NAME)
            elif not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                for name, parameter in module.named_parameters(path, recurse=False):
                    if parameter.dim() >= 2 and parameter not in entered:
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


def _source(gm: GraphModule | None) -> str:
    return "" if gm is None else gm.print_readable(print_output=False)


def _kinds(joint: GraphModule, parameters: Mapping[int, str]) -> dict[str, Kind]:
    return {node.name: origin.kind for node, origin in origins(joint.graph, parameters).items()}


def _saved_bytes(forward: GraphModule, outputs: int, kinds: Mapping[str, Kind]) -> tuple[int, int]:
    """Bytes that a forward graph hands to its backward, graph inputs and their views not counted: (activations, made of parameters)."""
    (results,) = forward.graph.find_nodes(op="output")[0].args
    activations = weights = 0
    for node in dict.fromkeys(results[outputs:]):
        if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor) or _is_input_view(node):
            continue
        size = hint(node.meta["val"].numel()) * node.meta["val"].element_size()
        if kinds.get(node.name, Kind.ACTIVATION) is Kind.ACTIVATION:
            activations += size
        else:
            weights += size
    return activations, weights


def _is_input_view(node: Node) -> bool:
    """True for a graph input or a view of one: keeping it costs nothing."""
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _linears(result: Result) -> tuple[LinearReport, ...]:
    seen: set[Operand] = set()
    return tuple(_linear(decision, seen, result.recomputed) for decision in result.decisions)


def _linear(decision: Decision, seen: set[Operand], recomputed: frozenset[Operand]) -> LinearReport:
    """One line. `seen` holds the inputs that earlier linears keep already (q, k and v read the same one)."""
    linear, recipe = decision.linear, decision.recipe
    at = linear.place
    if not isinstance(linear, Site):
        return LinearReport(at.name, at.source, None, "bf16", decision.decided_by, (), decision.reason, decision.left_because)
    tokens, features_in, features_out = (hint(n) for n in linear.shape)
    present = (("y", recipe.forward, True), ("dx", recipe.dgrad, linear.dgrad is not None), ("dw", recipe.wgrad, linear.wgrad is not None))
    products = tuple(name for name, cells, exists in present if cells is not None and exists)
    before = after = 0
    if linear.wgrad is not None and linear.x not in seen:
        seen.add(linear.x)
        before = tokens * features_in * linear.x.base.meta["val"].element_size()
        rows = tokens if linear.groups is None else padded_rows(tokens, linear.groups)
        after = _packed_bytes(rows, features_in) if "dw" in products else before
        after = 0 if linear.x in recomputed else after
    outs = features_out if linear.groups is None else linear.groups * ceil_to(features_out, ROTATION)
    weight = _packed_bytes(outs, features_in) if "dx" in products and linear.w not in recomputed else 0
    return LinearReport(
        linear.name, at.source, (tokens, features_in, features_out), recipe.name, decision.decided_by, products, decision.reason,
        decision.left_because, before, after, weight, flops=2 * tokens * features_in * features_out * sum(exists for *_, exists in present),
    )  # fmt: skip


def _packed_bytes(rows: int, columns: int) -> int:
    padded = ceil_to(columns, GROUP)
    return rows * (padded // 2 + padded // GROUP) + 4
