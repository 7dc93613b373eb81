"""The first and the last blocks of a model, as a selector: `set_recipe(model, "bf16", only=quartet.blocks(first=1, last=2))`.

The blocks are the model's chain of repeated layers. Names say little across models (`layers`, `h`, `blocks`, `encoder.layer`), so it is
found by what it is: modules of one kind, one after the other in a container, each with a matrix inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from quartet_compile.modules import named_modules, unwrapped

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
MINOR = 0.1
"""A chain with a smaller share of the largest one's parameters is a part of something else, such as convolutions before an encoder."""


@dataclass(frozen=True)
class Blocks:
    """What `blocks` returns: a selector for `set_recipe` and `RecipeSchedule`."""

    first: int
    last: int
    of: str | None

    def __str__(self) -> str:
        given = [f"{name}={value!r}" for name, value in (("first", self.first), ("last", self.last), ("of", self.of)) if value]
        return f"blocks({', '.join(given)})"

    def select(self, root: nn.Module) -> dict[str, nn.Module]:
        """Name -> block, for those of a model. Raises ValueError if it is not clear which they are, or if there are not enough."""
        found: dict[str, nn.Module] = {}
        for chain in _chosen(unwrapped(root), self):
            count = len(chain.blocks)
            if self.first + self.last > count:
                raise ValueError(f"quartet.{self}: {chain} has fewer than {self.first + self.last} blocks")
            found.update(chain.blocks[: self.first] + chain.blocks[count - self.last :])
        return found


def blocks(*, first: int = 0, last: int = 0, of: str | None = None) -> Blocks:
    """The first and the last blocks of a model, for `only=`.

        quartet.set_recipe(model, "bf16", only=quartet.blocks(first=1, last=2))
        quartet.set_recipe(model, "bf16", only=["lm_head", quartet.blocks(last=1, of="*decoder*")])

    Blocks are the largest chain of repeated layers: two or more children of an nn.ModuleList, an nn.Sequential or an nn.ModuleDict whose
    keys are digits, next to each other, each with a matrix inside, all of a common class or with the same names of parameters. What lies
    inside a chain, such as the experts of a block, is none.

    With another chain of at least a tenth of its parameters, as an encoder has beside a decoder, it is not clear which is meant. Then `of`
    says it: a glob over containers, and each that it matches, the outermost where they are nested, is a chain, whatever its children are.

    Raises TypeError or ValueError unless first and last are whole numbers and select something; when it is used, ValueError where there is
    no chain, more than one, or one with fewer than first + last blocks.
    """
    for count in (first, last):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"quartet.blocks takes whole numbers, got {count!r}")
    if min(first, last) < 0 or not first + last:
        raise ValueError(f"quartet.blocks: first={first} and last={last} select no blocks")
    if of is not None and not isinstance(of, str):
        raise TypeError(f"quartet.blocks: `of` is a glob over containers, got {of!r}")
    return Blocks(first, last, of)


@dataclass(frozen=True)
class Chain:
    """Blocks of one container, by their names in the model."""

    name: str
    blocks: tuple[tuple[str, nn.Module], ...]

    def __str__(self) -> str:
        kinds = dict.fromkeys(type(block).__name__ for _, block in self.blocks)
        return f"{self.name or 'the model itself'} ({len(self.blocks)} x {', '.join(kinds)})"

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for _, block in self.blocks for parameter in block.parameters())


def chains(module: nn.Module, name: str = "") -> Iterator[Chain]:
    """The chains of repeated layers in a module, without those inside another."""
    found = [Chain(name, tuple(run)) for run in _runs(_links(module, name))]
    yield from found
    covered = {id(block) for chain in found for _, block in chain.blocks}
    for child_name, child in _children(module, name):
        if id(child) not in covered:
            yield from chains(child, child_name)


def _chosen(root: nn.Module, wanted: Blocks) -> list[Chain]:
    containers = [Chain(n, tuple(links)) for n, module in named_modules(root).items() if (links := _links(module, n))]
    there = _list(containers)
    if wanted.of is not None:
        meant = [chain for chain in containers if fnmatchcase(chain.name, wanted.of)]
        if not meant:
            raise ValueError(f"quartet.{wanted}: no container of {type(root).__name__} has this name; it has {there}")
        return [chain for chain in meant if not any(chain.name.startswith(f"{other.name}.") for other in meant)]
    found = sorted(chains(root), key=lambda chain: -chain.parameters)
    major = [chain for chain in found if chain.parameters >= MINOR * found[0].parameters]
    if not major:
        hint = f"; say with of= which it is: {there}" if containers else ""
        raise ValueError(f"quartet.{wanted}: {type(root).__name__} has no chain of repeated layers{hint}")
    if len(major) > 1:
        raise ValueError(f"quartet.{wanted}: {type(root).__name__} has {len(major)} chains, say with of= which it is: {_list(major)}")
    return major


def _list(chains: Sequence[Chain]) -> str:
    return ", ".join(str(chain) for chain in chains[:8]) or "none"


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield f"{name}.{child_name}".lstrip("."), unwrapped(child)


def _links(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """What could be blocks: a container's children that hold a matrix and are no table of embeddings."""
    if not isinstance(module, CONTAINERS) or (isinstance(module, nn.ModuleDict) and not all(key.isdigit() for key in module)):
        return []
    return [
        (child_name, child) for child_name, child in _children(module, name)
        if not isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and any(parameter.dim() >= 2 for parameter in child.parameters())
    ]  # fmt: skip


def _runs(links: Sequence[tuple[str, nn.Module]]) -> list[list[tuple[str, nn.Module]]]:
    """Two or more neighbours that are alike, and unlike all others of the container: layers of two kinds that alternate are none."""
    runs: list[list[tuple[str, nn.Module]]] = []
    for link in links:
        if runs and _alike([module for _, module in (*runs[-1], link)]):
            runs[-1].append(link)
        else:
            runs.append([link])
    alone = [run for run in runs if not any(_alike([run[0][1], other[0][1]]) for other in runs if other is not run)]
    return [run for run in alone if len(run) > 1]


def _alike(modules: Sequence[nn.Module]) -> bool:
    """True for modules of a common class, other than those that any modules may have, or whose parameters have the same names."""
    common = set.intersection(*(set(type(module).__mro__) for module in modules))
    if any(issubclass(c, nn.Module) and c not in (nn.Module, *CONTAINERS) for c in common):
        return True
    first, *others = ([name for name, _ in module.named_parameters()] for module in modules)
    return all(names == first for names in others)
