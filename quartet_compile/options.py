"""The options of the backend: ``torch.compile(..., options={"quartet.recipe": ..., "max_autotune": True})``.

Keys that start with ``quartet.`` are ours; all others go to Inductor unchanged. The environment variable QUARTET_OPTIONS is stronger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from quartet_compile.environment import VARIABLE, read_environment
from quartet_compile.passes.place import Policy, Rule, Scope, lookup
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

    No options themselves: said_by: where each option that was given comes from, for reports. stronger: globs that count before include and
    exclude.
    """

    recipe: str = "quartet2"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_features: int = 64
    strict: bool = False
    recompute: str = "none"
    mode: str | None = None
    said_by: Mapping[str, str] = field(default_factory=dict)
    stronger: tuple[Rule, ...] = ()

    def policy(self, scope: Scope) -> Policy:
        """The policy that these options stand for, under a recipe context that surrounds the compiled call, if any."""
        rules = *self.stronger, *_rules(PREFIX, self.include, self.exclude)
        channels = self.said_by.get("recipe", Policy.default_channel), self.said_by.get("min_features", Policy.min_features_channel)
        return Policy(RECIPES, self.recipe, rules, self.min_features, self.strict, scope, *channels)


TYPES = {f.name: str(f.type) for f in fields(Options) if f.name not in ("said_by", "stronger")}
"""The options, and the annotation of each."""


def _rules(prefix: str, include: Sequence[str], exclude: Sequence[str]) -> list[Rule]:
    """The globs of two options, the stronger one first."""
    return [Rule(glob, True, f"{prefix}exclude") for glob in exclude] + [Rule(glob, False, f"{prefix}include") for glob in include]


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """(our options, Inductor's options), as they are in code and in the environment now.

    Raises ValueError or TypeError for an unknown key, a wrong type or an unknown recipe.
    """
    ours, others = {}, {}
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, got {options!r}")
    for key, value in (options or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"the name of an option must be a string, got {key!r}")
        if key in TYPES:  # Inductor has none of these names
            raise ValueError(f"unknown option {key!r}; did you mean {PREFIX}{key}?")
        if not key.startswith(PREFIX):
            others[key] = value
            continue
        name = key.removeprefix(PREFIX)
        if name not in TYPES:
            near = get_close_matches(name, TYPES, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else "."
            raise ValueError(f"unknown option {key!r}{hint} Valid are {', '.join(PREFIX + v for v in sorted(TYPES))}.")
        ours[name] = _checked(key, name, value)
    result = Options(**ours, said_by={name: PREFIX + name for name in ours})
    lookup(RECIPES, result.recipe, "option quartet.recipe")
    return _under_environment(result), others


def _under_environment(options: Options) -> Options:
    """The options with those of QUARTET_OPTIONS in their place; its globs count first, and those in code behind them."""
    found = read_environment(TYPES)
    checked = {name: _checked(f"{VARIABLE} {name}", name, value) for name, value in found.items()}
    if "recipe" in checked:
        lookup(RECIPES, checked["recipe"], f"{VARIABLE} recipe")
    rules = _rules(f"{VARIABLE} ", checked.pop("include", ()), checked.pop("exclude", ()))
    said_by = {**options.said_by, **{name: f"{VARIABLE} {name}" for name in checked}}
    return replace(options, **checked, said_by=said_by, stronger=tuple(rules))


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
