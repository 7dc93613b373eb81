"""The model that `quartet explain package.module:factory` means, and what it is called with."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from quartet_compile.cli.output import UserError


@dataclass
class Call:
    """A model and what it is called with."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def find(path: str) -> Any:
    """What an import path such as ``package.module:factory`` names. The current folder is searched first, as by ``python -m``."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{path!r} is no import path: write module:factory, for instance models:make for the function make of models.py")
    if module_name.endswith(".py") or "/" in module_name:
        module_name = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise UserError(f"{path!r} names a file: write {module_name}:{name}, from the folder that it is in")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own needs
        raise UserError(f"there is no module {error.name!r} in {Path.cwd()} or on Python's path: {_near_files(module_name)}") from error
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError as error:
        factories = [own for own, value in vars(module).items() if _looks_like_a_factory(value, module_name)]
        ready = [own for own in factories if not _missing_arguments(vars(module)[own])]
        near = difflib.get_close_matches(name, vars(module), n=3) or ready or factories
        hint = f"; it has {', '.join(near[:8])}{', ...' if len(near) > 8 else ''}" if near else ""
        raise UserError(f"{module_name} has no {name}{hint}") from error


def _near_files(module_name: str) -> str:
    here = sorted(path.stem for path in Path.cwd().glob("*.py"))
    near = difflib.get_close_matches(module_name, here, n=1)
    return f"did you mean {near[0]}?" if near else "go to the folder that it is in, or set PYTHONPATH"


def _looks_like_a_factory(value: Any, module_name: str) -> bool:
    is_one = inspect.isfunction(value) or inspect.isclass(value)
    return is_one and value.__module__ == module_name and not value.__name__.startswith("_")


def make(found: Any, path: str) -> Call:
    """Call a factory, or take a module as it is. A factory returns a model, (model, args) or (model, args, kwargs)."""
    from torch import nn

    made = found
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UserError(f"{path} is a {type(found).__name__}: expected a module, or a function or class that makes one")
        missing = _missing_arguments(found)
        if missing:
            raise UserError(
                f"{path} needs arguments ({', '.join(missing)}), and explain has none to give: write a function without, for instance"
                f" def make(): return {getattr(found, '__name__', 'Model')}(...), and name that"
            )
        made = found()
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    if not 1 <= len(parts) <= 3 or not callable(parts[0]):
        raise UserError(f"{path} gave {_described(made)}: expected a model, (model, args) or (model, args, kwargs)")
    args = parts[1] if len(parts) > 1 else ()
    kwargs = parts[2] if len(parts) > 2 else {}
    if isinstance(args, dict) and len(parts) == 2:
        args, kwargs = (), args
    if not isinstance(kwargs, dict):
        raise UserError(f"{path} gave {_described(made)}: the third of (model, args, kwargs) is a dict")
    return Call(parts[0], tuple(args) if isinstance(args, (tuple, list)) else (args,), dict(kwargs))


def _missing_arguments(factory: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a callable cannot do without."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # builtins do not tell
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _described(made: Any) -> str:
    if isinstance(made, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return f"a {type(made).__name__}"


# ---------------------------------------------------------------- inputs and options


def check_arguments(call: Call) -> None:
    """Raises UserError unless the model takes so many arguments, and such names. Hooks before the forward may change them."""
    if getattr(call.model, "_forward_pre_hooks", None):
        return
    forward = getattr(call.model, "forward", call.model)
    try:
        signature = inspect.signature(forward)
    except ValueError:  # builtins do not tell
        return
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        given = f"{len(call.args)} argument(s)" + "".join(f", {name}=" for name in call.kwargs)
        raise UserError(f"the model takes {signature} and is called with {given}: {error}") from error


def add_inputs(call: Call, inputs: Sequence[str]) -> None:
    """Tensors as ``[NAME=]SHAPE[:DTYPE]`` describes them: normal numbers, or zeros for whole numbers, which index any table.

    Those without a name take the place of all positional arguments that the factory gave."""
    import torch

    if any("=" not in text for text in inputs):
        call.args = ()
    for text in inputs:
        name, equals, described = text.rpartition("=")
        shape_text, _, dtype_text = described.partition(":")
        dtype = getattr(torch, dtype_text or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"--input {text}: torch has no dtype {dtype_text!r}; there are float32, bfloat16, float16, int64, bool, ...")
        try:
            shape = [int(size) for size in shape_text.split("x")] if shape_text else []
        except ValueError:
            raise UserError(f"--input {text}: expected [NAME=]SHAPE[:DTYPE], for instance 8x1024:int64 or mask=8x1024:bool") from None
        tensor = torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        if equals:
            call.kwargs[name] = tensor
        else:
            call.args = (*call.args, tensor)


TEXT = ("quartet.recipe", "quartet.include", "quartet.exclude", "quartet.recompute", "quartet.mode")
"""Options whose values are text, also where they look like numbers: "0" may be the name of a linear."""


def options(words: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as options of torch.compile: numbers, True, False and None are read as such where an option is no text; a key given
    twice becomes a list."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--option {word}: expected KEY=VALUE, for instance quartet.exclude=*.gate")
        value = text if key in TEXT else _value(text)
        found[key] = value if key not in found else [*(found[key] if isinstance(found[key], list) else [found[key]]), value]
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
