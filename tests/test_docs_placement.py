"""The examples of docs/placement.md run, in order, and print what the page says."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "placement.md"


def examples(page: str) -> list[tuple[str, str | None]]:
    """(code, what it prints) of each example; None where the page does not say."""
    return [(code, printed or None) for code, printed in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", page, re.DOTALL)]


def test_examples_are_found_with_what_they_print() -> None:
    page = "a\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n"
    assert examples(page) == [("x = 1\n", None), ("print(x)\n", "1\n")]


@pytest.mark.slow
@pytest.mark.skipif(not PAGE.exists(), reason="not run from the repository")
def test_examples_print_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUARTET_OPTIONS", raising=False)
    found = examples(PAGE.read_text())
    assert len(found) == 9
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where Dynamo looks for the globals of a function
    for code, expected in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), module.__dict__)
        assert printed.getvalue() == (expected or "")
