"""The self-test of `quartet doctor`: every operator of the namespace ``quartet`` on a device, against what it should give (`cases`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import quartet_compile.backend  # noqa: F401  (registers every operator)
from quartet_compile.cli import cases, observed_cases
from quartet_compile.cli.check import REPORT, Check

CASES = cases.CASES | observed_cases.CASES
"""Operator -> its self-test. Every operator has one."""

OLDEST = {"matmul_swizzled": (9, 0)}
"""Operators that need more than the others: the compute capability from which a GPU has TMA, which this one reads its operands with."""


def operators() -> list[str]:
    """The names of all operators of the namespace, in the order of the alphabet."""
    return sorted(name.removeprefix("quartet::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("quartet::"))


def is_used(name: str, device: torch.device) -> bool:
    """Whether anything calls this operator on this device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST.get(name, (0, 0))


def operator(name: str, device: str, during: AbstractContextManager[Any] | None = None) -> Check:
    """One operator on one device, in the context `during`."""
    title = f"{name} on {device}"
    if name not in CASES:
        return Check(title, "fail", "has no self-test", "Tell us: every operator should have one.")
    if not is_used(name, torch.device(device)):
        return Check(title, "ok", "not used on this GPU")
    with torch.no_grad(), during or nullcontext():
        found = CASES[name](torch.device(device))
    wrong = [d for d in found if d.differ > d.allowed]
    if wrong:
        text = ", ".join(f"{d.differ} of {d.of} {d.what} differ from the reference" for d in wrong)
        return Check(title, "fail", text, f"Results on this device would be wrong. {REPORT}")
    near = [f"{d.differ} of {d.of} {d.what} at a near tie" for d in found if d.differ]
    return Check(title, "ok", "equals the reference" + (f", but for {', '.join(near)}" if near else ""))
