"""From a rewritten joint graph to the lines of a report: what every product became, and what is kept for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch.fx import Graph, GraphModule, Node

from quartet_compile.flops import flops_of, has_formula, hint
from quartet_compile.kernels.chosen import Choice
from quartet_compile.kernels.format import GROUP, ROTATION, ceil_to
from quartet_compile.kernels.grouped_ops import padded_rows
from quartet_compile.passes.emulate import multiplies_packed
from quartet_compile.passes.locate import locate
from quartet_compile.passes.match import backward_nodes
from quartet_compile.passes.operand import Operand
from quartet_compile.passes.pipeline import Result
from quartet_compile.passes.place import Decision
from quartet_compile.passes.products import is_product
from quartet_compile.passes.provenance import Kind, origins
from quartet_compile.passes.rewrite import Written
from quartet_compile.passes.site import Site
from quartet_compile.reports import AUTOTUNED, LinearReport, OtherProduct

NOTHING: Mapping[str, Choice] = {}


def products(graph: Graph) -> dict[Node, OtherProduct]:
    """Every product of a graph, as if it belonged to no linear. Those inside regions and opaque operators are not looked into."""
    backward = backward_nodes(graph)
    found = {}
    for node in graph.nodes:
        if is_product(node) or has_formula(node):
            place = locate(node, [])
            shape = tuple(hint(n) for n in _example(node).shape)
            found[node] = OtherProduct(node.name, str(node.target), place.name, place.source, shape, node in backward, flops_of(node))
    return found


def _example(node: Node) -> torch.Tensor:
    """The result of a node, or the first of several."""
    return next(v for v in torch.utils._pytree.tree_leaves(node.meta["val"]) if isinstance(v, torch.Tensor))


def lines(
    result: Result, found: Mapping[Node, OtherProduct], autotuned: bool = False, chosen: Mapping[str, Choice] = NOTHING
) -> tuple[tuple[LinearReport, ...], tuple[OtherProduct, ...]]:
    """(a line for each linear, the products of no linear). found: the `products` of the graph before it was rewritten. autotuned: whether
    Inductor measures its choices for products. chosen: what it took, by the products' nodes in the graphs that it compiled."""
    seen: set[tuple[Operand | Node, str]] = set()
    lines, claimed = [], set[Node]()
    for decision, own in zip(result.decisions, result.products, strict=True):
        claimed.update(own)
        lines.append(_line(decision, own, seen, result, found, autotuned, chosen))
    return tuple(lines), tuple(product for node, product in found.items() if node not in claimed)


def _line(
    decision: Decision, own: Iterable[Node], seen: set[tuple[Operand | Node, str]], result: Result, found: Mapping[Node, OtherProduct],
    autotuned: bool, chosen: Mapping[str, Choice],
) -> LinearReport:  # fmt: skip
    """One line. `seen` holds the inputs that earlier linears keep already (q, k and v read the same one), and in which form."""
    linear, recipe = decision.linear, decision.recipe
    at, names = linear.place, tuple(node.name for node in own)
    if not isinstance(linear, Site):
        flops = sum(found[node].flops for node in own if node in found)
        return LinearReport(
            at.name, at.source, None, "bf16", decision.decided_by, (), decision.reason, decision.left_because, flops=flops, before=names,
            after=names,
        )  # fmt: skip
    tokens, features_in, features_out = (hint(n) for n in linear.shape)
    mine: dict[str, Written] = {one.kind: one for one in result.written if one.site is linear}
    x_again, w_again = (q in result.recomputed for q in mine["y"].quantizers) if mine else (False, False)
    present = (("y", recipe.forward, True), ("dx", recipe.dgrad, linear.dgrad is not None), ("dw", recipe.wgrad, linear.wgrad is not None))
    products = tuple(name for name, cells, exists in present if cells is not None and exists)
    before = after = 0
    if linear.wgrad is not None:
        plain = tokens * features_in * linear.x.base.meta["val"].element_size()
        rows = tokens if linear.groups is None else padded_rows(tokens, linear.groups)
        packed = "dw" in products
        now: tuple[Operand | Node, str] = (linear.x, "packed") if packed else (_viewed(linear.x), "plain")
        then = _viewed(linear.x), "before"
        before = plain if then not in seen else 0
        after = (packed_bytes(rows, features_in) if packed else plain) if now not in seen and not x_again else 0
        seen.update((now, then))
    outs = features_out if linear.groups is None else linear.groups * ceil_to(features_out, ROTATION)
    weight = packed_bytes(outs, features_in) if "dx" in products and not w_again else 0
    how = implementation(linear.forward.meta["val"].device, linear.groups is not None, autotuned)
    dtype = str(linear.x.base.meta["val"].dtype).removeprefix("torch.")
    return LinearReport(
        linear.name, at.source, (tokens, features_in, features_out), recipe.name, decision.decided_by, products, decision.reason,
        decision.left_because, before, after, weight, flops=2 * tokens * features_in * features_out * sum(exists for *_, exists in present),
        dtype=dtype, implementation=how if products else "", before=names, after=tuple(_nodes_now(linear, mine)),
        in_graph=tuple(name for name, _, exists in present if exists), groups=linear.groups,
        chosen={kind: choice for kind, one in mine.items() if (choice := _choice(one, chosen)) is not None},
    )  # fmt: skip


def _choice(written: Written, chosen: Mapping[str, Choice]) -> Choice | None:
    """What Inductor took for a product. It compiles the operator that `emulate` or `native` put in its place, under the name that is added
    to here."""
    name = written.product.name
    return next((chosen[each] for each in (name, f"{name}_values", f"{name}_swizzled") if each in chosen), None)


def _viewed(x: Operand) -> Operand | Node:
    """The tensor that an operand is all of, however it is looked at; the operand itself where it is a part of one."""
    node = x.base
    while getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node if math.prod(map(hint, node.meta["val"].shape)) == math.prod(map(hint, x.shape)) else x


def implementation(device: torch.device, grouped: bool, autotuned: bool) -> str:
    """What multiplies on a device. grouped: groups of tokens. autotuned: whether Inductor measures libraries and templates."""
    if device.type == "meta":
        return "nothing: tensors on meta have no numbers"
    if device.type != "cuda":
        return f"emulated on the {device.type.upper()}"
    if grouped:
        return "bfloat16 values, torch._grouped_mm"
    if multiplies_packed(device):
        return f"FP4 tensor cores, {AUTOTUNED if autotuned else 'Triton'}"
    return f"bfloat16 values, {AUTOTUNED if autotuned else 'cuBLAS'}"


def packed_bytes(rows: int, columns: int) -> int:
    """Codes, group scales and the tensor scale of a packed matrix; its columns are padded to whole groups."""
    padded = ceil_to(columns, GROUP)
    return rows * (padded // 2 + padded // GROUP) + 4


def _nodes_now(site: Site, own: Mapping[str, Written]) -> Iterable[str]:
    """Names of a linear's nodes in the rewritten graph: what its products became, or are, in the order y, dx, dw; then quantizers."""
    before = {"y": site.forward} | {kind: g.node for kind, g in (("dx", site.dgrad), ("dw", site.wgrad)) if g is not None}
    results = [own[kind].node if kind in own else node for kind, node in before.items()]
    behind = [node for one in own.values() for node in (one.product, *one.quantizers)]
    return dict.fromkeys(node.name for node in results + behind)


# ---------------------------------------------------------------- what is kept


def kinds_of(joint: Graph, parameters: Mapping[int, str]) -> dict[str, Kind]:
    """What the nodes of a graph are made of, by name, for `saved_bytes`."""
    return {node.name: origin.kind for node, origin in origins(joint, parameters).items()}


def saved_bytes(forward: GraphModule, outputs: int, kinds: Mapping[str, Kind]) -> tuple[int, int]:
    """Bytes that a forward graph hands to its backward, graph inputs and their views not counted: (activations, made of parameters).
    Constants, such as zeros of the shape of an activation, count as activations.

    outputs: how many of its results go to the caller."""
    (results,) = forward.graph.find_nodes(op="output")[0].args
    activations = weights = 0
    for node in dict.fromkeys(results[outputs:]):
        if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor) or _is_input_view(node):
            continue
        size = hint(node.meta["val"].numel()) * node.meta["val"].element_size()
        if kinds.get(node.name, Kind.ACTIVATION) in (Kind.ACTIVATION, Kind.CONSTANT):
            activations += size
        else:
            weights += size
    return activations, weights


def _is_input_view(node: Node) -> bool:
    """True for a graph input or a view of one: keeping it costs nothing."""
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"
