"""What matching finds: a linear with its three products, or one that cannot be rewritten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from quartet_compile.passes.locate import Place
from quartet_compile.passes.operand import Batch, Operand


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
    tensors; or, "folded", the whole of it, where all matrices meet the same weight. ends: of `_grouped_mm`, the node that says where each
    group of x's rows ends; w is a stack of matrices, one for each. computed: the weight is computed from parameters. embeds: an embedding
    reads the same parameter.
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
    batch: Batch = None
    ends: Node | None = None
    computed: bool = False
    embeds: bool = False

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt, int | torch.SymInt]:
        """T, I, O."""
        return *self.x.shape, self.w.shape[0]

    @property
    def products(self) -> tuple[Node, ...]:
        """The nodes that multiply: y, dx, dw; of a convolution, whose gradients are parts of one node, that one. Before rewriting."""
        gradients = [g.node for g in (self.dgrad, self.wgrad) if g is not None]
        if self.batch == "pixels":
            gradients = [part.all_input_nodes[0] for part in gradients]
        return tuple(dict.fromkeys([self.forward, *gradients]))

    @property
    def groups(self) -> int | None:
        """How many groups of tokens there are, each with a weight of its own."""
        return None if self.ends is None else int(self.w.base.meta["val"].shape[0])

    @property
    def name(self) -> str:
        """That of its place; of several matrices of a batch, with the number of this one; of groups, with their numbers."""
        if self.groups is not None:
            return f"{self.place.name}[0:{self.groups}]"
        several = isinstance(self.batch, int) and int(self.forward.meta["val"].shape[0]) > 1
        return f"{self.place.name}[{self.batch}]" if several else self.place.name


@dataclass(frozen=True)
class Unsupported:
    """A product with a parameter in it that cannot be rewritten, and why. gradients: the backward products that belong to it."""

    place: Place
    node: Node
    reason: str
    gradients: tuple[Node, ...] = ()

    @property
    def products(self) -> tuple[Node, ...]:
        """The nodes that multiply."""
        return self.node, *self.gradients
