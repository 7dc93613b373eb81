"""What can be selected on the page, and where it stands in the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from quartet_compile.passes.locate import ROOT_NAME
from quartet_compile.reports import LinearReport, OtherProduct, Report

State = Literal["nvfp4", "default", "user", "unsupported", "missing", "other"]

STATES: dict[State, str] = {
    "nvfp4": "in NVFP4",
    "default": "left by default",
    "user": "left by the user",
    "unsupported": "unsupported",
    "missing": "not found",
    "other": "other products",
}
"""What can have become of an item, and how the page says it."""


@dataclass(frozen=True)
class Leaf:
    """A place in the module tree. key: unique on the page, what its address has behind "#". module: the dotted path of the module that it
    is in. label: its own part of the name. item: the index of its item."""

    key: str
    name: str
    module: str
    label: str
    item: int


@dataclass(frozen=True)
class Item:
    """A linear; or the other products of one module in one graph; or a weight that no graph contains.

    names: where it stands, several for a linear that stands for others. graph: the index of its graph, None for one without.
    """

    state: State
    names: tuple[str, ...]
    graph: int | None = None
    linear: LinearReport | None = None
    products: tuple[OtherProduct, ...] = ()

    @property
    def before(self) -> tuple[str, ...]:
        """Its nodes in the unchanged graphs."""
        return self.linear.before if self.linear is not None else tuple(product.node for product in self.products)

    @property
    def after(self) -> tuple[str, ...]:
        """Its nodes in the rewritten graphs: a product of no linear is in both."""
        return self.linear.after if self.linear is not None else self.before

    @property
    def words(self) -> str:
        """What the search looks through."""
        words = [*self.names, STATES[self.state]]
        if self.linear is not None:
            words += [self.linear.source, self.linear.recipe, self.linear.decided_by, self.linear.reason, self.linear.dtype]
        words += [word for product in self.products for word in (product.operator, product.source, product.node)]
        return "\n".join(dict.fromkeys(words)).lower()


def items_of(report: Report) -> list[Item]:
    """In the order of the report: the linears of each graph that is in use, its other products by module, then what is missing."""
    items = []
    for i, graph in enumerate(report.graphs):
        if graph.superseded:
            continue
        items += [Item(_state(linear), linear.names, i, linear) for linear in graph.linears]
        modules: dict[str, list[OtherProduct]] = {}
        for product in graph.others:
            modules.setdefault(product.module or ROOT_NAME, []).append(product)
        items += [Item("other", (module,), i, products=tuple(products)) for module, products in modules.items()]
    return items + [Item("missing", (name,)) for name in report.not_captured]


def leaves_of(items: Iterable[Item]) -> list[Leaf]:
    """One for each name of each item. A name that is taken gets a number behind it: one parameter can be two linears."""
    leaves, taken = [], set()
    for i, item in enumerate(items):
        for name in item.names:
            module, _, label = name.rpartition(".")
            if item.state == "other":
                module, label = "" if name == ROOT_NAME else name, "other products"
            stem = f"{name}/products" if item.state == "other" else name
            key, number = stem, 1
            while key in taken:
                number += 1
                key = f"{stem}~{number}"
            taken.add(key)
            leaves.append(Leaf(key, name, module, label, i))
    return leaves


def _state(linear: LinearReport) -> State:
    if linear.products:
        return "nvfp4"
    if linear.left_because is None:
        raise ValueError(f"{linear.name} has neither a product in NVFP4 nor a reason why not")
    return linear.left_because
