"""A hook of mkdocs: a copy of the package in build/package as it is when installed, for the API page to be read from.

In the repository `passes` and `kernels` stand beside `quartet_compile`, where a reader of sources does not look for them.
"""

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_startup(**_: Any) -> None:
    """mkdocstrings looks for the folder when it is configured."""
    package = ROOT / "build" / "package" / "quartet_compile"
    shutil.rmtree(package, ignore_errors=True)
    for source, target in (("quartet_compile", "."), ("passes", "passes"), ("kernels", "kernels")):
        shutil.copytree(ROOT / source, package / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


on_pre_build = on_startup
"""Before each build of `mkdocs serve`."""
