"""Choosing recipes in code: a decorator, a context, and a setter for modules one cannot edit.

All of them act through `torch.fx.traceback.annotate`, whose annotations reach the forward and the backward nodes of a captured graph,
through checkpointing too, and do nothing in eager code.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.traceback import annotate, annotate_fn
from torch.overrides import TorchFunctionMode

from quartet_compile.modules import modules_around
from quartet_compile.passes.place import CHANNEL_KEY, MODULE_KEY, SCOPE_KEY, Scope, lookup
from quartet_compile.recipes import RECIPES
from quartet_compile.selectors import Only, select

T = TypeVar("T")


def recipe(name: str) -> Any:
    """The recipe of all linears inside: a decorator for functions, methods and nn.Module classes, and a context manager.

        @quartet.recipe("bf16")
        class Router(nn.Module): ...

        with quartet.recipe("bf16"):          # inside the compiled function
            logits = self.score(x)

    The innermost one decides, and it is stronger than `set_recipe`, options and defaults. In eager code around a compiled call it counts
    too: what is called in another scope than it was compiled in is compiled again. A decorated class is decorated in the forward that it
    has; a subclass that overrides it is not. In compiled code, write a context where it is entered (`with quartet.recipe(...):`), and where
    the region holds a graph break use a decorated function instead: Dynamo cannot leave such a context half way.
    Raises ValueError for an unknown name, TypeError for what is no name or cannot be decorated.
    """
    if torch.compiler.is_compiling():
        return annotate({SCOPE_KEY: name, CHANNEL_KEY: "context"})  # Dynamo knows this object; it would not trace a class of ours
    lookup(RECIPES, name, "quartet.recipe")
    return _Scope(name)


class _Scope:
    """What `recipe` returns in eager code. key: of its annotation. channel: what a report calls it."""

    def __init__(self, name: str, key: str = SCOPE_KEY, channel: str = Scope.channel) -> None:
        self.name, self.key, self.channel = name, key, channel
        self.entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(annotate({self.key: self.name} | ({CHANNEL_KEY: self.channel} if self.key == SCOPE_KEY else {})))
        stack.enter_context(_guarded_mode(self.name, self.key)())
        self.entered.append(stack)

    def __exit__(self, *exception: Any) -> None:
        self.entered.pop().__exit__(*exception)

    def __call__(self, target: T) -> T:
        if isinstance(target, type) and issubclass(target, nn.Module):
            target.forward = self._around(target.forward, f"decorator on class {_own_name(target)}")
            return target
        if isinstance(target, (staticmethod, classmethod)):
            return type(target)(self._around(target.__func__, f"decorator on method {_own_name(target.__func__)}"))
        if isinstance(target, (type, nn.Module)) or not callable(target) or inspect.isgeneratorfunction(target):
            raise TypeError(
                f"quartet.recipe decorates functions and nn.Module classes, not {target!r}; for a module that exists use quartet.set_recipe"
            )
        kind = "method" if "." in _own_name(target) else "function"
        return self._around(target, f"decorator on {kind} {_own_name(target)}")  # type: ignore[return-value]

    def _around(self, function: Callable[..., Any], channel: str) -> Callable[..., Any]:
        annotated = annotate_fn({SCOPE_KEY: self.name, CHANNEL_KEY: channel})(function)
        name = self.name

        @functools.wraps(function)
        def decorated(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return annotated(*args, **kwargs)
            with _Scope(name, SCOPE_KEY, channel):  # eager, also because of a graph break inside: what is compiled below sees the scope
                return function(*args, **kwargs)

        return decorated


def _own_name(target: Any) -> str:
    """Of a class or function, with the classes that it is defined in."""
    return str(getattr(target, "__qualname__", type(target).__qualname__)).rpartition("<locals>.")[2]


@functools.cache
def _guarded_mode(name: str, key: str) -> type[TorchFunctionMode]:
    """A mode that does nothing, one class a recipe. Dynamo guards on the classes of active modes, but not on annotations: with it, a
    compiled function that is called in another scope is compiled again."""

    class RecipeScope(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
                func = torch.unflatten  # Dynamo breaks the graph at the super() in the method, under any mode (seen with 2.13)
            return func(*args, **(kwargs or {}))

    RecipeScope.__qualname__ = f"RecipeScope[{key}, {name}]"
    return RecipeScope


class RecipeHandle:
    """Takes a `set_recipe` back."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Give the modules back the forward that they had before."""
        while self._undo:
            self._undo.pop()()


def set_recipe(model: nn.Module, name: str, *, only: Only = None) -> RecipeHandle:
    """Set the recipe of a model, or of those of its modules that `only` selects, without touching its code.

        quartet.set_recipe(model, "bf16", only="layers.*.attn.q_proj")                       # by name: a glob, whose * matches dots, too
        quartet.set_recipe(model, "bf16", only=LlamaAttention)                               # by class, subclasses included
        quartet.set_recipe(model, "bf16", only=lambda name, module: hasattr(module, "gate"))
        quartet.set_recipe(model, "bf16", only=["lm_head", quartet.blocks(first=1, last=2)])

    It acts on what the forward of a matched module computes, everything below included; an inner module's setting wins over an outer one's,
    a later call over an earlier one, and a decorator over both. A module whose weight is read by another one's forward (the `out_proj` of
    nn.MultiheadAttention) is reached through that other one, or by the option quartet.exclude. Works before and after torch.compile (the
    change makes it recompile), and copy.deepcopy keeps it. An nn.ModuleList or nn.ModuleDict stands for the modules in it. Raises
    ValueError for an unknown recipe or a selector that matches no module, TypeError for what is no module, name or
    selector.
    """
    lookup(RECIPES, name, "quartet.set_recipe")
    return set_on([(module, f"set_recipe({words})") for module, words in modules_of(model, only, "quartet.set_recipe")], name)


def modules_of(model: nn.Module, only: Only, where: str) -> list[tuple[nn.Module, str]]:
    """(module, selector in words) of those meant, of a model that may be compiled. where: the public function, for errors."""
    root = getattr(model, "_orig_mod", model)
    if not isinstance(root, nn.Module):
        raise TypeError(f"{where} takes a module, not {root!r}; decorate a function with quartet.recipe")
    return select(root, only, where)


def set_on(modules: Sequence[tuple[nn.Module, str]], name: str) -> RecipeHandle:
    """Set a recipe on modules. modules: each with the channel that a report names."""
    return RecipeHandle([_push(module, name, channel) for module, channel in modules])


def setting_of(model: Any, linear: str) -> tuple[str, str] | None:
    """(recipe, channel) that `set_recipe` or a schedule has set now on the innermost module around a linear of a model.

    Looked up for a report instead of being written into graphs, since Dynamo would then guard on it, and compile blocks apart that differ
    in nothing else.
    """
    for module in modules_around(model, linear) if isinstance(model, nn.Module) else ():
        settings: Any = module.__dict__.get("_quartet_recipes")
        if settings:
            return settings[-1][1], settings[-1][2]
    return None


_tokens = itertools.count()


def _annotated_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with recipes set: the last one set counts. A forward of its own that it had before is called inside."""
    name: Any = self._quartet_recipe
    own = self.__dict__.get("_quartet_own_forward")
    with annotate({MODULE_KEY: name}) if torch.compiler.is_compiling() else _Scope(name, MODULE_KEY):
        return own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)


def _push(module: nn.Module, name: str, channel: str) -> Callable[[], None]:
    """Set a recipe on one module; returns what takes it back, in whatever order.

    The recipe that counts has an attribute of its own: Dynamo guards on all of what a forward reads, and would compile the same code for
    each module and setting anew if it read the list of settings.
    """
    state, token = module.__dict__, next(_tokens)
    if "_quartet_recipes" not in state:
        if "forward" in state:
            state["_quartet_own_forward"] = state["forward"]
        state["_quartet_recipes"] = ()
        state["forward"] = types.MethodType(_annotated_forward, module)  # a bound method follows copy.deepcopy
    state["_quartet_recipes"] += ((token, name, channel),)
    state["_quartet_recipe"] = name

    def undo() -> None:
        state["_quartet_recipes"] = tuple(entry for entry in state["_quartet_recipes"] if entry[0] != token)
        if state["_quartet_recipes"]:
            state["_quartet_recipe"] = state["_quartet_recipes"][-1][1]
        else:
            del state["_quartet_recipes"], state["_quartet_recipe"]
            own = state.pop("_quartet_own_forward", None)
            if getattr(state.get("forward"), "__func__", None) is _annotated_forward:
                del state["forward"]
                if own is not None:
                    state["forward"] = own

    return undo
