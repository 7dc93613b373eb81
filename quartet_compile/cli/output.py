"""Writing for a terminal (with rich, if it is installed), for a pipe (aligned text), and for a program (JSON)."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from quartet_compile.cli.check import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class UserError(Exception):
    """Something that the user can put right: one message on stderr, no traceback, exit status 2."""


def fancy() -> bool:
    """Whether to use colours, tables with borders and progress bars: on a terminal, with rich."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def print_checks(checks: Sequence[Check]) -> None:
    """One row a check; what to do about it stands below what was found."""
    if fancy():
        _print_rich_checks(checks)
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<4}  {check.name:<{width}}  {check.finding}")
        if check.advice:
            print(f"{'':<{width + 8}}-> {check.advice}")


def _print_rich_checks(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for header in ("", "check", "finding, and what to do"):
        table.add_column(header, overflow="fold")
    for check in checks:
        advice = f"\n[bold]-> {escape(check.advice)}[/bold]" if check.advice else ""
        table.add_row(f"[{STYLES[check.status]}]{check.status}[/]", escape(check.name), escape(check.finding) + advice)
    Console().print(table)


def print_columns(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
    """A small table of text."""
    if fancy():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_report(text: str) -> None:
    """A report of `explain`, coloured on a terminal: what is in NVFP4, what was left and what was not found."""
    if not fancy():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text(text, no_wrap=True)
    shown.highlight_regex(r"(?m)^linear  .*$", "bold")
    shown.highlight_regex(r"(?m)  quartet2(?=  )", "green")
    shown.highlight_regex(r"(?m)  bf16(?=  )", "yellow")
    shown.highlight_regex(r"(?m)^  (left|not found):.*$", "yellow")
    shown.highlight_regex(r"(?m)^.*\[unsupported\]$", "bold red")
    Console().print(shown, soft_wrap=True)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Something turns on stderr meanwhile, beside a terminal."""
    if not fancy():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each of `total` steps before it begins. A bar on stderr, and only beside a terminal."""
    if not fancy():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, done = bar.add_task("", total=total), itertools.count()

        def begin(name: str) -> None:
            bar.update(task, description=name, completed=next(done))

        yield begin
