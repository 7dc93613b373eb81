"""A matrix of a graph, looked at through transposes: operands that are equal compare equal, however they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Node

aten = torch.ops.aten

TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}
ALIASES = {aten.alias.default, aten.detach.default}


Batch = int | Literal["folded", "each", "pixels"] | None
"""Which matrix of a tensor is meant: of two dimensions, None; of three, one by its number, all of them on top of each other ("folded"), or
every one of them, for a group of rows of its own ("each"); of [N, channels, ...], the channels of each pixel ("pixels")."""


@dataclass(frozen=True)
class Operand:
    """A matrix [rows, columns]: `base`, or base[batch], or base.flatten(0, 1) where `batch` is "folded", a stack of matrices where it is
    "each", base.movedim(1, -1).flatten(0, -2) where it is "pixels"; or the transpose of that."""

    base: Node
    transposed: bool
    batch: Batch = None

    @property
    def t(self) -> Operand:
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        if self.batch == "pixels":
            rows, columns, *leading = self.base.meta["val"].shape
            rows = math.prod(leading, start=rows)
        else:
            *leading, rows, columns = self.base.meta["val"].shape
        if self.batch == "folded":
            rows = rows * leading[0]
        return (columns, rows) if self.transposed else (rows, columns)


def operand(node: Node, batch: Batch = None) -> Operand:
    """The matrix that a node holds, looking through transposes and aliases; not where matrices are folded or made of pixels."""
    if batch in ("folded", "pixels"):
        return Operand(node, False, batch)
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
