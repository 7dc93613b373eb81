"""Triton's interpreter without work that it repeats, which takes most of its time.

Each launch patches `triton.language` once, instead of at every call of a function. Operands of one shape are not broadcast to it. Types of
tensors are made once each. What is computed stays the same.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

from triton import language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """Does nothing with versions of Triton whose interpreter patches in another way."""
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_languages_once()
        _broadcast_only_to_another_shape()
        _make_types_once()


# ---------------------------------------------------------------- patches


@functools.cache
def _languages(fn: Callable[..., Any]) -> frozenset[Any]:
    """The modules among `triton.language` and its core that a function refers to, as the interpreter finds them."""
    return frozenset(value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))


class _Launch:
    """The patches of a launch, and those that its functions added."""

    patched: frozenset[Any] = frozenset()

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        _Launch.patched = frozenset()
        self.scope.restore()


def _patch_languages_once() -> None:
    """What is patched a second time is already in place."""
    patch_lang = interpreter._patch_lang

    def patch_once(fn: Callable[..., Any]) -> Any:
        languages = _languages(fn)
        if languages and languages <= _Launch.patched:
            return None  # of a call inside a launch, which does not look at it
        _Launch.patched |= languages
        return _Launch(patch_lang(fn))

    interpreter._patch_lang = patch_once


# ---------------------------------------------------------------- tensors


def _broadcast_only_to_another_shape() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_if_needed(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        return (lhs, rhs) if lhs.type.is_block() and lhs.shape == rhs.shape else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_if_needed


def _make_types_once() -> None:
    """Those of numbers: pointers are few, and not hashable."""
    numpy_dtype, of_numbers = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    init, known = core.block_type.__init__, {}

    def get_numpy_dtype(type: Any) -> Any:
        return numpy_dtype(type) if type.scalar.is_ptr() else of_numbers(type.scalar)

    def make_block_type(cls: type, element_ty: Any, shape: Any) -> Any:
        key = None if element_ty.is_ptr() else (element_ty, *core._unwrap_if_constexpr(shape))
        if key not in known:
            made = object.__new__(cls)
            init(made, element_ty, shape)
            made.constexprs = core.tuple([core.constexpr(size) for size in made.shape]), core.constexpr(math.prod(made.shape))
            if key is None:
                return made
            known[key] = made
        return known[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.constexprs if type.is_block() else (core.tuple([]), core.constexpr(1))

    interpreter._get_np_dtype = get_numpy_dtype
    core.block_type.__new__ = make_block_type
    core.block_type.__init__ = lambda self, element_ty, shape: None
    core.tensor.__init__ = init_tensor
