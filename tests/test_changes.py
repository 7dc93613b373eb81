"""The changes that docs/contributing.md shows: each is short, applies, and makes a test pass that fails without it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHANGES = ROOT / "docs" / "changes"
NAMES = ["recipe", "rule", "pattern"]
PARTS = ("quartet_compile", "passes", "kernels", "tests", "docs", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(not CHANGES.exists(), reason="not run from the repository")


def git_apply(tree: Path, name: str, *arguments: str) -> None:
    subprocess.run(["git", "apply", *arguments, str(CHANGES / f"{name}.patch")], cwd=tree, check=True)


def run_tests(tree: Path, *paths: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process in which `quartet_compile` is the copy's."""
    package = tree / "package" / "quartet_compile"
    if not package.exists():
        shutil.copytree(tree / "quartet_compile", package)
        for part in ("passes", "kernels"):
            (package / part).symlink_to(tree / part)
    run = "import sys; sys.path.insert(0, 'package'); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "-p", "no:cacheprovider", *paths]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_short_and_on_the_page(name: str) -> None:
    lines = (CHANGES / f"{name}.patch").read_text().splitlines()
    assert len([line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]) < 40
    assert f'--8<-- "changes/{name}.patch"' in (ROOT / "docs" / "contributing.md").read_text()


def test_every_change_is_tested() -> None:
    assert {path.stem for path in CHANGES.glob("*.patch")} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_change_does_what_its_test_says(name: str, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        source = ROOT / part
        _ = shutil.copytree(source, tmp_path / part, ignore=ignored) if source.is_dir() else shutil.copy(source, tmp_path / part)
    added = re.findall(r"^\+\+\+ b/(tests/\S+)", (CHANGES / f"{name}.patch").read_text(), re.MULTILINE)
    git_apply(tmp_path, name, "--include=tests/*")
    without = run_tests(tmp_path, *added)
    assert without.returncode == pytest.ExitCode.TESTS_FAILED, without.stdout
    shutil.rmtree(tmp_path / "package")
    git_apply(tmp_path, name, "--exclude=tests/*")
    behind = run_tests(tmp_path, *added, "tests/test_troubleshooting.py", "tests/test_ops.py")
    assert behind.returncode == pytest.ExitCode.OK, behind.stdout
