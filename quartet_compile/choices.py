"""A model captured once, of which each call says which linears are quantized.

The graphs of inference are captured as in a compilation and hold both versions of each product, the plain one and the rewritten one. Before
a call they are cut down to one of them, and are run without generating code. Where blocks are compiled one by one, or a graph breaks, one
graph serves several layers: the parameters that it is called with tell which, and each layer has a choice of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule, Node

from quartet_compile import embeddings
from quartet_compile.account import packed_bytes
from quartet_compile.backend import Decompositions, active_scope, only_in_scope, parameter_names
from quartet_compile.capture import _buffers_restored, _fresh_callable
from quartet_compile.flops import hint
from quartet_compile.kernels.format import ROTATION, ceil_to
from quartet_compile.kernels.grouped_ops import padded_rows
from quartet_compile.names import Entered, parameter_paths
from quartet_compile.options import Options
from quartet_compile.passes import compat
from quartet_compile.passes.locate import dotted
from quartet_compile.passes.match import match
from quartet_compile.passes.operand import Operand
from quartet_compile.passes.place import MODULE_KEY, SCOPE_KEY, Decision, Policy, Scope, place
from quartet_compile.passes.rewrite import rewrite
from quartet_compile.passes.share import share
from quartet_compile.passes.site import Site
from quartet_compile.reports import LinearReport

RECOMPILES = 64
"""How many forms of a piece of code may be captured: of batches of other shapes, and of layers that are not alike."""


@dataclass(frozen=True)
class Use:
    """A linear in one call of a graph, quantized or not.

    name: in the model. name_in_graph: as the globs of options see it. module: in the model, that whose forward computes it, which is what
    `set_recipe` sees. by_code, by_set_recipe: whether those chose its recipe. rewritten: whether that recipe quantizes. flops: of its
    forward product. weight, x: what identifies its operands in this call. packed_weight, packed_x, plain_x: their bytes in NVFP4, and the
    input's in its own dtype.
    """

    name: str
    name_in_graph: str
    module: str
    by_code: bool
    by_set_recipe: bool
    rewritten: bool
    flops: int
    weight: tuple[int, Operand]
    x: tuple[int, Operand]
    packed_weight: int
    packed_x: int
    plain_x: int


def kept_bytes(uses: Sequence[Use], left_out: Set[str]) -> int:
    """What a forward pass keeps of the operands of its linears, if it keeps all: packed weights, and each input packed, plain or both.

    left_out: names of linears that are not quantized although they could be. An estimate: it knows nothing of frozen weights, of inputs
    that something else keeps anyway, or of checkpointing.
    """
    kept: dict[Any, int] = {}
    for use in uses:
        if use.rewritten and use.name not in left_out:
            kept[use.weight] = use.packed_weight
            kept[use.x] = use.packed_x
        else:
            kept["plain", use.x] = use.plain_x
    return sum(kept.values())


class Choosing:
    """A module whose linears are quantized or not as `quantized` says, captured by its first calls.

    quantized: the names in the model of those that are, or None for all. uses: while it is None, the linears that calls met.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        self.quantized: Set[str] | None = None
        self.uses: list[Use] = []
        self._calls = 0
        self._paths = parameter_paths(model)
        self._compiled = torch.compile(_fresh_callable(model), backend=self._capture, **compat.fresh_compile_options())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. Under `measuring`, or torch captures training graphs, which is an error."""
        return self._compiled(*args, **kwargs)

    def _capture(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        tables = embeddings.mark_all(gm, example_inputs)
        parameters, embedded = parameter_names(gm, example_inputs), embeddings.marked(example_inputs)
        policy = self.options.policy(active_scope())
        graphs: list[GraphWithChoices] = []

        def inference(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(GraphWithChoices(graph, parameters, policy, embedded))
            return make_boxed_func(graphs[-1])

        compiled = aot_autograd(
            fw_compiler=_refuse_training, bw_compiler=_refuse_training, inference_compiler=inference, decompositions=Decompositions()
        )(gm, example_inputs)
        names: dict[tuple[int, ...], list[list[str]]] = {}

        def called(*args: Any) -> Any:
            weights = {name: args[index] for index, name in parameters.items()}
            key = tuple(map(id, weights.values()))  # a parameter of the model lives as long as we do; any other tensor has no name
            if key not in names:
                names[key] = [graph.names_in_model(weights, self.model, self._paths) for graph in graphs]
            for graph, own in zip(graphs, names[key], strict=True):
                if self.quantized is None:
                    self._calls += 1
                    self.uses += graph.uses(own, self._calls)
                graph.choose([self.quantized is None or name in self.quantized for name in own])
            return compiled(*args)

        return only_in_scope(embeddings.marking(called, tables), active_scope())


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and a random state that starts as it is now; mode, buffers and random state are restored behind it.

    A layer that Dynamo would give up to compile, because it came in too many forms, is an error: its linears would not be quantized.
    Fused attention layers of torch are off, since a model in training does not have them.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    limits = torch._dynamo.config.patch(recompile_limit=RECOMPILES, fail_on_recompile_limit_hit=True)
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=devices), _buffers_restored(model), torch.no_grad(), limits:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes.items():
            module.training = training


def _choice(plain: Any, quantized: Any) -> Any:
    raise AssertionError("a graph with choices is cut down before it runs")


def _put_beside(graph: Graph, old: Node, new: Node) -> None:
    with graph.inserting_after(old):
        choice = graph.call_function(_choice, (old, new))
    choice.meta.update(old.meta)
    old.replace_all_uses_with(choice, delete_user_cb=lambda user: user is not choice)


class GraphWithChoices:
    """A graph of inference with both versions of each product that its policy rewrites."""

    def __init__(self, gm: GraphModule, parameters: Mapping[int, str], policy: Policy, embedded: Set[int]) -> None:
        self.gm = gm
        self.scope = policy.scope
        self.decisions = [d for d in place(share(match(gm.graph, parameters, embedded)), policy) if isinstance(d.linear, Site)]
        sites = [(d.linear, d.recipe) for d in self.decisions if isinstance(d.linear, Site)]
        rewrite(gm.graph, sites, _put_beside)
        self.choices = gm.graph.find_nodes(op="call_function", target=_choice)
        self._chosen: list[bool] = []
        self._module = gm

    def names_in_model(self, weights: Mapping[str, Tensor], model: nn.Module, paths: Mapping[Tensor, list[str]]) -> list[str]:
        """The names of its linears, one for each decision, when it is called with these parameters. paths: the model's parameters."""
        entered = Entered()
        for name, weight in weights.items():
            if weight in paths:
                entered.add(weight, name)
        places = [d.linear.place for d in self.decisions]
        names = [entered.in_model(LinearReport(at.name, at.source, None, "", ""), paths).name for at in places]
        entered.forget(model)
        return names

    def uses(self, names: Sequence[str], call: int) -> list[Use]:
        return [_use(decision, self.scope, name, call) for decision, name in zip(self.decisions, names, strict=True)]

    def choose(self, quantized: Sequence[bool]) -> None:
        """Cut the graph down for its next calls. quantized: for each decision."""
        if self._chosen == list(quantized):
            return
        wanted = {d.linear.forward: q for d, q in zip(self.decisions, quantized, strict=True) if isinstance(d.linear, Site)}
        graph, copies = Graph(), dict[Node, Node]()
        graph.output(graph.graph_copy(self.gm.graph, copies))
        for choice in self.choices:
            plain, rewritten = choice.all_input_nodes
            copy = copies[choice]
            copy.replace_all_uses_with(copies[rewritten if wanted[plain] else plain])
            graph.erase_node(copy)
        graph.eliminate_dead_code()
        self._module, self._chosen = GraphModule(self.gm, graph), list(quantized)

    def __call__(self, *args: Any) -> Any:
        return self._module(*args)


def _use(decision: Decision, scope: Scope, name: str, call: int) -> Use:
    site = decision.linear
    assert isinstance(site, Site)
    tokens, features_in, features_out = (hint(n) for n in site.shape)
    rows = tokens if site.groups is None else padded_rows(tokens, site.groups)
    outs = features_out if site.groups is None else site.groups * ceil_to(features_out, ROTATION)
    stack = list((site.forward.meta.get("nn_module_stack") or {}).values())
    module = name.removesuffix(site.place.name) + (dotted(stack[-1][0]) if stack else "")
    return Use(
        name, site.place.name, module.strip("."), SCOPE_KEY in site.place.annotation or scope.code is not None,
        MODULE_KEY in site.place.annotation or scope.module is not None, not decision.recipe.is_empty,
        2 * tokens * features_in * features_out,
        (call, site.w), (call, site.x), packed_bytes(outs, features_in), packed_bytes(rows, features_in),
        tokens * features_in * site.x.base.meta["val"].element_size(),
    )  # fmt: skip


def _refuse_training(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise RuntimeError("the model computes gradients inside its forward (torch.enable_grad), which cannot be measured by forward passes")
