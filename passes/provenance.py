"""Where a tensor of a joint graph comes from: a parameter as it is, something computed from parameters, matrices that data picks from a
parameter, or an activation.

One walk over the graph in its order. Views, casts and the collectives that gather a sharded parameter keep it a parameter; any real
computation on the way makes it a computed weight.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

LAYOUT_OPS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.t.default, aten.transpose.int,
    aten.alias.default, aten.detach.default, aten.clone.default, aten.expand.default, aten.slice.Tensor, aten.as_strided.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.select.int, aten.cat.default,
    aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten._to_copy.default, torch.ops.prims.convert_element_type.default,
    operator.getitem,
}  # fmt: skip
"""Operators that move or cast a tensor without computing on it."""

PICKING_OPS = {aten.index.Tensor, aten.index_select.default}
"""Operators that pick from a tensor by an index that is data."""

SHARDING_NAMESPACES = ("_c10d_functional", "c10d_functional", "fsdp")
"""Namespaces whose operators gather, scatter or wait for a sharded tensor."""


class Kind(Enum):
    """What an operand is made of."""

    CONSTANT = "constant"
    PARAMETER = "parameter"
    COMPUTED = "computed from parameters"
    PICKED = "matrices picked from a parameter by data"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Origin:
    """Kind of a tensor and the parameters it was made from, as placeholder nodes."""

    kind: Kind
    parameters: frozenset[Node] = frozenset()


def dynamo_input_index(placeholder: Node) -> int | None:
    """Index of a joint-graph placeholder among the inputs of the graph that Dynamo captured; None for tangents and the like."""
    descriptor = placeholder.meta.get("desc")
    while descriptor is not None and hasattr(descriptor, "base"):  # tensor subclasses: an attribute of the input
        descriptor = descriptor.base
    index = getattr(descriptor, "idx", None)
    return index if type(descriptor).__name__ == "PlainAOTInput" else None


def origins(graph: Graph, parameters: Mapping[int, str]) -> dict[Node, Origin]:
    """The origin of every node. `parameters` maps the indices of Dynamo inputs that are nn.Parameters to their names."""
    found: dict[Node, Origin] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            is_parameter = dynamo_input_index(node) in parameters
            found[node] = Origin(Kind.PARAMETER, frozenset([node])) if is_parameter else Origin(Kind.ACTIVATION)
        elif node.op == "call_function":
            tensors = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))]
            found[node] = _combine(node, [found[n] for n in tensors])
        else:
            found[node] = Origin(Kind.CONSTANT)
    return found


def _combine(node: Node, inputs: list[Origin]) -> Origin:
    parameters = frozenset().union(*(i.parameters for i in inputs))
    moves_only = node.target in LAYOUT_OPS or getattr(node.target, "namespace", None) in SHARDING_NAMESPACES
    kinds = {i.kind for i in inputs}
    if Kind.ACTIVATION in kinds:
        return Origin(Kind.PICKED, parameters) if _picks_matrices(node, inputs) else Origin(Kind.ACTIVATION)
    if Kind.PICKED in kinds:
        return Origin(Kind.PICKED, parameters) if moves_only else Origin(Kind.ACTIVATION)
    if not parameters:
        return Origin(Kind.CONSTANT)
    if moves_only and all(i.kind in (Kind.PARAMETER, Kind.CONSTANT) for i in inputs):
        return Origin(Kind.PARAMETER, parameters)
    return Origin(Kind.COMPUTED, parameters)


def _picks_matrices(node: Node, inputs: list[Origin]) -> bool:
    """True for a choice among the matrices of one parameter, such as experts'; one among rows, such as an embedding's, is an activation."""
    if node.target not in PICKING_OPS or inputs[0].kind is not Kind.PARAMETER:
        return False
    (stack, chosen) = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return stack.dim() >= 3 and stack.shape[-2:] == chosen.shape[-2:]
