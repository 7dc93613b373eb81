"""Step 1: find every linear of a joint graph, with its three products.

A linear is a matrix product of an activation with a parameter. Its forward is `mm`, `addmm` or, for each matrix of a batch, `bmm`, with the
weight on either side; `_grouped_mm` of tokens with experts; or a `convolution` with a kernel of one element. Its gradients are the backward
products that carry the same autograd sequence number and read the same weight (dgrad) or the same activation (wgrad). Both signs must
agree: the number alone also names nodes we do not know, and the structure alone cannot tell two uses of one weight apart.

Products of an activation with something that stems from a parameter, but in a form that is not rewritten, come back as `Unsupported`,
so that every linear is accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from quartet_compile.kernels.ops import OPERAND_DTYPES
from quartet_compile.passes import convolution
from quartet_compile.passes.locate import locate
from quartet_compile.passes.operand import Batch, Operand, operand
from quartet_compile.passes.products import entering, in_regions, is_opaque, is_product
from quartet_compile.passes.provenance import Kind, Origin, dynamo_input_index, origins
from quartet_compile.passes.site import Gradient, Site, Unsupported

aten = torch.ops.aten

REWRITTEN: dict[Any, Any] = {
    aten.mm.default: aten.mm.default, aten.addmm.default: aten.mm.default, aten.bmm.default: aten.bmm.default,
    aten._grouped_mm.default: aten._grouped_mm.default, aten.convolution.default: aten.convolution_backward.default,
}  # fmt: skip
"""The operators that are rewritten, and the operator that their gradients are."""

KEPT_WHOLE = {*REWRITTEN, aten.mv.default}
"""The operators that must not be decomposed before they are counted (`vectors`)."""


def match(graph: Graph, parameters: Mapping[int, str], embedded: Set[int] = frozenset()) -> list[Site | Unsupported]:
    """Every linear of the graph in its order. Changes nothing.

    parameters: index of a Dynamo input -> parameter name. embedded: the indices of those known to be embeddings of any graph.
    """
    origin = origins(graph, parameters)
    tables = _embedded_parameters(graph, origin, embedded)
    backward = backward_nodes(graph)
    gradients: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if is_product(node) and node in backward:
            gradients.setdefault(node.meta.get("seq_nr", -1), []).append(node)
    found: list[Site | Unsupported] = []
    for node in graph.nodes:
        if node in backward:
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            found += in_regions(node, origin, parameters)
        elif is_opaque(node):
            found += entering(node, origin, parameters)
        elif is_product(node):
            # A product without gradients has the number of the differentiable one before it, so the first one owns what carries it.
            own = gradients.pop(node.meta.get("seq_nr", -1), [])
            for linear in _match_product(node, origin, parameters, own, tables):
                found.append(replace(linear, gradients=tuple(own)) if isinstance(linear, Unsupported) else linear)
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


def _match_product(
    node: Node, origin: Mapping[Node, Origin], parameters: Mapping[int, str], gradients: list[Node], tables: set[Node]
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
    batches: Sequence[Batch] = ["pixels" if node.target is aten.convolution.default else None]
    if node.target is aten.bmm.default:
        batches = ["folded"] if _is_expanded(weight) else range(int(node.meta["val"].shape[0]))
    computed, embeds = origin[weight].kind is Kind.COMPUTED, bool(weights & tables)
    ends = _ends(node)
    sites: list[Site] = []
    for batch in batches:
        first, second = _operands(node, batch)
        x, w = first, second.t
        if on_the_left:  # y^T = w x^T
            x, w = w, x
        site = Site(place, node, x, w, bias, weights, None, None, on_the_left, batch, ends, computed, embeds)
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
    dtypes = {n.meta["val"].dtype for n in (*_arguments(node)[1:], node)}
    if not dtypes <= set(OPERAND_DTYPES):
        return f"its dtype is {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    if bias is not None and on_the_left:
        return "its addmm has the weight on the left of the product (bias + w @ x)"
    if bias is not None and node.target is aten.addmm.default and bias.meta["val"].shape != node.meta["val"].shape[1:]:
        return f"its bias has the shape {list(bias.meta['val'].shape)}, not one number a feature"
    if node.target is aten._grouped_mm.default:
        return _unsupported_groups(node)
    if node.target is aten.convolution.default:
        return convolution.unsupported(node)
    if node.target is aten.bmm.default:
        if _is_expanded(weight) and on_the_left:
            return "its weight is on the left of a batch of products (w @ x)"
        if not _is_expanded(weight) and not isinstance(node.meta["val"].shape[0], int):
            return "it is a batch of products with different weights whose number is dynamic"
    return ""


def _unsupported_groups(node: Node) -> str:
    _, left, right = _arguments(node)
    if (left.meta["val"].dim(), right.meta["val"].dim()) != (2, 3) or _ends(node) is None:
        return "its _grouped_mm is not one of tokens [T, I] with weights [G, I, O]"
    if any(n.meta["val"].dtype != torch.bfloat16 for n in (left, right, node)):
        return "its _grouped_mm is not in bfloat16"
    return "its _grouped_mm has a bias" if node.kwargs.get("bias") or node.args[3:4] not in ((), (None,)) else ""


def _ends(product: Node) -> Node | None:
    """Where each group of rows ends, of a `_grouped_mm`."""
    if product.target is not aten._grouped_mm.default:
        return None
    (ends,) = product.args[2:3] or (product.kwargs.get("offs"),)
    return ends if isinstance(ends, Node) else None


def _is_expanded(weight: Node) -> bool:
    """Whether a batch is one matrix over and over: torch.matmul makes that of a frozen weight where x is no view of a matrix."""
    value = weight.meta["val"]
    return value.stride(0) == 0 and not (isinstance(value.shape[0], int) and value.shape[0] == 1)


def _operands(product: Node, batch: Batch) -> tuple[Operand, Operand]:
    """Both operands of a product. Where one is folded, the other is the same for all of the batch: its first matrix."""
    _, left, right = _arguments(product)
    if product.target is aten.convolution.default:
        return operand(left, batch), operand(right, batch).t
    if product.target is aten._grouped_mm.default:
        return operand(left), operand(right, "each" if right.meta["val"].dim() == 3 else None)
    return operand(left, batch), operand(right, 0 if batch == "folded" else batch)


def _match_backward(site: Site, gradients: list[Node]) -> Site | Unsupported:
    dgrad, wgrad = None, None
    if site.batch == "pixels":
        return _match_convolution_backward(site, gradients)
    for node in gradients:
        left, right = _operands(node, site.batch)
        plain = node.target is REWRITTEN[site.forward.target] and _ends(node) is site.ends
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


def _match_convolution_backward(site: Site, gradients: list[Node]) -> Site | Unsupported:
    if not gradients:
        return site
    backward = gradients[0]
    e, *inputs = backward.all_input_nodes[:3]
    if len(gradients) > 1 or [operand(n, "pixels") for n in inputs] != [site.x, site.w]:
        return Unsupported(site.place, site.forward, f"its backward product {backward.name} has an unknown form")
    parts = convolution.gradients(backward)
    dgrad, wgrad = (Gradient(parts[i], operand(e, "pixels").t if i else operand(e, "pixels")) if i in parts else None for i in (0, 1))
    return replace(site, dgrad=dgrad, wgrad=wgrad)


def _arguments(node: Node) -> tuple[Node | None, Node, Node]:
    """(bias, left, right) of a product."""
    nodes = [a for a in node.args if isinstance(a, Node)]
    if node.target in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default):
        return nodes[0], nodes[1], nodes[2]
    if node.target is aten.convolution.default:
        return (nodes[2] if len(nodes) > 2 else None), nodes[0], nodes[1]
    return None, nodes[0], nodes[1]


def _embedded_parameters(graph: Graph, origin: Mapping[Node, Origin], known: Set[int]) -> set[Node]:
    """The parameters that are embeddings, of this graph or known to be ones of another."""
    found: set[Node] = {node for node in graph.find_nodes(op="placeholder") if dynamo_input_index(node) in known}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (aten.embedding.default, aten._embedding_bag.default):
            found |= origin[node.args[0]].parameters
    return found
