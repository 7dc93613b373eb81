"""The options of the backend: ``torch.compile(..., options={"quartet.recipe": ..., "max_autotune": True})``.

Keys that start with ``quartet.`` are ours; all others go to Inductor unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from quartet_compile.passes.place import Policy, Scope, lookup
from quartet_compile.passes.recompute import CHOICES
from quartet_compile.recipes import RECIPES

PREFIX = "quartet."


@dataclass(frozen=True)
class Options:
    """What ``quartet.*`` options mean.

    recipe: the recipe of linears that nothing else speaks of. include: globs over linear names that lift the default exceptions.
    exclude: globs over linear names that are left alone; wins over include. min_features: linears with fewer in or out features are left
    alone. strict: raise if a linear cannot be rewritten. recompute: what the backward pass quantizes again instead of finding it saved:
    "none", "weights", or "operands" (`passes.recompute`). mode: a mode of torch.compile, which forbids giving mode= beside options=.
    """

    recipe: str = "quartet2"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_features: int = 64
    strict: bool = False
    recompute: str = "none"
    mode: str | None = None

    def policy(self, scope: Scope) -> Policy:
        """The policy that these options stand for, under a recipe context that surrounds the compiled call, if any."""
        return Policy(RECIPES, self.recipe, self.include, self.exclude, self.min_features, self.strict, scope)


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """(our options, Inductor's options). Raises ValueError or TypeError for an unknown key, a wrong type or an unknown recipe."""
    ours, others = {}, {}
    valid = {f.name for f in fields(Options)}
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, got {options!r}")
    for key, value in (options or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"the name of an option must be a string, got {key!r}")
        if not key.startswith(PREFIX):
            others[key] = value
            continue
        name = key.removeprefix(PREFIX)
        if name not in valid:
            near = get_close_matches(name, valid, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else "."
            raise ValueError(f"unknown option {key!r}{hint} Valid are {', '.join(PREFIX + v for v in sorted(valid))}.")
        ours[name] = _checked(key, name, value)
    result = Options(**ours)
    lookup(RECIPES, result.recipe, "option quartet.recipe")
    return result, others


def _checked(key: str, name: str, value: Any) -> Any:
    if name in ("include", "exclude"):
        globs = (value,) if isinstance(value, str) else value
        if not isinstance(globs, (list, tuple, set)) or not all(isinstance(g, str) for g in globs):
            raise TypeError(f"option {key!r} takes a glob or a list of globs, got {value!r}")
        return tuple(globs)
    if name == "mode" and value is None:
        return None
    if name == "min_features":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise TypeError(f"option {key!r} takes a whole number from 0 on, got {value!r}")
        return value
    if name == "recompute":
        if value not in CHOICES:
            raise ValueError(f"option {key!r} is one of {', '.join(map(repr, CHOICES))}, got {value!r}")
        return value
    expected = {"recipe": str, "strict": bool, "mode": str}[name]
    if not isinstance(value, expected):
        raise TypeError(f"option {key!r} takes a {expected.__name__}, got {value!r}")
    return value
