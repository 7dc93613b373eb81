"""`quartet bench` and `quartet demo`: the scripts of benchmarks/ and examples/, which are installed inside this package."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import runpy
import sys
from pathlib import Path

from quartet_compile.cli.output import UserError, print_columns, print_json

DEMO = "train_gpt"


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "quartet bench [--json | NAME [options of the benchmark ...]]"
    parser.add_argument("name", nargs="?", help="the benchmark; without one, list them. NAME --help tells its options")
    parser.add_argument("--json", action="store_true", help="the list as JSON (NAME --json FILE writes the figures to a file)")


def bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark, or list them."""
    there = runnable(folder("benchmarks"))
    if arguments.name is None:
        return list_benchmarks(there, arguments.json)
    if arguments.name not in there:
        near = difflib.get_close_matches(arguments.name, there, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no benchmark {arguments.name!r}.{hint} There are {', '.join(there)}.")
    return run_script(there[arguments.name], arguments.for_script)


def demo(arguments: argparse.Namespace) -> int:
    """Run examples/train_gpt.py."""
    return run_script(folder("examples") / f"{DEMO}.py", arguments.for_script)


def list_benchmarks(there: dict[str, Path], as_json: bool) -> int:
    rows = [(name, first_line(path)) for name, path in there.items()]
    if as_json:
        print_json([{"name": name, "about": about, "path": str(there[name])} for name, about in rows])
        return 0
    print_columns(rows, ("benchmark", "what it tells"))
    print("\nquartet bench NAME --quick takes about a minute; NAME --help says more. On several GPUs: torchrun --nproc-per-node N PATH,")
    print(f"with PATH in {folder('benchmarks')}. Without a GPU, --cpu runs a smoke test of those that measure time.")
    return 0


def folder(name: str) -> Path:
    """Where the scripts are: next to the package in a clone, inside it in an installation."""
    spec = importlib.util.find_spec(f"quartet_compile.{name}")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the folder {name} is not installed with this package: pip install quartet-compile, again")
    return Path(next(iter(spec.submodule_search_locations)))


def runnable(directory: Path) -> dict[str, Path]:
    """The programs among a folder's files: name -> path."""
    return {path.stem: path for path in sorted(directory.glob("*.py")) if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}


def first_line(path: Path) -> str:
    """Of a script's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def run_script(path: Path, arguments: list[str]) -> int:
    """Run a script as `python PATH ARGUMENTS` would, its folder first on the path, and return its exit status."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path = [str(path), *arguments], [str(path.parent), *sys.path]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    finally:
        sys.argv, sys.path = before
    return 0
