"""Triton's interpreter without work that it repeats: `triton.language` is patched once a launch instead of at every call of a function.

What is patched a second time is already in place, so nothing else changes; it takes half of the interpreter's time.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


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


def install() -> None:
    """Does nothing with versions of Triton whose interpreter patches in another way."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch_lang = interpreter._patch_lang

    def patch_once(fn: Callable[..., Any]) -> Any:
        languages = _languages(fn)
        if languages and languages <= _Launch.patched:
            return None  # of a call inside a launch, which does not look at it
        _Launch.patched |= languages
        return _Launch(patch_lang(fn))

    interpreter._patch_lang = patch_once
