"""Step 4 for products of groups: `torch._grouped_mm` of tokens, sorted by expert, with a weight for each expert.

    forward   y  = take(grouped_matmul(quantize(take(x, sources)), quantize(all w), ends), places)
    dgrad     dx = take(grouped_matmul(quantize_grad(take(e, sources)), requantize(the packed w), ends, across) / 128, places)
    wgrad     dw = grouped_outer(quantize_grad(take(e, sources)^T), requantize(the packed x), ends) / 128

`sources` and `places` move tokens to rows where every group starts at a multiple of 128, and back (`kernels.grouped_ops`). Weights are
quantized as one matrix [G*O, I], O filled up with zeros to a multiple of 128, because the rotation of the requantized weights runs along O.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from quartet_compile.kernels import grouped_ops  # noqa: F401  (registers the operators)
from quartet_compile.kernels.format import ROTATION, ceil_to
from quartet_compile.passes.operand import Operand
from quartet_compile.passes.recipe import Product
from quartet_compile.passes.site import Gradient, Site

if TYPE_CHECKING:
    from quartet_compile.passes.rewrite import PackedNodes, Writer

aten, quartet = torch.ops.aten, torch.ops.quartet


class GroupedWriter:
    """Writes the products of grouped sites; rows are found once for each `ends`, tokens moved once for each tensor."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.rows: dict[Node, tuple[Node, Node, Node]] = {}
        self.moved: dict[tuple[Operand, Node], Node] = {}

    # -- operands

    def rows_of(self, site: Site) -> tuple[Node, Node, Node]:
        """(padded ends, sources, places) of a site; its forward, which comes first, makes them."""
        assert site.ends is not None
        if site.ends not in self.rows:
            call, like = self.writer.call, site.forward
            tokens = self.writer.size(site.x.base, 1 if site.x.transposed else 0)
            rows = call(quartet.group_rows.default, (site.ends, tokens), like, f"{site.ends.name}_rows")
            parts = ("padded_ends", "sources", "places")
            ends, sources, places = (call(operator.getitem, (rows, i), like, part) for i, part in enumerate(parts))
            self.rows[site.ends] = ends, sources, places
        return self.rows[site.ends]

    def padded(self, site: Site, o: Operand, like: Node) -> Node:
        """An operand [T, K] in padded rows: [P, K]."""
        assert site.ends is not None
        key = o, site.ends
        if key not in self.moved:
            node = self.writer.call(aten.permute.default, (o.base, [1, 0]), like, f"{o.base.name}_t") if o.transposed else o.base
            sources = self.rows_of(site)[1]
            self.moved[key] = self.writer.call(quartet.take_rows.default, (node, sources), like, f"{o.base.name}_padded")
        return self.moved[key]

    def weights(self, site: Site) -> Node:
        """All matrices on top of each other: [G * ceil(O/128)*128, I]."""
        call, like, name = self.writer.call, site.forward, site.w.base.name
        node = site.w.base
        if site.w.transposed:
            node = call(aten.permute.default, (node, [0, 2, 1]), like, f"{name}_t")
        groups, rows, columns = node.meta["val"].shape
        if rows % ROTATION:
            node = call(aten.constant_pad_nd.default, (node, [0, 0, 0, ceil_to(rows, ROTATION) - rows]), like, f"{name}_padded")
        return call(aten.reshape.default, (node, [groups * ceil_to(rows, ROTATION), columns]), like, f"{name}_all")

    # -- products

    def forward(self, site: Site, product: Product, name: str) -> tuple[Node, PackedNodes, PackedNodes]:
        """(y, packed x, packed w)."""
        like, outs = site.forward, int(site.shape[2])
        with self.writer.graph.inserting_before(like):
            ends, _, places = self.rows_of(site)
            x = self.writer.quantized_as(site.x, product.left, like, f"{name}_x", lambda: self.padded(site, site.x, like))
            w = self.writer.quantized_as(site.w, product.right, like, f"{name}_w", lambda: self.weights(site))
            y = self.writer.call(quartet.grouped_matmul.default, (*x, *w, ends, False, product.scale), like, f"{name}_y_padded")
            if outs % ROTATION:
                y = self.writer.call(aten.slice.Tensor, (y, 1, 0, outs), like, f"{name}_y_own")
            return self.writer.call(quartet.take_rows.default, (y, places), like, f"{name}_y"), x, w

    def gradient(
        self, site: Site, gradient: Gradient, product: Product, index: int, seeds: Node, other: PackedNodes, name: str
    ) -> Node:
        """dx [T, I], or dw [G, O, I], transposed [G, I, O]. other: the requantized operand, of rotation `index`."""
        node, weighs = gradient.node, gradient is site.wgrad
        ends, _, places = self.rows_of(site)
        tokens_first = gradient.e.t if weighs else gradient.e
        args = (self.padded(site, tokens_first, node), seeds, index, product.left.rule, weighs)
        e = self.writer.call_packed(quartet.quantize_grad.default, args, node, f"{name}_e")
        if weighs:
            operands: tuple[Any, ...] = (*other, *e) if gradient.transposed else (*e, *other)
            return self.writer.call(quartet.grouped_outer.default, (*operands, ends, product.scale), node, name)
        padded = self.writer.call(quartet.grouped_matmul.default, (*e, *other, ends, True, product.scale), node, f"{name}_padded")
        return self.writer.call(quartet.take_rows.default, (padded, places), node, name)
