"""Which modules `only=` means: by name, by class, by a function of both, or by `blocks`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from quartet_compile.chains import Blocks
from quartet_compile.modules import named_modules

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Blocks
"""A glob over names; a class, subclasses included; a function of (name, module); or `blocks`."""
Only: TypeAlias = Selector | Sequence[Selector] | None


def select(root: nn.Module, only: Only, where: str) -> list[tuple[nn.Module, str]]:
    """(module, the selector in words) for each module of a model that is meant, once for each module; the first selector counts.

    None means the model itself, in words "model". A module that is never called, such as an nn.ModuleList, stands for those in it.
    where: the public function, for errors. Raises TypeError for what is no selector, ValueError for one that matches nothing.
    """
    if only is None:
        return [(module, "model") for module in _called(root)]
    selectors = list(only) if isinstance(only, (list, tuple, set, frozenset)) else [only]
    if not selectors:
        raise ValueError(f"{where}: `only` is empty, so nothing would be set; leave it out for the whole model")
    named = named_modules(root)
    found: dict[nn.Module, str] = {}
    for selector in selectors:
        words = f"only={describe(selector, where)}"
        matches = [called for module in _matching(root, named, selector) for called in _called(module)]
        if not matches:
            there = f"{type(root).__name__}; {_what_exists(root, selector)}"
            raise ValueError(f"{where}: {describe(selector, where)} matches no module of {there}")
        for module in matches:
            found.setdefault(module, words)
    return list(found.items())


def describe(selector: Any, where: str) -> str:
    """A selector as a user would write it. Raises TypeError for what is none."""
    if isinstance(selector, nn.Module):
        raise TypeError(f"{where}: `only` is a module, {type(selector).__name__}; give the module itself as the model, without `only`")
    if isinstance(selector, type):
        if not issubclass(selector, nn.Module):
            raise TypeError(f"{where}: `only` is the class {selector.__name__}, which is no nn.Module")
        return selector.__qualname__.rpartition("<locals>.")[2]
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, Blocks):
        return str(selector)
    if not callable(selector):
        raise TypeError(f"{where}: `only` takes a glob, a class, a function of (name, module), quartet.blocks or a list, got {selector!r}")
    code = getattr(inspect.unwrap(selector), "__code__", None)
    name = getattr(selector, "__name__", type(selector).__name__)
    return f"lambda at {code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}" if code and name == "<lambda>" else name


def _matching(root: nn.Module, named: dict[str, nn.Module], selector: Any) -> list[nn.Module]:
    if isinstance(selector, Blocks):
        return list(selector.select(root).values())
    if isinstance(selector, type):
        return [module for module in (root, *named.values()) if isinstance(module, selector)]
    if isinstance(selector, str):
        return [module for name, module in named.items() if fnmatchcase(name, selector)]
    return [module for name, module in named.items() if selector(name, module)]


def _called(module: nn.Module) -> list[nn.Module]:
    """The module, or those in it if it has no forward of its own."""
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        return [module]
    return [called for child in module.children() for called in _called(child)]


def _what_exists(root: nn.Module, selector: Any) -> str:
    if isinstance(selector, type):
        return f"its modules are of the classes {', '.join(sorted({type(module).__name__ for module in root.modules()}))}"
    names = list(named_modules(root))
    near = get_close_matches(selector, names, n=1, cutoff=0.85) if isinstance(selector, str) else []
    return f"its modules begin with: {', '.join(names[:8])}" + (f"; did you mean {near[0]}?" if near else "")
