"""The table of what works: from marked tests to the page."""

from __future__ import annotations

import json
from pathlib import Path

import compatibility
import pytest

TESTS = """
import pytest

@pytest.mark.feature("Models", "one that works")
@pytest.mark.parametrize("i", [1, 2])
def test_works(i): pass

@pytest.mark.feature("Models", "number {i}")
@pytest.mark.parametrize("i", [1, 2])
def test_of_each(i): assert i == 1

@pytest.mark.feature("Models", "one that breaks in one case")
@pytest.mark.parametrize("i", [1, 2])
def test_breaks(i): assert i == 1

@pytest.mark.feature("Loops", "two tests")
@pytest.mark.feature("Models", "two tests")
def test_both(): pass

@pytest.mark.feature("Models", "not run here")
def test_skipped(): pytest.skip()

@pytest.fixture
def broken(): raise OSError

@pytest.mark.feature("Models", "breaks before it starts")
def test_of_a_broken_fixture(broken): pass
"""


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_outcomes_are_noted_beside_those_of_other_machines(
    pytester: pytest.Pytester, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(compatibility.__file__).parent))
    pytester.makepyfile(TESTS)
    notes = pytester.path / "notes.json"
    notes.write_text(json.dumps({"Models": {"one that works": {"H100": {"passed": True, "torch": "2.11.0"}}}}))
    pytester.runpytest_subprocess("-p", "compatibility", "-n", workers, "--features", str(notes))
    seen = json.loads(notes.read_text())
    passed = {(group, name, m): s["passed"] for group, names in seen.items() for name, on in names.items() for m, s in on.items()}
    assert passed == {
        ("Models", "one that works", "H100"): True,
        ("Models", "one that works", "CPU"): True,
        ("Models", "number 1", "CPU"): True,
        ("Models", "number 2", "CPU"): False,
        ("Models", "one that breaks in one case", "CPU"): False,
        ("Models", "two tests", "CPU"): True,
        ("Loops", "two tests", "CPU"): True,
        ("Models", "breaks before it starts", "CPU"): False,
    }
    page = compatibility.table(seen)
    assert "| | CPU | H100 |" in page
    assert "| two tests | works, torch 2." in page
    assert "| one that breaks in one case | fails, torch 2." in page


@pytest.mark.skipif(not compatibility.NOTES.exists(), reason="not run from the repository")
def test_the_page_is_what_the_notes_say() -> None:
    notes = json.loads(compatibility.NOTES.read_text())
    assert Path(compatibility.NOTES).with_suffix(".md").read_text() == compatibility.table(notes)
