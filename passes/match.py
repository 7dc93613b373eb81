"""Step 1: find every linear of a joint graph, with its three products.

A linear is a matrix product of an activation with a parameter. Its forward is `mm`, `addmm` or, for each matrix of a batch, `bmm`, with the
weight on either side; its gradients are the backward `mm` or `bmm` nodes that carry the same autograd sequence number and read the same
weight (dgrad) or the same activation (wgrad). Both signs must agree: the number alone also names nodes we do not know, and the structure
alone cannot tell two uses of one weight apart.

Products of an activation with something that stems from a parameter, but in a form that is not rewritten, come back as `Unsupported`,
so that every linear is accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quartet_compile.kernels.ops import OPERAND_DTYPES
from quartet_compile.passes.locate import Place, locate
from quartet_compile.passes.operand import Batch, Operand, operand
from quartet_compile.passes.provenance import SHARDING_NAMESPACES, Kind, Origin, dynamo_input_index, origins

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.addmv.default,
    aten._grouped_mm.default, aten._scaled_mm.default, aten._trilinear.default,
}  # fmt: skip
"""Every operator that multiplies matrices. A convolution does if its kernel has one element (`_is_product`)."""

TORCH_NAMESPACES = ("aten", "prims", "prim", "inductor", "rngprims", "quartet")
"""Namespaces of operators that are known to hold no product beside `PRODUCTS`."""

REWRITTEN: dict[Any, Any] = {aten.mm.default: aten.mm.default, aten.addmm.default: aten.mm.default, aten.bmm.default: aten.bmm.default}
"""The operators that are rewritten, and the operator that their gradients are."""


@dataclass(frozen=True)
class Gradient:
    """A backward product of a linear: the node, its gradient operand, and whether it holds the transposed result ([I, O] for dW,
    [I, T] for dX)."""

    node: Node
    e: Operand
    transposed: bool = False


@dataclass(frozen=True)
class Site:
    """One linear: x [T, I] times w [O, I] transposed, plus bias [O].

    forward: the node that holds y [T, O] or, transposed, y [O, T]. Of a batched product the site is one matrix, number `batch` of all its
    tensors; or, "folded", the whole of it, where all matrices meet the same weight. computed: the weight is computed from parameters.
    embeds: an embedding reads the same parameter.
    """

    place: Place
    forward: Node
    x: Operand
    w: Operand
    bias: Node | None
    parameters: frozenset[Node]
    dgrad: Gradient | None = None
    wgrad: Gradient | None = None
    transposed: bool = False
    computed: bool = False
    embeds: bool = False

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt, int | torch.SymInt]:
        """T, I, O."""
        return *self.x.shape, self.w.shape[0]

    @property
    def batch(self) -> Batch:
        return self.x.batch

    @property
    def name(self) -> str:
        """That of its place; of several matrices of a batch, with the number of this one."""
        several = isinstance(self.batch, int) and int(self.forward.meta["val"].shape[0]) > 1
        return f"{self.place.name}[{self.batch}]" if several else self.place.name


@dataclass(frozen=True)
class Unsupported:
    """A product with a parameter in it that cannot be rewritten, and why."""

    place: Place
    node: Node
    reason: str


def match(graph: Graph, parameters: Mapping[int, str]) -> list[Site | Unsupported]:
    """Every linear of the graph in its order. `parameters`: index of a Dynamo input -> parameter name. Changes nothing."""
    origin = origins(graph, parameters)
    embedded = _embedded_parameters(graph, origin)
    backward = backward_nodes(graph)
    gradients: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if _is_product(node) and node in backward:
            gradients.setdefault(node.meta.get("seq_nr", -1), []).append(node)
    found: list[Site | Unsupported] = []
    for node in graph.nodes:
        if node in backward:
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            found += _inside(node, origin, parameters)
        elif _is_opaque(node):
            found += _entering(node, origin, parameters)
        elif _is_product(node):
            # A product without gradients has the number of the differentiable one before it, so the first one owns what carries it.
            found += _match_product(node, origin, parameters, gradients.pop(node.meta.get("seq_nr", -1), []), embedded)
    return found


def _is_product(node: Node) -> bool:
    if node.target is aten.convolution.default:
        weight, groups = node.all_input_nodes[1], node.args[8]
        return bool(groups == 1 and all(n == 1 for n in weight.meta["val"].shape[2:]))
    return node.target in PRODUCTS


def _inside(node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str]) -> list[Unsupported]:
    """The products in the branches or regions of a higher-order operator that parameters enter: counted, not looked into."""
    weights = frozenset().union(*(origin[n].parameters for n in node.all_input_nodes))
    count = sum(_products_in(getattr(node.graph.owning_module, str(n.target))) for n in node.all_input_nodes if n.op == "get_attr")
    if not weights or not count:
        return []
    place = locate(node, [])
    return [Unsupported(place, node, f"{count} product(s) inside {node.target}, which is not looked into")]


def _is_opaque(node: Node) -> bool:
    """True for an operator that neither torch nor we define: what it computes is not known."""
    return getattr(node.target, "namespace", "aten") not in {*TORCH_NAMESPACES, *SHARDING_NAMESPACES}


def _entering(node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str]) -> list[Unsupported]:
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
    return sum(_products_in(m) for m in module.children()) + sum(map(_is_product, module.graph.nodes))


def backward_nodes(graph: Graph) -> set[Node]:
    """The nodes of the backward pass: tagged so, or computed from a gradient (a user's autograd.Function leaves its nodes untagged)."""
    found: set[Node] = set()
    for node in graph.nodes:
        tagged = node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
        incoming = node.op == "placeholder" and type(node.meta.get("desc")).__name__ == "TangentAOTInput"
        if tagged or incoming or any(n in found for n in node.all_input_nodes):
            found.add(node)
    found.discard(graph.find_nodes(op="output")[0])
    return found


def _match_product(
    node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str], gradients: list[Node], embedded: set[Node]
) -> Sequence[Site | Unsupported]:
    """The sites of a product, all of them or a reason why not; nothing for a product that no parameter enters as a weight."""
    bias, left, right = _arguments(node)
    kinds = origin[left].kind, origin[right].kind
    if Kind.PICKED in kinds and (node.target is not aten.bmm.default or Kind.ACTIVATION not in kinds):  # then they are no weights
        kinds = Kind.ACTIVATION if kinds[0] is Kind.PICKED else kinds[0], Kind.ACTIVATION if kinds[1] is Kind.PICKED else kinds[1]
    weights = frozenset().union(*(origin[n].parameters for n, k in zip((left, right), kinds, strict=True) if k is not Kind.ACTIVATION))
    if not weights or (Kind.ACTIVATION not in kinds and kinds[1] is not Kind.PARAMETER):
        return []
    indices = (dynamo_input_index(w) for w in weights)
    place = locate(node, [parameters[i] for i in indices if i is not None])
    on_the_left = kinds[1] is Kind.ACTIVATION
    weight = left if on_the_left else right
    if reason := _unsupported(node, kinds, bias, weight, on_the_left):
        return [Unsupported(place, node, reason)]
    batches: Sequence[Batch] = [None]
    if node.target is aten.bmm.default:
        batches = ["folded"] if _is_expanded(weight) else range(int(node.meta["val"].shape[0]))
    computed, embeds = origin[weight].kind is Kind.COMPUTED, bool(weights & embedded)
    sites: list[Site] = []
    for batch in batches:
        first, second = _operands(left, right, batch)
        x, w = first, second.t
        if on_the_left:  # y^T = w x^T
            x, w = w, x
        site = Site(place, node, x, w, bias, weights, transposed=on_the_left, computed=computed, embeds=embeds)
        matched = _match_backward(site, gradients)
        if isinstance(matched, Unsupported):
            return [matched]
        sites.append(matched)
    return sites


def _unsupported(node: Node, kinds: tuple[Kind, Kind], bias: Node | None, weight: Node, on_the_left: bool) -> str:
    """Why a product with a parameter in it cannot be rewritten, or ""."""
    if Kind.ACTIVATION not in kinds:
        return "its input is made of parameters or constants, not an activation"
    if Kind.PICKED in kinds:
        return "its weights are picked from a parameter by data, a matrix for each row"
    if node.target not in REWRITTEN:
        return f"its product is {node.target}, which is not rewritten"
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return "its addmm scales the product or the bias (alpha, beta)"
    dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if n is not bias} | {node.meta["val"].dtype}
    if not dtypes <= set(OPERAND_DTYPES):
        return f"its dtype is {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    if bias is not None and on_the_left:
        return "its addmm has the weight on the left of the product (bias + w @ x)"
    if bias is not None and bias.meta["val"].shape != node.meta["val"].shape[1:]:
        return f"its bias has the shape {list(bias.meta['val'].shape)}, not one number a feature"
    if node.target is aten.bmm.default:
        if _is_expanded(weight) and on_the_left:
            return "its weight is on the left of a batch of products (w @ x)"
        if not _is_expanded(weight) and not isinstance(node.meta["val"].shape[0], int):
            return "it is a batch of products with different weights whose number is dynamic"
    return ""


def _is_expanded(weight: Node) -> bool:
    """Whether a batch is one matrix over and over: torch.matmul makes that of a frozen weight where x is no view of a matrix."""
    value = weight.meta["val"]
    return value.stride(0) == 0 and not (isinstance(value.shape[0], int) and value.shape[0] == 1)


def _operands(left: Node, right: Node, batch: Batch) -> tuple[Operand, Operand]:
    """Both operands of a product. Where one is folded, the other is the same for all of the batch: its first matrix."""
    return operand(left, batch), operand(right, 0 if batch == "folded" else batch)


def _match_backward(site: Site, gradients: list[Node]) -> Site | Unsupported:
    dgrad, wgrad = None, None
    for node in gradients:
        _, left_node, right_node = _arguments(node)
        left, right = _operands(left_node, right_node, site.batch)
        plain = node.target is REWRITTEN[site.forward.target]
        if plain and right == site.w and dgrad is None:
            dgrad = Gradient(node, left)
        elif plain and left == site.w.t and dgrad is None:  # of an x that is stored transposed
            dgrad = Gradient(node, right.t, transposed=True)
        elif plain and right == site.x and wgrad is None:
            wgrad = Gradient(node, left)
        elif plain and left == site.x.t and wgrad is None:
            wgrad = Gradient(node, right.t, transposed=True)
        else:
            return Unsupported(site.place, site.forward, f"its backward product {node.name} has an unknown form")
    return replace(site, dgrad=dgrad, wgrad=wgrad)


def _arguments(node: Node) -> tuple[Node | None, Node, Node]:
    """(bias, left, right) of a product."""
    nodes = [a for a in node.args if isinstance(a, Node)]
    if node.target in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default):
        return nodes[0], nodes[1], nodes[2]
    return None, nodes[0], nodes[1]


def _embedded_parameters(graph: Graph, origin: Mapping[Node, Origin]) -> set[Node]:
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (aten.embedding.default, aten._embedding_bag.default):
            found |= origin[node.args[0]].parameters
    return found
