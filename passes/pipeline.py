"""The pass that Inductor runs on a joint graph: match, share, place, rewrite, recompute, with a cache key that sees all it depends on.

On observed steps `observe` follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from quartet_compile import kernels
from quartet_compile.passes.match import match
from quartet_compile.passes.observe import observe
from quartet_compile.passes.place import Decision, Policy, place, unmatched_globs
from quartet_compile.passes.recompute import recompute
from quartet_compile.passes.rewrite import Written, rewrite
from quartet_compile.passes.share import share
from quartet_compile.passes.site import Site
from quartet_compile.passes.tell import tell_decisions, tell_graph
from quartet_compile.passes.vectors import expand


@dataclass(frozen=True)
class Result:
    """What was decided for one graph.

    decisions: one for each linear. unmatched: the option globs that matched nothing in it. recomputed: the quantizers that run
    again in the backward pass. products: the nodes that multiplied before, of each linear. written: what came in place of them.
    """

    decisions: tuple[Decision, ...]
    unmatched: tuple[tuple[str, str], ...]
    recomputed: frozenset[Node]
    products: tuple[tuple[Node, ...], ...]
    written: tuple[Written, ...]


def run(graph: Graph, parameters: Mapping[int, str], policy: Policy, again: str, embedded: Set[int] = frozenset()) -> Result:
    """Rewrite a joint or inference graph in place. again: what the backward pass recomputes, of `recompute.CHOICES`. embedded: see `match`.

    An error leaves the graph as it was.
    """
    linears = share(match(graph, parameters, embedded))
    decisions = place(linears, policy)
    products = tuple(d.linear.products for d in decisions)
    written = rewrite(graph, [(d.linear, d.recipe) for d in decisions if isinstance(d.linear, Site)])
    recomputed = recompute(graph, parameters, again)
    if policy.scope.observed is not None:
        observe(graph, written, policy.scope.observed)
    expand(graph)
    return Result(tuple(decisions), tuple(unmatched_globs(linears, policy)), recomputed, products, tuple(written))


class QuartetPass(CustomGraphPass):
    """`run` as a custom pass of Inductor.

    parameters: index of a Dynamo input -> name, for those that are nn.Parameters. again, embedded: see `run`. fingerprint: whatever the
    decisions read from the graph that Inductor's cache key does not contain (`fingerprint`). on_result: called with the `Result` each time
    the pass runs, which a cache hit prevents.
    """

    def __init__(
        self, parameters: Mapping[int, str], policy: Policy, again: str = "none", fingerprint: str = "",
        on_result: Callable[[Result], None] | None = None, embedded: Set[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.policy = policy
        self.again = again
        self.fingerprint = fingerprint
        self.on_result = on_result
        self.embedded = embedded

    def __call__(self, graph: Graph) -> None:
        tell_graph(graph, "before")
        result = run(graph, self.parameters, self.policy, self.again, self.embedded)
        tell_graph(graph, "after")
        tell_decisions(result.decisions, result.unmatched)
        if self.on_result is not None:
            self.on_result(result)

    def uuid(self) -> Any:
        inputs = repr(sorted(self.parameters.items())), repr(sorted(self.embedded))
        return "quartet", source_hash(), repr(self.policy), self.again, *inputs, self.fingerprint


@cache
def source_hash() -> str:
    """A hash over the sources of passes and kernels, so that an edited rule never meets a stale cache entry."""
    digest = hashlib.sha256()
    roots = (Path(__file__).parent, Path(kernels.__file__).parent)
    for path in sorted(p for root in roots for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(gm: GraphModule) -> str:
    """A hash over the metadata that decisions depend on (module paths, annotations), which torch leaves out of its cache keys."""
    digest = hashlib.sha256()
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
                digest.update(repr((node.name, paths, node.meta.get("custom"))).encode())
    return digest.hexdigest()
