"""Names in a report, as the whole model has them.

In a graph names begin at the module whose code it is: at the model itself, or, behind a graph break and where blocks are compiled one by
one, at a module inside. Such a graph may serve several modules. The parameters that it was called with tell which: each remembers, as plain
data in an attribute, which graphs it entered and under which names. Weak references to parameters would forbid `torch.utils.swap_tensors`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from quartet_compile.passes.locate import ROOT_NAME
from quartet_compile.reports import LinearReport

ENTERED = "_quartet_entered"
"""Attribute of a parameter: key of an `Entered` -> names. Keys are never used twice, since a saved parameter keeps its attributes."""

_numbers = itertools.count()


class Entered:
    """The parameters that one graph was called with, and their names in it.

    number, last_call: of the graph and of its last call, from one count.
    """

    def __init__(self) -> None:
        self.number, self.key = next(_numbers), uuid.uuid4().hex
        self.last_call = self.number

    def add(self, parameter: Tensor, name: str) -> None:
        names = parameter.__dict__.setdefault(ENTERED, {}).setdefault(self.key, [])
        if name not in names:
            names.append(name)

    def names_of(self, parameter: Tensor) -> list[str]:
        """The names of a parameter in this graph; none if it did not enter."""
        return getattr(parameter, ENTERED, {}).get(self.key, [])

    def watching(self, compiled: Callable[..., Any], parameters: Mapping[int, str]) -> Callable[..., Any]:
        """A compiled graph whose parameters remember that it was called with them. parameters: index of an argument -> name."""
        key, watched = self.key, tuple(parameters.items())

        @functools.wraps(compiled)
        def called(*args: Any) -> Any:
            self.last_call = next(_numbers)
            for index, name in watched:
                if key not in getattr(args[index], ENTERED, ()):
                    self.add(args[index], name)
            return compiled(*args)

        return called

    def forget(self, model: object) -> None:
        """Take everything back from the parameters of a model."""
        for parameter in model.parameters() if isinstance(model, nn.Module) else ():
            if self.names_of(parameter):
                entered = getattr(parameter, ENTERED)
                del entered[self.key]
                if not entered:
                    delattr(parameter, ENTERED)

    def in_model(self, linear: LinearReport, paths: Mapping[Tensor, list[str]]) -> LinearReport:
        """The linear under its name in the model, with the names of the others that the graph serves. paths: the model's parameters."""
        first, *others = names_in_model(linear.name, self.begins(paths))
        return dataclasses.replace(linear, name=first, also=tuple(others))

    def begins(self, paths: Mapping[Tensor, list[str]]) -> dict[str, list[str]]:
        """Where the names of its parameters begin in the model, see `begins`."""
        return begins(((parameter, name) for parameter in paths for name in self.names_of(parameter)), paths)


def begins(entered: Iterable[tuple[Tensor, str]], paths: Mapping[Tensor, list[str]]) -> dict[str, list[str]]:
    """Where the names that parameters have in a graph begin in the model: a list for each name, since a graph may serve several modules.

    entered: (parameter, name in the graph). paths: the model's parameters. Behind a graph break a tied linear gets the first name of its
    parameter that fits.
    """
    found: dict[str, list[str]] = {}
    for parameter, name in entered:
        fitting = [path for path in paths.get(parameter, ()) if f".{path}".endswith(f".{name}")]
        if fitting:
            path = name if name in fitting else fitting[0]
            found.setdefault(name, []).append(path.removesuffix(name))
    return found


def names_in_model(name: str, begins: Mapping[str, list[str]]) -> list[str]:
    """The names in the model of a linear of a graph, one for each that the graph serves.

    The name stays as it is if its own parameter is not in the model, and those of the graph do not agree on where they begin.
    """
    own = "" if name == ROOT_NAME else name
    parameter = own.partition("[")[0]
    mine = begins.get(parameter) or begins.get(f"{parameter}.weight".lstrip(".")) or _common(begins)
    return list(dict.fromkeys((begin + own).rstrip(".") or ROOT_NAME for begin in mine)) or [name]


def _common(begins: Mapping[str, list[str]]) -> list[str]:
    """Where all parameters of a graph begin, if they agree."""
    found = list(begins.values())
    return found[0] if found and all(other == found[0] for other in found) else []


def parameter_paths(model: object, prefix: str = "") -> dict[Tensor, list[str]]:
    """Every name of each parameter, behind that of the model."""
    paths: dict[Tensor, list[str]] = {}
    for path, parameter in model.named_parameters(prefix, remove_duplicate=False) if isinstance(model, nn.Module) else ():
        paths.setdefault(parameter, []).append(path)
    return paths
