"""Names in a report, as the whole model has them.

In a graph names begin at the module whose code it is: at the model itself, or, behind a graph break and where blocks are compiled one by
one, at a module inside. Such a graph may serve several modules. The parameters that it was called with tell which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quartet_compile.passes.locate import ROOT_NAME
from quartet_compile.report import LinearReport


class Entered:
    """The parameters that one graph was called with, and their names in it."""

    def __init__(self) -> None:
        self.names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def add(self, parameter: Tensor, name: str) -> None:
        self.names.setdefault(parameter, {})[name] = None

    def in_model(self, linear: LinearReport, paths: Mapping[Tensor, list[str]]) -> LinearReport:
        """The linear under its name in the model, with the names of the others that the graph serves. paths: the model's parameters."""
        first, *others = names_in_model(linear.name, self.begins(paths))
        return dataclasses.replace(linear, name=first, also=tuple(others))

    def begins(self, paths: Mapping[Tensor, list[str]]) -> dict[str, list[str]]:
        """Where the names of each parameter in the graph begin in the model. paths: the model's parameters.

        Behind a graph break a tied linear gets the first name of its parameter that fits.
        """
        begins: dict[str, list[str]] = {}
        for parameter, names in self.names.items():
            for name in names:
                fitting = [path for path in paths.get(parameter, ()) if f".{path}".endswith(f".{name}")]
                if fitting:
                    path = name if name in fitting else fitting[0]
                    begins.setdefault(name, []).append(path.removesuffix(name))
        return begins


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
