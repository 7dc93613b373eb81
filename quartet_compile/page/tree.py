"""The modules of a model as a tree, from the dotted names of its items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from quartet_compile.page.items import Item, Leaf, State

ALIKE = 3
"""Blocks in a row that are folded into one line, if they are alike."""


@dataclass
class Module:
    """label: its own part of the name, several parts where it contains one module only, or "1 … 42" for blocks that are alike.

    path: dotted. parts: what it contains, in the order of the report. blocks: how many alike modules it stands for, 0 for one of its own.
    """

    label: str
    path: str
    parts: list[Module | Leaf] = field(default_factory=list)
    blocks: int = 0

    def leaves(self) -> Iterator[Leaf]:
        for part in self.parts:
            if isinstance(part, Leaf):
                yield part
            else:
                yield from part.leaves()

    def states(self, items: Sequence[Item]) -> Counter[State]:
        """How many linears, by state; other products are no linears."""
        states = Counter(items[leaf.item].state for leaf in self.leaves())
        del states["other"]
        return states


def tree_of(items: Sequence[Item], leaves: Sequence[Leaf]) -> Module:
    """The root. Numbered modules stand in the order of their numbers."""
    modules = {"": Module("", "")}

    def module(path: str) -> Module:
        if path not in modules:
            parent, _, label = path.rpartition(".")
            modules[path] = Module(label, path)
            module(parent).parts.append(modules[path])
        return modules[path]

    for leaf in leaves:
        module(leaf.module).parts.append(leaf)
    _tidy(modules[""], items)
    return modules[""]


def _tidy(module: Module, items: Sequence[Item]) -> None:
    for part in module.parts:
        if isinstance(part, Module):
            _tidy(part, items)
    if all(part.label.isdigit() for part in module.parts):
        module.parts.sort(key=lambda part: int(part.label))
    module.parts = list(_folded(module.parts, items))
    if module.path and len(module.parts) == 1:
        (part,) = module.parts
        if isinstance(part, Module) and not part.blocks:
            module.label, module.path, module.parts = f"{module.label}.{part.label}", part.path, part.parts


def _folded(parts: Sequence[Module | Leaf], items: Sequence[Item]) -> Iterator[Module | Leaf]:
    """Numbered modules that are alike and follow each other become one."""
    start = 0
    while start < len(parts):
        run = [parts[start]]
        if _is_block(parts[start]):
            form = _form(parts[start], items)
            for part in parts[start + 1 :]:
                if not _is_block(part) or _form(part, items) != form:
                    break
                run.append(part)
        first, last = run[0], run[-1]
        if len(run) >= ALIKE and isinstance(first, Module) and isinstance(last, Module):
            yield Module(f"{first.label} … {last.label}", f"{first.path} … {last.path}", run, len(run))
        else:
            yield from run
        start += len(run)


def _is_block(part: Module | Leaf) -> bool:
    return isinstance(part, Module) and part.label.partition(".")[0].isdigit()


def _form(part: Module | Leaf, items: Sequence[Item]) -> object:
    """What parts that are alike have in common: all but numbers and nodes."""
    if isinstance(part, Module):
        own = part.label.partition(".")[2] if _is_block(part) else part.label
        return own, [_form(child, items) for child in part.parts]
    item = items[part.item]
    linear = item.linear
    facts = None if linear is None else (linear.shape, linear.recipe, linear.products, linear.reason, linear.source)
    return part.label, item.state, facts, [(p.operator, p.shape, p.backward) for p in item.products]
