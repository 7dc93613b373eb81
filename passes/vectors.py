"""Products of a matrix with a vector: kept whole until every product has been counted, then written as Inductor would have it.

Inductor decomposes them before any pass sees them, and has no code for them otherwise. So they are no decompositions of the backend's
(`backend.Decompositions`), and here the decomposition is made up for: the sum of products, in float32 for narrower types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from quartet_compile.passes.nodes import add_call

aten, prims = torch.ops.aten, torch.ops.prims

NARROW = (torch.bfloat16, torch.float16)


def expand(graph: Graph) -> None:
    """Replace every `mv` by pointwise code and a sum, in place."""
    for node in graph.find_nodes(op="call_function", target=aten.mv.default):
        with graph.inserting_before(node):
            new = _expanded(graph, node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _expanded(graph: Graph, node: Node) -> Node:
    dtype = node.meta["val"].dtype
    arguments: Any = node.args
    matrix, vector = arguments
    if dtype in NARROW:
        matrix, vector = (
            add_call(graph, prims.convert_element_type.default, (n, torch.float32), node, f"{n.name}_float32") for n in (matrix, vector)
        )
    terms = add_call(graph, aten.mul.Tensor, (matrix, vector), node, f"{node.name}_terms")
    result = add_call(graph, aten.sum.dim_IntList, (terms, [1]), node, f"{node.name}_sum")
    return add_call(graph, prims.convert_element_type.default, (result, dtype), node, f"{node.name}_rounded") if dtype in NARROW else result
