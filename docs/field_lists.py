"""An extension of griffe, which reads docstrings for the API page: "x: what it is. y, z: what they are." becomes a list.

Only names of the function's parameters or of the class's own members begin an entry, so that other colons stay what they are.
"""

import re
from typing import Any

import griffe


def as_list(paragraph: str, names: set[str]) -> str:
    """A paragraph that begins with names and a colon as a list of such entries; any other one as it is."""
    one = "(?:" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + r"|\.\.\.)"
    entry = rf"{one}(?:, {one})*: "
    text = " ".join(paragraph.split())
    if not names or not re.match(entry, text):
        return paragraph
    parts = re.split(rf"(?<=[.;)]) (?={entry})", text)
    return "\n".join("* " + re.sub(r"^([^:]+): ", lambda m: ", ".join(f"`{n}`" for n in m[1].split(", ")) + ": ", part) for part in parts)


class FieldLists(griffe.Extension):
    """Rewrites the docstrings of functions and classes as they are read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, {parameter.name.lstrip("*") for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        self._rewrite(cls, {name for name, member in cls.members.items() if member.is_attribute})

    def _rewrite(self, documented: griffe.Function | griffe.Class, names: set[str]) -> None:
        if documented.docstring is not None:
            paragraphs = documented.docstring.value.split("\n\n")
            documented.docstring.value = "\n\n".join(as_list(paragraph, names) for paragraph in paragraphs)
