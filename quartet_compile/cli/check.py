"""A check: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

REPORT = "Please report it, with the output of quartet doctor --json."

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """status: "warn" is for what works but is not as it should be, "fail" for what does not work. advice: what to do, "" for nothing."""

    name: str
    status: Status
    finding: str
    advice: str = ""


@dataclass(frozen=True)
class Planned:
    """A check to be made. look: makes it; advice: what to do if it raises."""

    name: str
    look: Callable[[], Check]
    advice: str

    def run(self) -> Check:
        """Its result; an exception, of whatever kind, is a failure with the exception as what was found."""
        try:
            return self.look()
        except Exception as error:
            return failure(self.name, error, self.advice)


def failure(name: str, error: BaseException, advice: str) -> Check:
    """A failed check with the first line of an exception."""
    said = str(error).strip().splitlines()
    return Check(name, "fail", f"{type(error).__name__}: {said[0]}" if said else type(error).__name__, advice)
