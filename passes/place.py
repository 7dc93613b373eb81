"""Step 3: decide the recipe of each linear, and remember who decided.

The order, strongest first: a decorator or context on the code, `set_recipe` on the module, the globs of the options, the defaults.
Everything here is plain data, so that a policy can be hashed into a cache key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from quartet_compile.passes.locate import Place
from quartet_compile.passes.recipe import Recipe
from quartet_compile.passes.site import Site, Unsupported

SCOPE_KEY = "quartet.recipe"
"""Annotation left by a decorator or context."""
MODULE_KEY = "quartet.set_recipe"
"""Annotation left by set_recipe."""
OBSERVED_KEY = "quartet.observe"
"""Annotation around a call whose numerics are observed."""

HEAD_NAMES = ("lm_head", "output", "head", "classifier", "score")
ROUTER_NAMES = ("router",)

LeftBecause = Literal["default", "user", "unsupported"]


class Scope(NamedTuple):
    """What eager code has entered around a compiled call: recipes, by a decorator or context, and by set_recipe; and whether somebody
    observes the call."""

    code: str | None = None
    module: str | None = None
    observed: bool = False


NOTHING_SAID = Scope()


@dataclass(frozen=True)
class Policy:
    """What decides about recipes: everything that the options, the model and the surrounding code said.

    recipes: the tables by name. default: the recipe of a linear that no rule speaks of. include, exclude: globs over names; include
    lifts the defaults, exclude wins over include. min_features: smaller linears are left alone. scope: what eager code
    around the compiled call said.
    """

    recipes: Mapping[str, Recipe]
    default: str = "quartet2"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_features: int = 64
    strict: bool = False
    scope: Scope = NOTHING_SAID


@dataclass(frozen=True)
class Decision:
    """The recipe of one linear, and who decided; or why it is left alone, and which class of reason that is."""

    linear: Site | Unsupported
    recipe: Recipe
    decided_by: str
    reason: str = ""
    left_because: LeftBecause | None = None


class UnsupportedLinear(RuntimeError):
    """Raised under `quartet.strict` for a linear that cannot be rewritten."""


def place(linears: Sequence[Site | Unsupported], policy: Policy) -> list[Decision]:
    """One decision for each linear. Raises ValueError for an unknown recipe, UnsupportedLinear under a strict policy."""
    decisions = [_decide(linear, policy) for linear in linears]
    refused = [d for d in decisions if d.left_because == "unsupported"]
    if policy.strict and refused:
        lines = "\n".join(f"  {d.linear.place.name} ({d.linear.place.source}): {d.reason}" for d in refused)
        raise UnsupportedLinear(
            f"quartet.strict: {len(refused)} linear(s) cannot run in NVFP4:\n{lines}\n"
            f'Leave them in the model\'s dtype on purpose with options={{"quartet.exclude": [...]}} or @quartet.recipe("bf16").'
        )
    return decisions


def covers(glob: str, name: str) -> bool:
    """True if a glob matches a linear's name, or that of a module it is in: "layers.0" covers "layers.0.q"."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), glob) for n in range(1, len(parts) + 1))


def unmatched_globs(linears: Sequence[Site | Unsupported], policy: Policy) -> list[tuple[str, str]]:
    """(option, glob) for each glob of the options that matches no linear of this graph."""
    names = [linear.place.name for linear in linears]
    options = (("quartet.include", policy.include), ("quartet.exclude", policy.exclude))
    return [(option, glob) for option, globs in options for glob in globs if not any(covers(glob, n) for n in names)]


def lookup(recipes: Mapping[str, Recipe], name: object, where: str) -> Recipe:
    """A recipe by name; ValueError with the valid names otherwise."""
    if not isinstance(name, str) or name not in recipes:
        raise ValueError(f"unknown recipe {name!r} ({where}); valid are {', '.join(sorted(recipes))}")
    return recipes[name]


def _decide(linear: Site | Unsupported, policy: Policy) -> Decision:
    name, decided_by = _requested(linear.place, policy)
    recipe = lookup(policy.recipes, name, f"{decided_by}, at {linear.place.name}")
    bf16 = Recipe("bf16")
    if recipe.is_empty:
        return Decision(linear, recipe, decided_by, f"asked for {name}", "user")
    if isinstance(linear, Unsupported):
        return Decision(linear, bf16, decided_by, linear.reason, "unsupported")
    if decided_by == "default" and (reason := _default_reason(linear, policy)):
        return Decision(linear, bf16, "default", reason, "default")
    return Decision(linear, recipe, decided_by)


def _requested(at: Place, policy: Policy) -> tuple[object, str]:
    """(recipe name, who asked for it), by the strongest rule that speaks of a place."""
    if SCOPE_KEY in at.annotation:
        return at.annotation[SCOPE_KEY], "decorator or context"
    if policy.scope.code is not None:
        return policy.scope.code, "context around the call"
    if MODULE_KEY in at.annotation:
        return at.annotation[MODULE_KEY], "set_recipe"
    if policy.scope.module is not None:
        return policy.scope.module, "set_recipe"
    for glob in policy.exclude:
        if covers(glob, at.name):
            return "bf16", f"quartet.exclude {glob!r}"
    for glob in policy.include:
        if covers(glob, at.name):
            return policy.default, f"quartet.include {glob!r}"
    return policy.default, "default"


def _default_reason(site: Site, policy: Policy) -> str:
    """Why the defaults leave a linear alone, or ""."""
    if site.computed:
        return "its weight is computed from parameters; quartet.include or a recipe of its own lifts this"
    parts = site.place.name.split(".")
    if site.embeds:
        return "its weight is also an embedding"
    if parts[-1] in HEAD_NAMES and not any(p.isdigit() for p in parts):
        return f"output head (named {parts[-1]})"
    if parts[-1] in ROUTER_NAMES:
        return "router of a mixture of experts"
    _, features_in, features_out = site.shape
    if min(features_in, features_out) < policy.min_features:  # features are never symbolic: they are a parameter's shape
        return f"min(in, out) = {min(int(features_in), int(features_out))} features, below {policy.min_features}"
    return ""
