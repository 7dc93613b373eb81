"""What the backend compiled: enough of each compilation to look into it afterwards (`running`), kept as long as its code."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from quartet_compile.circumstances import circumstances
from quartet_compile.kernels.chosen import Choice
from quartet_compile.names import Entered
from quartet_compile.options import Options
from quartet_compile.passes.pipeline import Result
from quartet_compile.passes.place import Scope

_all: weakref.WeakSet[Compilation] = weakref.WeakSet()


class Compilation:
    """One call of the backend.

    gm: a copy of Dynamo's graph, without the tensors that it was compiled for. inputs: fake ones. parameters, embedded: indices of inputs,
    see `QuartetPass`. around: its circumstances. entered: the parameters of its calls. cached: whether torch's cache had it, so that no
    pass ran. autotuned: whether Inductor measured its choices for products. chosen: what it took, by the products' names in its graphs.
    """

    def __init__(
        self, gm: GraphModule, example_inputs: Sequence[Any], parameters: dict[int, str], embedded: Set[int], options: Options, scope: Scope
    ) -> None:
        self.gm = _without_tensors(gm)
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        self.inputs = [node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)]
        self.parameters, self.embedded, self.options, self.scope = parameters, embedded, options, scope
        self.around = circumstances(gm)
        self.entered = Entered()
        self.cached, self.autotuned = True, False
        self.chosen: dict[str, Choice] = {}
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
        self._autocast = [(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in sorted(devices)]
        _all.add(self)

    def decided(self, result: Result) -> None:
        """What the pass tells when it runs."""
        self.cached = False

    def kept_by(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph, with which this compilation lives, watching its parameters."""
        watching: Any = self.entered.watching(compiled, self.parameters)
        watching.compilation = self
        return watching

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Gradients, autocast and fake tensors as they were when it was compiled."""
        fake_mode = detect_fake_mode(self.inputs) or FakeTensorMode()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            stack.enter_context(tracing(TracingContext(fake_mode)))
            if fake_mode.shape_env is not None:
                stack.enter_context(fake_mode.shape_env.ignore_fresh_unbacked_symbols())
            yield


def compilations() -> list[Compilation]:
    """All whose code is still there, in order."""
    return sorted(_all, key=lambda compilation: compilation.entered.number)


def _without_tensors(gm: GraphModule) -> GraphModule:
    """A copy that Inductor's passes do not change, and that keeps no input alive."""
    graph, nodes = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, nodes))
    for node, copied in nodes.items():
        copied.meta = {key: value for key, value in node.meta.items() if key not in ("grapharg", "tensor_dict")}
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    return GraphModule(gm, graph)
