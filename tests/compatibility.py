"""What works, as the tests saw it: a pytest plugin that notes which features passed where, and the table in docs/compatibility.md.

    pytest --features=docs/compatibility.json -m "slow or not slow"     note what these tests saw, beside what other machines noted
    python tests/compatibility.py > docs/compatibility.md               the table

(With the equals sign: pytest would take a path by itself for a test, and not look for plugins beside the others.)
A test says what it covers with ``@pytest.mark.feature("Group", "what works")``, in which {name} stands for its parameter of that name. A
feature works on a machine if all its tests there passed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

NOTES = Path(__file__).parent.parent / "docs" / "compatibility.json"
HEAD = """\
# What works

Made by `python tests/compatibility.py` from what the tests saw; no line is written by hand. A feature works on a machine if every test
that is marked with it passed there. Numbers are the same on all devices, so a feature that is tested on a CPU alone is one of graphs, not
of kernels.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", type=Path, help="note in this file which features passed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(group, name): what a test covers, for docs/compatibility.md")
    path = config.getoption("--features")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Notes(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        marks = [[text.format(**parameters) for text in mark.args] for mark in item.iter_markers("feature")]
        if marks:
            item.user_properties.append(("features", marks))
            item.user_properties.append(("machine", machine_of(item)))


def machine_of(item: pytest.Item) -> str:
    """"CPU", "H100" or "2 x H100"."""
    if item.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return "CPU"
    name = torch.cuda.get_device_name(0).removeprefix("NVIDIA ").split()[0]
    return f"2 x {name}" if item.get_closest_marker("two_gpus") else name


class Notes:
    """Collects outcomes of marked tests, in the process that sees all of them, and adds them to the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: dict[tuple[str, str, str], bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.outcome == "skipped" or (report.when != "call" and report.passed):
            return
        for group, name in properties.get("features", []):
            key = group, name, properties["machine"]
            self.passed[key] = self.passed.get(key, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        notes = json.loads(self.path.read_text()) if self.path.exists() else {}
        for (group, name, machine), passed in self.passed.items():
            notes.setdefault(group, {}).setdefault(name, {})[machine] = {"passed": passed, "torch": torch.__version__.split("+")[0]}
        self.path.write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n")


def table(notes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The page: a table for each group, a column for each machine."""
    machines = sorted({m for group in notes.values() for seen in group.values() for m in seen}, key=lambda m: (m != "CPU", len(m), m))
    lines = [HEAD]
    for group, features in sorted(notes.items()):
        lines += [f"## {group}\n", "| | " + " | ".join(machines) + " |", "|---" * (len(machines) + 1) + "|"]
        for name, seen in sorted(features.items()):
            lines.append(f"| {name} | " + " | ".join(_cell(seen.get(machine)) for machine in machines) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(seen: Mapping[str, Any] | None) -> str:
    if seen is None:
        return "not tested"
    return f"works, torch {seen['torch']}" if seen["passed"] else f"fails, torch {seen['torch']}"


if __name__ == "__main__":
    print(table(json.loads((Path(sys.argv[1]) if len(sys.argv) > 1 else NOTES).read_text())), end="")
