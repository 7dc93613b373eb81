"""The modules of a model by the names that a report has: without those that torch puts around a user's."""

from __future__ import annotations

from torch import nn

from quartet_compile.passes.locate import WRAPPERS


def named_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for all inside a model, a shared one under each of its names."""
    found = {plain(name): module for name, module in root.named_modules(remove_duplicate=False)}  # a wrapped one comes after its wrapper
    found.pop("", None)
    return found


def plain(name: str) -> str:
    """A path without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside those that torch put around it."""
    while inner := next((module._modules[name] for name in WRAPPERS if module._modules.get(name) is not None), None):
        module = inner
    return module


def modules_around(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a linear of this name is in, from the innermost to the root."""
    found = list(dict.fromkeys((root, unwrapped(root))))
    for part in name.split("."):
        inner = found[-1]._modules.get(part)
        if inner is None:
            break
        found.append(unwrapped(inner))
    return found[::-1]
