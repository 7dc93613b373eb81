"""Choosing recipes in code: a decorator, a context, and a setter for modules one cannot edit.

All of them act through `torch.fx.traceback.annotate`, whose annotations reach the forward and the backward nodes of a captured graph,
through checkpointing too, and do nothing in eager code.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.traceback import annotate, annotate_fn

from quartet_compile.passes.place import CLASS_ATTRIBUTE, MODULE_KEY, SCOPE_KEY, lookup
from quartet_compile.recipes import RECIPES

T = TypeVar("T")


def recipe(name: str) -> Any:
    """The recipe of all linears inside: a decorator for functions, methods and nn.Module classes, and a context manager.

        @quartet.recipe("bf16")
        class Router(nn.Module): ...

        with quartet.recipe("bf16"):          # inside the compiled function
            logits = self.score(x)

    The innermost one decides, and it is stronger than `set_recipe`, options and defaults. Entered in eager code around a compiled call, a
    context counts for what is compiled inside it, and such a graph refuses to run outside (torch cannot guard on it). Raises ValueError
    for an unknown name.
    """
    if torch.compiler.is_compiling():
        return annotate({SCOPE_KEY: name})  # Dynamo knows this object; it would not trace a class of ours
    lookup(RECIPES, name, "quartet.recipe")
    return _Scope(name)


class _Scope:
    """What `recipe` returns in eager code."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entered: list[Any] = []

    def __enter__(self) -> None:
        self.entered.append(annotate({SCOPE_KEY: self.name}))
        self.entered[-1].__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.entered.pop().__exit__(*exception)

    def __call__(self, target: T) -> T:
        if isinstance(target, type):
            if not issubclass(target, nn.Module):
                raise TypeError(f"quartet.recipe decorates functions and nn.Module classes, not the class {target.__name__}")
            target.forward = annotate_fn({SCOPE_KEY: self.name})(target.forward)
            setattr(target, CLASS_ATTRIBUTE, self.name)
            return target
        if isinstance(target, nn.Module) or not callable(target):
            raise TypeError("quartet.recipe decorates functions and classes; for a module that exists use quartet.set_recipe(module, ...)")
        return annotate_fn({SCOPE_KEY: self.name})(target)  # type: ignore[return-value]


class RecipeHandle:
    """Takes a `set_recipe` back."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Give the modules back the forward that they had before."""
        while self._undo:
            self._undo.pop()()


def set_recipe(model: nn.Module, name: str, *, only: str | Sequence[str] | None = None) -> RecipeHandle:
    """Set the recipe of a model, or of the modules whose names match the glob(s) `only`, without touching its code.

        quartet.set_recipe(model, "bf16", only="layers.*.attn.q_proj")

    It acts on everything below a matched module; an inner module's setting wins over an outer one's, a later call over an earlier one, and
    a decorator over both. Works before and after torch.compile (the change makes it recompile). copy.deepcopy keeps it; pickling a whole
    module does not. Raises ValueError for an unknown recipe or a glob that matches no module.
    """
    lookup(RECIPES, name, "quartet.set_recipe")
    root: nn.Module = getattr(model, "_orig_mod", model)
    if only is None:
        return RecipeHandle([_wrap(root, name)])
    globs = [only] if isinstance(only, str) else list(only)
    modules = dict(root.named_modules())
    for glob in globs:
        if not any(fnmatchcase(n, glob) for n in modules if n):
            known = ", ".join(list(filter(None, modules))[:8])
            raise ValueError(f"quartet.set_recipe: {glob!r} matches no module of {type(root).__name__}; its modules begin with: {known}")
    return RecipeHandle([_wrap(m, name) for n, m in modules.items() if n and any(fnmatchcase(n, g) for g in globs)])


def _wrap(module: nn.Module, name: str) -> Callable[[], None]:
    """Give a module an annotated forward of its own; returns what undoes it."""
    previous = module.__dict__.get("forward")
    foreign = previous if previous is not None and not hasattr(previous, "_quartet_set_recipe") else None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with annotate({MODULE_KEY: name}):
            return foreign(*args, **kwargs) if foreign is not None else type(self).forward(self, *args, **kwargs)

    forward._quartet_set_recipe = name  # type: ignore[attr-defined]
    module.forward = types.MethodType(forward, module)  # a bound method follows copy.deepcopy

    def undo() -> None:
        if previous is None:
            del module.forward
        else:
            module.forward = previous

    return undo
