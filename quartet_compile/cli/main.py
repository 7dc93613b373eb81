"""The command line: `quartet COMMAND ...`, or `python -m quartet_compile COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from quartet_compile.cli import doctor, explain, scripts
from quartet_compile.cli.output import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 if something was found wrong, 2 if the command cannot be obeyed."""
    ours, for_script = split(list(sys.argv[1:] if argv is None else argv))
    top = parser()
    arguments = top.parse_args(ours)
    if arguments.command is None:
        top.print_help()
        return 0
    arguments.for_script = for_script
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"quartet {arguments.command}: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="quartet", description="Train unchanged PyTorch models in NVFP4: see COMMAND --help.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, about, add_arguments, run in (
        ("doctor", "is this machine ready, and what to do if not", doctor.add_arguments, doctor.run),
        ("explain", "what would become of each linear of a model", explain.add_arguments, explain.run),
        ("bench", "measure speed, memory and numerics here", scripts.add_bench_arguments, scripts.bench),
        ("demo", "train a small GPT in BF16 and in NVFP4, and compare", lambda parser: None, scripts.demo),
    ):
        command = commands.add_parser(name, help=about, description=f"{name}: {about}.", formatter_class=argparse.RawTextHelpFormatter)
        add_arguments(command)
        command.set_defaults(run=run)
    return top


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """(what is for us, what is for the script that `bench NAME` or `demo` runs). A -- between them may be left out."""
    ours = {"demo": 1, "bench": 2}.get(words[0], len(words)) if words else 0
    if words[:1] == ["bench"] and words[1:2] and words[1].startswith("-"):
        ours = len(words)
    rest = words[ours:]
    return words[:ours], rest[1:] if rest[:1] == ["--"] else rest
