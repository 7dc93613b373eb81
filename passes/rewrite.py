"""Step 4: turn placed linears into quantize and matmul operators, as their recipe's table says.

    forward   y  = matmul(quantize(x), quantize(w), bias)
    dgrad     dx = matmul(quantize_grad(e),   requantize(the packed w)) / 128
    wgrad     dw = matmul(quantize_grad(e^T), requantize(the packed x)) / 128

Both operands of a backward product name the same rotation in one tensor of seeds, drawn once a step. A rotation belongs to the saved
operand: three linears that share x share its requantized transpose, hence its rotation. The seeds and the requantized operands are tagged
to stay in the backward graph; otherwise the partitioner may draw the seeds twice, and the two operands of a product would be rotated
differently, or move the requantized operands into the forward pass and save them.

The matrices of a batched product are linears of their own, each with its tensor scales; their results are put together again. Products of
groups of tokens are written by `grouped`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch._inductor import inductor_prims  # noqa: F401  (registers prims.inductor_seeds)
from torch.fx import Graph, Node

from quartet_compile.kernels import grouped_ops, observed_ops  # noqa: F401  (register the operators)
from quartet_compile.passes import convolution
from quartet_compile.passes.grouped import GroupedWriter
from quartet_compile.passes.nodes import add_call
from quartet_compile.passes.operand import Batch, Operand
from quartet_compile.passes.recipe import Cell, Product, Recipe
from quartet_compile.passes.site import Gradient, Site

aten, quartet = torch.ops.aten, torch.ops.quartet

IN_BACKWARD = "must_be_in_backward"

PRODUCTS = (
    quartet.matmul.default, quartet.grouped_matmul.default, quartet.grouped_outer.default, quartet.matmul_observed.default,
)  # fmt: skip


class Written(NamedTuple):
    """A product of a linear, and the node that now holds its result, or that of one matrix of a batch."""

    site: Site
    kind: Literal["y", "dx", "dw"]
    node: Node

    @property
    def product(self) -> Node:
        """The product behind the result, which of groups is moved to other rows."""
        node = self.node
        while node.target not in PRODUCTS:
            node = node.all_input_nodes[0]
        return node

    @property
    def quantizers(self) -> tuple[Node, Node]:
        """What makes its packed operands: of y, x and w; of the gradients, the gradient and what was saved."""
        left, right = (_quantizer(self.product, position) for position in (0, 3))
        return (right, left) if self.swapped else (left, right)

    @property
    def swapped(self) -> bool:
        """Whether the weight, or what was saved, is the operand on the left."""
        if self.kind == "y":
            return self.site.transposed
        gradient = self.site.dgrad if self.kind == "dx" else self.site.wgrad
        return gradient is not None and gradient.transposed and not (self.kind == "dx" and self.site.ends is not None)


def _quantizer(node: Node, position: int) -> Node:
    """What makes the packed operand of a node that begins at this argument."""
    codes: Any = node.args[position]
    return codes.args[0]


class PackedNodes(NamedTuple):
    """An NVFP4 operand in the graph."""

    codes: Node
    scales: Node
    tensor_scale: Node


def put_in_place(graph: Graph, old: Node, new: Node) -> None:
    """Let a rewritten product take the place of the plain one."""
    old.replace_all_uses_with(new)
    source: Any = old.args[0]
    graph.erase_node(old)
    if source.target is aten.convolution_backward.default:
        convolution.narrow(source)


def rewrite(
    graph: Graph, placed: Sequence[tuple[Site, Recipe]], put: Callable[[Graph, Node, Node], None] = put_in_place
) -> list[Written]:  # fmt: skip
    """Rewrite the products of the placed sites, and return them. put: called for each plain product with the node that is to stand for it.

    All new nodes are built before the first old one goes, so an error leaves the graph as it was.
    """
    writer = Writer(graph)
    results: dict[Node, dict[Batch, Node]] = {}
    written: list[Written] = []
    try:
        order = {node: i for i, node in enumerate(graph.nodes)}
        backward: list[tuple[Node, Site, Literal["dx", "dw"], Callable[[], Node]]] = []
        for site, recipe in placed:
            if recipe.forward is None:
                continue
            y, x, w = writer.forward(site, recipe.forward)
            _claim(results, site.forward, site.batch, y)
            written.append(Written(site, "y", y))
            if site.dgrad is not None and recipe.dgrad is not None:
                backward.append((site.dgrad.node, site, "dx", writer.gradient_builder(site, "dx", site.dgrad, recipe.dgrad, w)))
            if site.wgrad is not None and recipe.wgrad is not None:
                backward.append((site.wgrad.node, site, "dw", writer.gradient_builder(site, "dw", site.wgrad, recipe.wgrad, x)))
        # In graph order, because an operand that several products share has to stand before the first of them.
        for node, site, kind, build in sorted(backward, key=lambda item: order[item[0]]):
            result = build()
            _claim(results, node, site.batch, result)
            written.append(Written(site, kind, result))
        replacements = {node: writer.together(node, parts) for node, parts in results.items()}
        writer.finish_seeds()
    except BaseException:
        writer.undo()
        raise
    for old, new in replacements.items():
        put(graph, old, new)
    graph.eliminate_dead_code()
    return written


def _claim(results: dict[Node, dict[Batch, Node]], product: Node, batch: Batch, result: Node) -> None:
    parts = results.setdefault(product, {})
    if batch in parts:
        raise AssertionError(f"two linears claim one product, {product.name}")
    parts[batch] = result


class Writer:
    """Adds nodes to a graph, remembers what was packed already, and can take everything back."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.added: list[Node] = []
        self.packed: dict[tuple[Operand, Cell], PackedNodes] = {}
        self.matrices: dict[tuple[Node, Batch], Node] = {}
        self.rotations: dict[tuple[str, PackedNodes, Cell], tuple[int, PackedNodes]] = {}
        self.seeds: dict[torch.device, Node] = {}
        self.rotation_count: dict[torch.device, int] = {}
        self.grouped = GroupedWriter(self)

    def undo(self) -> None:
        for node in reversed(self.added):
            self.graph.erase_node(node)

    # -- single nodes

    def call(self, target: Any, args: tuple[Any, ...], like: Node, name: str, tag: str | None = None, **kwargs: Any) -> Node:
        node = add_call(self.graph, target, args, like, name, tag, **kwargs)
        self.added.append(node)
        return node

    def call_packed(self, target: Any, args: tuple[Any, ...], like: Node, name: str, tag: str | None = None) -> PackedNodes:
        node = self.call(target, args, like, name, tag)
        parts = (self.call(operator.getitem, (node, i), like, f"{name}_{part}", tag) for i, part in enumerate(PackedNodes._fields))
        return PackedNodes(*parts)

    def matrix(self, o: Operand, like: Node) -> Node:
        """An operand but for its transpose: the base, or of a batch the matrix that it is."""
        if o.batch is None:
            return o.base
        if (o.base, o.batch) not in self.matrices:
            if o.batch == "folded":
                call: tuple[Any, tuple[Any, ...]] = aten.reshape.default, (o.base, [-1, o.base.meta["val"].shape[-1]])
            elif o.batch == "pixels":
                channels, last = o.base.meta["val"].shape[1], o.base.meta["val"].dim()
                pixels = self.call(aten.permute.default, (o.base, [0, *range(2, last), 1]), like, f"{o.base.name}_channels_last")
                call = aten.reshape.default, (pixels, [-1, channels])
            else:
                call = aten.select.int, (o.base, 0, o.batch)
            self.matrices[o.base, o.batch] = self.call(*call, like, f"{o.base.name}_{o.batch}")
        return self.matrices[o.base, o.batch]

    def together(self, product: Node, parts: dict[Batch, Node]) -> Node:
        """The result in place of a product: of a batched one, all its matrices."""
        if None in parts:
            return parts[None]
        if "pixels" in parts:
            with self.graph.inserting_before(product):
                return self.image(product, parts["pixels"])
        if "folded" in parts:
            with self.graph.inserting_before(product):
                left, features = product.all_input_nodes[0], product.meta["val"].shape[-1]
                shape = [self.size(left, d) for d in range(2)]
                return self.call(aten.view.default, (parts["folded"], [*shape, features]), product, f"{product.name}_all")
        if len(parts) != product.meta["val"].shape[0]:
            raise AssertionError(f"{len(parts)} linears are not the matrices of {product.name}")
        with self.graph.inserting_before(product):
            names = [f"{product.name}_{i}" for i in range(len(parts))]
            matrices = [self.call(aten.unsqueeze.default, (parts[i], 0), product, name) for i, name in enumerate(names)]
            return matrices[0] if len(matrices) == 1 else self.call(aten.cat.default, (matrices,), product, f"{product.name}_all")

    def image(self, product: Node, pixels: Node) -> Node:
        """[pixels, channels] in the shape of a convolution's result, or of a gradient of it, and in its order in memory: views follow."""
        count, channels, *sizes = product.meta["val"].shape
        (like, *_) = product.all_input_nodes
        like = like.all_input_nodes[0] if like.target is aten.convolution_backward.default else like  # its pixels are as many, if dynamic
        shape = [n if isinstance(n, int) else self.size(like, d) for n, d in ((count, 0), *((n, 2 + i) for i, n in enumerate(sizes)))]
        last = self.call(aten.view.default, (pixels, [*shape, channels]), product, f"{product.name}_channels_last")
        order = [0, len(shape), *range(1, len(shape))]
        image = self.call(aten.permute.default, (last, order), product, f"{product.name}_image")
        if not product.meta["val"].is_contiguous():
            return image
        name = f"{product.name}_channels_first"
        return self.call(aten.clone.default, (image,), product, name, memory_format=torch.contiguous_format)

    def size(self, of: Node, dimension: int) -> Node | int:
        """A size, as a node where it is symbolic."""
        size = of.meta["val"].shape[dimension]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, (of, dimension), of, f"{of.name}_size_{dimension}")

    # -- forward

    def quantized_as(self, o: Operand, cell: Cell, like: Node, name: str, matrix: Callable[[], Node]) -> PackedNodes:
        """An operand, quantized once; `matrix` makes what the quantizer reads."""
        if (o, cell) not in self.packed:
            self.packed[o, cell] = self.call_packed(quartet.quantize.default, (matrix(), cell.rule), like, name)
        return self.packed[o, cell]

    def quantized(self, site: Site, o: Operand, cell: Cell, role: str) -> PackedNodes:
        name = f"{_stem(site)}_{role}"

        def matrix() -> Node:
            node = self.matrix(o, site.forward)
            return self.call(aten.permute.default, (node, [1, 0]), site.forward, f"{name}_t") if o.transposed else node

        return self.quantized_as(o, cell, site.forward, name, matrix)

    def forward(self, site: Site, product: Product) -> tuple[Node, PackedNodes, PackedNodes]:
        """(y, packed x, packed w)."""
        if site.ends is not None:
            return self.grouped.forward(site, product, _stem(site))
        dtype = site.forward.meta["val"].dtype
        with self.graph.inserting_before(site.forward):
            x, w = self.quantized(site, site.x, product.left, "x"), self.quantized(site, site.w, product.right, "w")
            left, right = (w, x) if site.transposed else (x, w)
            args = (*left, *right, site.bias, product.scale, dtype)
            return self.call(quartet.matmul.default, args, site.forward, f"{_stem(site)}_y"), x, w

    # -- backward

    def gradient_builder(self, site: Site, kind: str, gradient: Gradient, product: Product, saved: PackedNodes) -> Callable[[], Node]:
        return lambda: self.gradient(site, kind, gradient, product, saved)

    def gradient(self, site: Site, kind: str, gradient: Gradient, product: Product, saved: PackedNodes) -> Node:
        node, name = gradient.node, f"{_stem(site)}_{kind}"
        columns = int(site.shape[1])  # the features that the weight and x have in common; a parameter's shape is never symbolic
        with self.graph.inserting_before(node):
            seeds = self.seeds_on(node)
            index, other = self.requantized(site, kind, saved, product.right, columns, seeds, node)
            if site.ends is not None:
                return self.grouped.gradient(site, gradient, product, index, seeds, other, name)
            args = (self.matrix(gradient.e, node), seeds, index, product.left.rule, gradient.e.transposed)
            e = self.call_packed(quartet.quantize_grad.default, args, node, f"{name}_e")
            left, right = (other, e) if gradient.transposed else (e, other)
            return self.call(quartet.matmul.default, (*left, *right, None, product.scale, node.meta["val"].dtype), node, name)

    def requantized(
        self, site: Site, kind: str, saved: PackedNodes, cell: Cell, columns: int, seeds: Node, like: Node
    ) -> tuple[int, PackedNodes]:
        """(rotation, packed transpose) of a saved operand; the first product to need it makes it."""
        key = (kind, saved, cell)
        if key not in self.rotations:
            device = like.meta["val"].device
            index = self.rotation_count.get(device, 0)
            self.rotation_count[device] = index + 1
            name = f"{_stem(site)}_{'w' if kind == 'dx' else 'x'}t"
            args = (*saved, columns, seeds, index, cell.rule)
            self.rotations[key] = index, self.call_packed(quartet.requantize.default, args, like, name, IN_BACKWARD)
        return self.rotations[key]

    def seeds_on(self, like: Node) -> Node:
        """The seeds of this step on a device: one node, because two equal ones would be merged or drawn apart."""
        device = like.meta["val"].device
        if device not in self.seeds:
            self.seeds[device] = self.call(torch.ops.prims.inductor_seeds.default, (1, device), like, "seeds", IN_BACKWARD)
        return self.seeds[device]

    def finish_seeds(self) -> None:
        for device, node in self.seeds.items():
            count = self.rotation_count[device]
            node.args = (count, device)
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty(count, dtype=torch.int64, device=device)


def _stem(site: Site) -> str:
    """A short identifier for node names: the last two components of the module's path."""
    name = site.name if site.ends is None else site.place.name
    return re.sub(r"\W", "_", "_".join(name.split(".")[-2:])).strip("_") or "linear"
