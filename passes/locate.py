"""Where a product stands in the model: its name, source line and annotations, read from node metadata."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

ROOT_NAME = "(root)"
"""Name of a linear that is compiled by itself."""


@dataclass(frozen=True)
class Place:
    """A product's place, for names, rules and reports.

    name: module path, with the parameter's name behind it where that is not `weight`. source: "file.py:12". annotation: what
    `torch.fx.traceback.annotate` left on the node.
    """

    name: str
    source: str
    annotation: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.source})" if self.source else self.name


def locate(node: Node, weights: Sequence[str]) -> Place:
    """The place of a product that reads the parameters named `weights`."""
    stack = list((node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}).values())
    path = dotted(stack[-1][0]) if stack else ""
    return Place(_name(path, weights) or ROOT_NAME, _source(node), dict(node.meta.get("custom") or {}))


WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""Modules that torch puts around a user's; their names are no part of a path."""

_GETATTR = re.compile(r"getattr\(([^()]*), '([^']*)'\)")
_ROOT = re.compile(r"^([LG]\['args'\]\[0\]|[LG]\['[^']*'\])((\.__closure__\[\d+\])?\.cell_contents)*")
_STEPS = (
    (".forward.__self__", ""), (".__dict__['_modules']['", "."),
    ("._modules['", "."), ("._parameters['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", ""),
    *((f".{wrapper}", "") for wrapper in WRAPPERS),
)  # fmt: skip


def dotted(path: str) -> str:
    """"layers.0.q" for Dynamo's "L['self'].layers.0.q", "L['self']._modules['layers']._modules['0']._modules['q']" and
    "getattr(L['m'].layers, '0').q".

    The root is dropped: a local, a global or a closure's cell. A forward that set_recipe put on a module leaves no trace either.
    """
    while (plain := _GETATTR.sub(r"\1.\2", path)) != path:
        path = plain
    path = _ROOT.sub("", path)
    for old, new in _STEPS:
        path = path.replace(old, new)
    return path.strip(".")


def _name(path: str, weights: Sequence[str]) -> str:
    """The module's path; where one parameter lives at or below it under another name than `weight`, that parameter's."""
    if len(weights) != 1:
        return path
    (weight,) = weights
    below = weight.removeprefix(path + ".") if path else weight
    if below == weight and path:
        return path  # the parameter belongs to another module
    return weight if below != "weight" and not below.endswith(".weight") else weight.removesuffix("weight").rstrip(".")


_NOT_THE_USERS = (f"{torch.__path__[0]}/nn/modules", *sys.modules[__name__.partition(".")[0]].__path__)


def _source(node: Node) -> str:
    """"file.py:12": the innermost line of the model's own code in the node's stack trace."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_NOT_THE_USERS)]
    return f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}" if own else ""
