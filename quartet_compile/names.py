"""Names in a report, as the whole model has them.

In a graph names begin at the module whose code it is: at the model itself, or, behind a graph break and where blocks are compiled one by
one, at a module inside. Such a graph may serve several modules. The parameters that it was called with tell which: each remembers, as plain
data in an attribute, which graphs it entered and under which names. Weak references to parameters would forbid `torch.utils.swap_tensors`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from quartet_compile.passes.locate import ROOT_NAME
from quartet_compile.reports import LinearReport

ENTERED = "_quartet_entered"
"""Attribute of a parameter: number of an `Entered` -> names."""

_numbers = itertools.count()


class Entered:
    """The parameters that one graph was called with, and their names in it."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def add(self, parameter: Tensor, name: str) -> None:
        names = parameter.__dict__.setdefault(ENTERED, {}).setdefault(self.number, [])
        if name not in names:
            names.append(name)

    def names_of(self, parameter: Tensor) -> list[str]:
        """The names of a parameter in this graph; none if it did not enter."""
        return getattr(parameter, ENTERED, {}).get(self.number, [])

    def watching(self, compiled: Callable[..., Any], parameters: Mapping[int, str]) -> Callable[..., Any]:
        """A compiled graph whose parameters remember that it was called with them. parameters: index of an argument -> name."""
        number, watched = self.number, tuple(parameters.items())

        @functools.wraps(compiled)
        def called(*args: Any) -> Any:
            for index, name in watched:
                if number not in getattr(args[index], ENTERED, ()):
                    self.add(args[index], name)
            return compiled(*args)

        return called

    def forget(self, model: object) -> None:
        """Take everything back from the parameters of a model."""
        for parameter in model.parameters() if isinstance(model, nn.Module) else ():
            if self.names_of(parameter):
                entered = getattr(parameter, ENTERED)
                del entered[self.number]
                if not entered:
                    delattr(parameter, ENTERED)

    def in_model(self, linear: LinearReport, paths: Mapping[Tensor, list[str]]) -> LinearReport:
        """The linear under its name in the model, with the names of the others that the graph serves. paths: the model's parameters.

        The name stays as it is if its own parameter is not among them, and those of the graph do not agree on where they begin. Behind a
        graph break a tied linear gets the first name of its parameter that fits.
        """
        begins: dict[str, list[str]] = {}
        for parameter, own in paths.items():
            for name in self.names_of(parameter):
                fitting = [path for path in own if f".{path}".endswith(f".{name}")]
                if fitting:
                    path = name if name in fitting else fitting[0]
                    begins.setdefault(name, []).append(path.removesuffix(name))
        own_name = "" if linear.name == ROOT_NAME else linear.name
        of = own_name.partition("[")[0]
        mine = begins.get(of) or begins.get(f"{of}.weight".lstrip(".")) or _common(begins)
        if not mine:
            return linear
        first, *others = dict.fromkeys((begin + own_name).rstrip(".") or ROOT_NAME for begin in mine)
        return dataclasses.replace(linear, name=first, also=tuple(others))


def _common(begins: Mapping[str, list[str]]) -> list[str]:
    """Where all parameters of a graph begin, if they agree."""
    found = list(begins.values())
    return found[0] if found and all(other == found[0] for other in found) else []


def parameter_paths(model: object) -> dict[Tensor, list[str]]:
    """Every name of each parameter."""
    paths: dict[Tensor, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else ():
        paths.setdefault(parameter, []).append(path)
    return paths
