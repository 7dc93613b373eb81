"""Step 3: decide the recipe of each linear, and remember who decided.

The order, strongest first: a decorator or context on the code, `set_recipe` on the module, the globs of the options, the defaults.
Everything here is plain data, so that a policy can be hashed into a cache key. Every decision names its channel: what the user wrote, or
which rule of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from quartet_compile.passes.locate import Place
from quartet_compile.passes.recipe import Recipe
from quartet_compile.passes.site import Site, Unsupported

SCOPE_KEY = "quartet.recipe"
"""Annotation left by a decorator or context."""
CHANNEL_KEY = "quartet.recipe.channel"
"""Annotation beside it: which one, in words."""
MODULE_KEY = "quartet.set_recipe"
"""Annotation left by set_recipe."""
SET_RECIPE = "set_recipe"
"""Its channel, as far as a graph knows: naming the call would make Dynamo guard on it. A report looks it up in the model."""
OBSERVED_KEY = "quartet.observe"
"""Annotation around a call whose numerics are observed: of how many numbers of a tensor at most, 0 for all, in digits."""

HEAD_NAMES = ("lm_head", "output", "head", "classifier", "score")
ROUTER_NAMES = ("router",)

LeftBecause = Literal["default", "user", "unsupported"]


@dataclass(frozen=True)
class Scope:
    """What eager code has entered around a compiled call: recipes, by a decorator or context, and by set_recipe; and whether somebody
    observes the call, and how many numbers of a tensor at most, 0 for all.

    channel: which decorator or context, in words; scopes that differ in it alone are the same.
    """

    code: str | None = None
    module: str | None = None
    channel: str = field(default="context around the call", compare=False)
    observed: int | None = None


NOTHING_SAID = Scope()


class Rule(NamedTuple):
    """A glob of an option. excludes: linears that it covers are left alone; otherwise it lifts the defaults from them. option: its name."""

    glob: str
    excludes: bool
    option: str


@dataclass(frozen=True)
class Policy:
    """What decides about recipes: everything that the options, the model and the surrounding code said.

    recipes: the tables by name. default: the recipe of a linear that no rule speaks of. rules: globs over names, the first that covers a
    linear counts. min_features: smaller linears are left alone. scope: what eager code around the compiled call said. default_channel,
    min_features_channel: who chose them.
    """

    recipes: Mapping[str, Recipe]
    default: str = "quartet2"
    rules: tuple[Rule, ...] = ()
    min_features: int = 64
    strict: bool = False
    scope: Scope = NOTHING_SAID
    default_channel: str = "default"
    min_features_channel: str = "default (min_features)"


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
        lines = "\n".join(f"  {d.linear.place}: {d.reason}" for d in refused)
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
    return [(rule.option, rule.glob) for rule in policy.rules if not any(covers(rule.glob, n) for n in names)]


def lookup(recipes: Mapping[str, Recipe], name: object, where: str) -> Recipe:
    """A recipe by name. Otherwise ValueError with the valid names, TypeError for what is no name."""
    if not isinstance(name, str):
        raise TypeError(f'{where} takes the name of a recipe, such as "bf16", not {getattr(name, "__name__", type(name).__name__)}')
    if name not in recipes:
        raise ValueError(f"unknown recipe {name!r} ({where}); valid are {', '.join(sorted(recipes))}")
    return recipes[name]


def _decide(linear: Site | Unsupported, policy: Policy) -> Decision:
    name, decided_by, by_default = _requested(linear.place, policy)
    recipe = lookup(policy.recipes, name, f"{decided_by}, at {linear.place.name}")
    bf16 = Recipe("bf16")
    if recipe.is_empty:
        return Decision(linear, recipe, decided_by, f"asked for {name}", "user")
    if isinstance(linear, Unsupported):
        return Decision(linear, bf16, decided_by, linear.reason, "unsupported")
    if by_default and (exception := _default_exception(linear, policy)):
        return Decision(linear, bf16, *exception, "default")
    return Decision(linear, recipe, decided_by)


def _requested(at: Place, policy: Policy) -> tuple[object, str, bool]:
    """(recipe name, who asked for it, whether the defaults may make an exception), by the strongest rule that speaks of a place."""
    if SCOPE_KEY in at.annotation:
        return at.annotation[SCOPE_KEY], str(at.annotation[CHANNEL_KEY]), False
    if policy.scope.code is not None:
        return policy.scope.code, policy.scope.channel, False
    if MODULE_KEY in at.annotation:
        return at.annotation[MODULE_KEY], SET_RECIPE, False
    if policy.scope.module is not None:
        return policy.scope.module, SET_RECIPE, False
    for rule in policy.rules:
        if covers(rule.glob, at.name):
            return "bf16" if rule.excludes else policy.default, f"{rule.option} {rule.glob!r}", False
    return policy.default, policy.default_channel, True


def _default_exception(site: Site, policy: Policy) -> tuple[str, str] | None:
    """(which rule, why) if the defaults leave a linear alone."""
    if site.computed:
        return "default (computed weight)", "its weight is computed from parameters; quartet.include or a recipe of its own lifts this"
    parts = site.place.name.split(".")
    if site.embeds:
        return "default (tied weight)", "its weight is also an embedding"
    if parts[-1] in HEAD_NAMES and not any(p.isdigit() for p in parts):
        return "default (output head)", f"output head (named {parts[-1]})"
    if parts[-1] in ROUTER_NAMES:
        return "default (router)", "router of a mixture of experts"
    _, features_in, features_out = site.shape
    if min(features_in, features_out) < policy.min_features:  # features are never symbolic: they are a parameter's shape
        smaller = min(int(features_in), int(features_out))
        return policy.min_features_channel, f"min(in, out) = {smaller} features, below {policy.min_features}"
    return None
