"""Which nodes of a graph multiply matrices, and which hide that they do: regions and operators that are counted, not looked into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quartet_compile.passes import convolution
from quartet_compile.passes.locate import locate
from quartet_compile.passes.provenance import SHARDING_NAMESPACES, Kind, Origin, dynamo_input_index
from quartet_compile.passes.site import Unsupported

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.addmv.default,
    aten._grouped_mm.default, aten._scaled_mm.default, aten._trilinear.default,
}  # fmt: skip
"""Every operator that multiplies matrices. A convolution does if its kernel has one element (`convolution.is_pointwise`)."""

TORCH_NAMESPACES = ("aten", "prims", "prim", "inductor", "rngprims", "quartet")
"""Namespaces of operators that are known to hold no product beside `PRODUCTS`."""


def is_product(node: Node) -> bool:
    return node.target in PRODUCTS or convolution.is_pointwise(node)


def in_regions(node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str]) -> list[Unsupported]:
    """The products in the branches or regions of a higher-order operator that parameters enter: counted, not looked into."""
    weights = frozenset().union(*(origin[n].parameters for n in node.all_input_nodes))
    count = sum(_products_in(getattr(node.graph.owning_module, str(n.target))) for n in node.all_input_nodes if n.op == "get_attr")
    if not weights or not count:
        return []
    place = locate(node, [])
    return [Unsupported(place, node, f"{count} product(s) inside {node.target}, which is not looked into")]


def is_opaque(node: Node) -> bool:
    """True for an operator that neither torch nor we define: what it computes is not known."""
    return getattr(node.target, "namespace", "aten") not in {*TORCH_NAMESPACES, *SHARDING_NAMESPACES}


def entering(node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str]) -> list[Unsupported]:
    """The matrices among the parameters that enter an unknown operator beside an activation of numbers."""
    values: dict[Node, Any] = {n: n.meta.get("val") for n in node.all_input_nodes}
    numbers = [n for n, value in values.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if all(origin[n].kind is not Kind.ACTIVATION for n in numbers):
        return []
    matrices = [origin[n].parameters for n in numbers if origin[n].kind is not Kind.ACTIVATION and values[n].dim() >= 2]
    names = [[parameters[i] for i in map(dynamo_input_index, own) if i is not None] for own in matrices]
    return [Unsupported(locate(node, own), node, f"it enters {node.target}, which is not looked into") for own in names if own]


def _products_in(module: object) -> int:
    """Products of a graph and of the graphs inside it."""
    if not isinstance(module, GraphModule):
        return 0
    return sum(_products_in(m) for m in module.children()) + sum(map(is_product, module.graph.nodes))
