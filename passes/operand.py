"""A matrix of a graph, looked at through transposes: operands that are equal compare equal, however they are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

aten = torch.ops.aten

TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}
ALIASES = {aten.alias.default, aten.detach.default}


@dataclass(frozen=True)
class Operand:
    """A matrix [rows, columns]: `base`, or base[batch] of a base with three dimensions; or the transpose of that."""

    base: Node
    transposed: bool
    batch: int | None = None

    @property
    def t(self) -> Operand:
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        rows, columns = self.base.meta["val"].shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


def operand(node: Node, batch: int | None = None) -> Operand:
    """The matrix that a node holds, or number `batch` of the matrices that it holds, looking through transposes and aliases."""
    transposed = False
    while True:
        if node.target in ALIASES:
            node = node.all_input_nodes[0]
        elif node.target in TRANSPOSES and node.meta["val"].dim() == (2 if batch is None else 3) and _keeps_batch(node):
            transposed ^= _swaps(node)
            node = node.all_input_nodes[0]
        else:
            return Operand(node, transposed, batch)


def _order(node: Node) -> list[int]:
    """The dimensions of its input in the order in which a transpose puts them."""
    order = list(range(node.meta["val"].dim()))
    if node.target is aten.permute.default:
        return [order[d] for d in node.args[1]]  # type: ignore[union-attr, index]
    first, second = (0, 1) if node.target is aten.t.default else node.args[1:3]
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return order


def _keeps_batch(node: Node) -> bool:
    return node.meta["val"].dim() == 2 or _order(node)[0] == 0


def _swaps(node: Node) -> bool:
    """False for a permutation that leaves matrices as they are."""
    return _order(node)[-1] != node.meta["val"].dim() - 1
