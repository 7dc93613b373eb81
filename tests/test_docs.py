"""The pages: every public name is on the API page, examples print what the pages show, and the site stands alone."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quartet_compile

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs"
EXAMPLES = sorted((PAGES / "examples").glob("*.py"))

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="not run from the repository")


def documented() -> list[str]:
    """What the API page names, such as "quartet_compile.marks.recipe"."""
    return re.findall(r"^::: (\S+)$", (PAGES / "api.md").read_text(), re.MULTILINE)


def resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", quartet_compile.__all__)
def test_a_public_name_is_on_the_api_page(name: str) -> None:
    public = getattr(quartet_compile, name)
    (path,) = [path for path in documented() if path.endswith(f".{name}") and resolved(path) is public]
    assert path not in sys.modules, "mkdocstrings would show the module of this name"


def test_public_names_have_docstrings() -> None:
    undocumented = [name for name in quartet_compile.__all__ if not (getattr(quartet_compile, name).__doc__ or "").strip()]
    assert undocumented == []


def without_bytes_kept(text: str) -> str:
    """What the partitioner keeps beside the inputs of linears differs between versions of torch."""
    return re.sub(r"(kept for the backward pass: activations).*", r"\1", text)


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_its_page_shows(script: Path) -> None:
    run = subprocess.run([sys.executable, script.name], cwd=script.parent, capture_output=True, text=True, check=True)
    shown = script.with_suffix(".txt").read_text()
    assert without_bytes_kept(run.stdout) == without_bytes_kept(shown), f"python {script.name} > {script.stem}.txt, in docs/examples"


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    build = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    assert "WARNING" not in build.stderr
    pages = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {Path(p.name).with_suffix(".html") for p in PAGES.glob("*.md")} <= set(pages)
    for page, html in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^" >]+)|<link(?![^>]*rel="?canonical)[^>]* href="?([^" >]+)', html)
        assert [url for found in loaded for url in found if url.startswith(("http", "//"))] == [], page
        assert str(ROOT) not in html, page
    anchors = re.findall(r'id="(quartet_compile\.[\w.]+)"', pages[Path("api.html")])
    assert set(documented()) <= set(anchors)
