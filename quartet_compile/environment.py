"""`QUARTET_OPTIONS`: the options of programs that one cannot edit.

    QUARTET_OPTIONS="recipe=bf16; exclude=*.gate,*.router; strict=true" python train.py
    QUARTET_OPTIONS='{"min_features": 128, "exclude": ["*.w[1,3]"]}' python train.py

The names are those of the options, with or without `quartet.`. Text has `;` between options and `,` between globs; JSON says what text
cannot. The variable is read at each compilation, and is stronger than the options in code: it is for those who cannot change them. Its
globs count before those in code, which still count behind them. Decorators, contexts and `set_recipe` are no options, and stay stronger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

VARIABLE = "QUARTET_OPTIONS"


def read_environment(types: Mapping[str, str]) -> dict[str, Any]:
    """Option -> value, as the variable says now. types: the annotation of each option, such as "bool".

    Values of text have their option's type, those of JSON whatever was written. Raises ValueError, naming the variable, the part that is
    wrong and the valid options.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text.startswith("{"):
        pairs = [_split(part) for part in text.split(";") if part.strip()]
    else:
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise ValueError(f"{VARIABLE} begins with {{ but is no JSON: {error}") from error
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = key.removeprefix("quartet.")
        if name not in types:
            raise ValueError(f"{VARIABLE}: unknown option {key!r}; valid are {', '.join(sorted(types))}")
        if name in found:
            raise ValueError(f"{VARIABLE} gives {name} twice")
        found[name] = value if text.startswith("{") else _typed(name, value, types[name])
    return found


def _split(part: str) -> tuple[str, str]:
    key, equals, value = (piece.strip() for piece in part.partition("="))
    if not (key and equals and value):
        raise ValueError(f"{VARIABLE}: {part.strip()!r} is not option=value; write it as in 'recipe=bf16; exclude=*.gate,*.router'")
    return key, value


def _typed(name: str, value: str, of: str) -> Any:
    read, expected = _READERS.get(of, (str, ""))
    try:
        return read(value)
    except (KeyError, ValueError):
        raise ValueError(f"{VARIABLE}: {name} takes {expected}, got {value!r}") from None


def _globs(value: str) -> list[str]:
    globs = [glob.strip() for glob in value.split(",")]
    if not all(globs):
        raise ValueError
    return globs


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (lambda value: {"true": True, "false": False}[value.lower()], "true or false"),
    "int": (int, "a whole number"),
    "tuple[str, ...]": (_globs, "globs with a comma between them"),
}
