"""The troubleshooting page names every reason that the package gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import quartet_compile.passes.match as match
import quartet_compile.passes.place as place
from quartet_compile.passes import convolution, products

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"


def reasons() -> list[str]:
    """The fixed part of every string that functions returning reasons return, or that an `Unsupported` is made with."""
    found = []
    for module in (match, place, convolution, products):
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ("unsupported" in node.name or node.name == "_default_exception"):
                found += [r.value for r in ast.walk(node) if isinstance(r, ast.Return)]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Unsupported":
                found.append(node.args[2])
    return sorted({part for value in found for part in fixed_parts(value)})


def fixed_parts(value: ast.AST | None) -> list[str]:
    """The longest literal of each string in an expression."""
    if isinstance(value, ast.JoinedStr):
        return [max((p.value for p in value.values if isinstance(p, ast.Constant)), key=len).strip(" :(){}")]
    if isinstance(value, ast.Tuple):  # (which rule, why)
        return fixed_parts(value.elts[-1])
    if isinstance(value, ast.Constant) and isinstance(value.value, str) and len(value.value) > 4:
        return [value.value]
    if isinstance(value, ast.IfExp):
        return [*fixed_parts(value.body), *fixed_parts(value.orelse)]
    return []


def test_reasons_are_found_in_the_sources() -> None:
    assert len(reasons()) >= 18
    assert "its dtype is" in reasons()
    assert "its weight is also an embedding" in reasons()


@pytest.mark.skipif(not PAGE.exists(), reason="not run from the repository")
@pytest.mark.parametrize("reason", reasons())
def test_the_page_explains(reason: str) -> None:
    head = re.split(r"[;,]", reason)[0]
    assert head in PAGE.read_text(), f"docs/troubleshooting.md has no row for {reason!r}"
