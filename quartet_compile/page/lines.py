"""Which lines of the graphs' sources belong to which item, and which lines of both sides belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quartet_compile.page.items import Item
from quartet_compile.reports import GraphReport

_ASSIGNED = re.compile(r'^ {8}(\w+)(?:: "[^"]*")? = (?:(\w+)\[\d+\])?')
"""A node's line in a printed graph; what is inside regions and branches is indented further. The second group: what it is a part of."""

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Lines:
    """Numbers of lines, from 1. nodes: those of an item's nodes by name. all: with the lines that take their results apart."""

    nodes: dict[str, int]
    all: list[int]


class Source:
    """The lines of one source, by node."""

    def __init__(self, text: str) -> None:
        self.line_of: dict[str, int] = {}
        self.parts: dict[str, list[int]] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if match := _ASSIGNED.match(line):
                self.line_of.setdefault(match[1], number)
                if match[2]:
                    self.parts.setdefault(match[2], []).append(number)

    def lines(self, names: Sequence[str]) -> Lines:
        nodes = {name: self.line_of[name] for name in names if name in self.line_of}
        parts = [number for name in nodes for number in self.parts.get(name, ())]
        return Lines(nodes, sorted({*nodes.values(), *parts}))


@dataclass(frozen=True)
class Link:
    """The lines of an item before and after in one direction. pairs: the line of a product, and that of what computes it now."""

    before: Lines
    after: Lines
    pairs: list[tuple[int, int]]


def links_of(graph: GraphReport, items: Mapping[int, Item]) -> dict[str, dict[int, Link]]:
    """By direction, then by the number of an item of this graph. An item that has no line in a direction is not there."""
    links: dict[str, dict[int, Link]] = {}
    for direction in DIRECTIONS:
        before, after = Source(getattr(graph, f"{direction}_before")), Source(getattr(graph, direction))
        links[direction] = {}
        for number, item in items.items():
            link = Link(before.lines(item.before), after.lines(item.after), [])
            if link.before.all or link.after.all:
                link.pairs.extend(_pairs(item, link))
                links[direction][number] = link
    return links


def _pairs(item: Item, link: Link) -> list[tuple[int, int]]:
    """`after` begins with what computes the products of `before`; where one node had several results, as the gradient of a convolution,
    there are more of them, and the last one of `before` stands for the rest."""
    products = len(item.before) if item.linear is None else max(len(item.linear.in_graph), len(item.before))
    pairs = []
    for i, name in enumerate(item.after[:products]):
        old = item.before[min(i, len(item.before) - 1)]
        if old in link.before.nodes and name in link.after.nodes:
            pairs.append((link.before.nodes[old], link.after.nodes[name]))
    return pairs
