"""Step 1: find every linear of a joint graph, with its three products.

A linear is a matrix product of an activation with a parameter. Its forward is `mm` or `addmm`; its gradients are the backward `mm` nodes
that carry the same autograd sequence number and read the same weight (dgrad) or the same activation (wgrad). Both signs must agree:
the number alone also names nodes we do not know, and the structure alone cannot tell two uses of one weight apart.

Products of an activation with something that stems from a parameter, but in a form that is not rewritten, come back as `Unsupported`,
so that every linear is accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from quartet_compile.kernels.ops import OPERAND_DTYPES
from quartet_compile.passes.locate import Place, locate
from quartet_compile.passes.provenance import Kind, Origin, dynamo_input_index, origins

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.addmv.default,
    aten._grouped_mm.default, aten._scaled_mm.default,
}  # fmt: skip
"""Every operator that multiplies matrices; only the first two are rewritten."""

TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}
ALIASES = {aten.alias.default, aten.detach.default}


@dataclass(frozen=True)
class Operand:
    """A matrix [rows, columns] that is `base`, or its transpose. Looking through transposes makes equal operands compare equal."""

    base: Node
    transposed: bool

    @property
    def t(self) -> Operand:
        return Operand(self.base, not self.transposed)


@dataclass(frozen=True)
class Gradient:
    """A backward product of a linear: the node, its gradient operand, and whether it holds the transposed result ([I, O] for dW,
    [I, T] for dX)."""

    node: Node
    e: Operand
    transposed: bool = False


@dataclass(frozen=True)
class Site:
    """One linear: x [T, I] times w [O, I] transposed, plus bias [O]."""

    place: Place
    forward: Node
    x: Operand
    w: Operand
    bias: Node | None
    parameters: frozenset[Node]
    dgrad: Gradient | None = None
    wgrad: Gradient | None = None
    embeds: bool = False
    """True where an embedding reads the same parameter."""

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt, int | torch.SymInt]:
        """T, I, O."""
        tokens, features = _shape(self.x)
        return tokens, features, _shape(self.w)[0]


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
        if node.target in PRODUCTS and node in backward:
            gradients.setdefault(node.meta.get("seq_nr", -1), []).append(node)
    found: list[Site | Unsupported] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS and node not in backward:
            # A product without gradients has the number of the differentiable one before it, so the first one owns what carries it.
            linear = _match_forward(node, origin, parameters, gradients.pop(node.meta.get("seq_nr", -1), []), embedded)
            if linear is not None:
                found.append(linear)
    return found


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


def operand(node: Node) -> Operand:
    """A matrix, looking through transposes and aliases."""
    transposed = False
    while True:
        if node.target in ALIASES:
            node = node.all_input_nodes[0]
        elif node.target in TRANSPOSES and node.meta["val"].dim() == 2 and _swaps(node):
            node, transposed = node.all_input_nodes[0], not transposed
        else:
            return Operand(node, transposed)


def _swaps(node: Node) -> bool:
    """False for a permutation that leaves a matrix as it is."""
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[union-attr, operator]
    return node.target is aten.t.default or node.args[1] % 2 != node.args[2] % 2  # type: ignore[operator]


def _shape(o: Operand) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    rows, columns = o.base.meta["val"].shape
    return (columns, rows) if o.transposed else (rows, columns)


def _match_forward(
    node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str], gradients: list[Node], embedded: set[Node]
) -> Site | Unsupported | None:
    """A site, a reason why not, or None for a product that no parameter enters as a weight."""
    bias, left, right = _arguments(node)
    kinds = origin[left].kind, origin[right].kind
    weights = origin[left].parameters | origin[right].parameters
    if not weights or (Kind.ACTIVATION not in kinds and kinds[1] is not Kind.PARAMETER):
        return None
    indices = (dynamo_input_index(w) for w in weights)
    place = locate(node, [parameters[i] for i in indices if i is not None])

    def unsupported(reason: str) -> Unsupported:
        return Unsupported(place, node, reason)

    if Kind.ACTIVATION not in kinds:
        return unsupported("its input is made of parameters or constants, not an activation")
    if Kind.COMPUTED in kinds:
        return unsupported("its weight is computed from parameters, not a parameter itself")
    if node.target not in (aten.mm.default, aten.addmm.default):
        return unsupported(f"its product is {node.target}, which is not rewritten")
    if kinds[0] is Kind.PARAMETER:
        return unsupported("the weight is the left operand of its product (w @ x)")
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return unsupported("its addmm scales the product or the bias (alpha, beta)")
    dtypes = {n.meta["val"].dtype for n in (node, left, right)}
    if not dtypes <= set(OPERAND_DTYPES):
        return unsupported(f"its dtype is {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}")
    if bias is not None and bias.meta["val"].shape != node.meta["val"].shape[1:]:
        return unsupported(f"its bias has the shape {list(bias.meta['val'].shape)}, not one number a feature")
    site = Site(place, node, operand(left), operand(right).t, bias, weights, embeds=bool(weights & embedded))
    return _match_backward(site, gradients)


def _match_backward(site: Site, gradients: list[Node]) -> Site | Unsupported:
    dgrad, wgrad = None, None
    for node in gradients:
        bias, left_node, right_node = _arguments(node)
        left, right = operand(left_node), operand(right_node)
        plain = bias is None and node.target is aten.mm.default
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
