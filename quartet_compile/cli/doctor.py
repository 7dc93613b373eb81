"""`quartet doctor`: is this machine ready, and what to do if not."""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

from quartet_compile.cli import gpus, machine
from quartet_compile.cli.check import REPORT, Check, Planned
from quartet_compile.cli.output import print_checks, print_json, progress

FIRST = f"Mend what failed above first. {REPORT}"
COMPILER = "Set CXX to a working C++17 compiler, or QUARTET_CPU_KERNELS=reference to do without."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--no-self-test", action="store_true", help="only look; compute and compile nothing")


def run(arguments: argparse.Namespace) -> int:
    """0 if nothing failed, 1 otherwise."""
    start = time.perf_counter()
    log = logging.getLogger("quartet_compile")
    level = log.level
    log.setLevel(logging.ERROR)  # what it would say once is said by the checks
    try:
        checks = examine(self_test=not arguments.no_self_test)
    finally:
        log.setLevel(level)
    seconds, counts = time.perf_counter() - start, Counter(check.status for check in checks)
    if arguments.json:
        print_json({"checks": [asdict(check) for check in checks], "failed": counts["fail"], "seconds": round(seconds, 1)})
    else:
        print_checks(checks)
        ready = "something has to be done first" if counts["fail"] else "this machine is ready"
        print(f"\n{len(checks)} checks in {seconds:.0f} s: {counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail: {ready}")
    return 1 if counts["fail"] else 0


def examine(self_test: bool = True) -> list[Check]:
    """All checks, in order. Where PyTorch does not work, only those that do without it are made."""
    # The environment before the rest: Inductor itself sets variables.
    checks = [
        Planned("python", machine.python, REPORT).run(),
        Planned("environment", machine.environment, REPORT).run(),
        Planned("torch", machine.torch_works, "Install PyTorch again.").run(),
    ]
    if checks[-1].status == "fail":
        return checks
    on_gpus = gpus.usable()
    if self_test and on_gpus:
        from quartet_compile.cli import ahead

        ahead.start_workers()
    planned = [*looking(), *(self_tests(on_gpus) if self_test else ())]
    with progress(len(planned)) as begin:
        for each in planned:
            begin(each.name)
            checks.append(each.run())
    return checks


def looking() -> Iterator[Planned]:
    """Checks of what is installed and how it is set up."""
    count = gpus.visible()
    yield Planned("triton", partial(machine.triton, count > 0), "Install Triton again.")
    yield Planned("GPUs", gpus.summary, "See whether nvidia-smi works.")
    for index in range(count):
        yield Planned(f"GPU {index}", partial(gpus.gpu, index), "See whether nvidia-smi works.")
    yield Planned("backend", machine.backend, "pip install quartet-compile, again.")
    yield Planned("C++ compiler", machine.compiler, "Install g++ or clang++, or point CXX at one.")
    yield Planned("Inductor's cache", machine.inductor_cache, "Point TORCHINDUCTOR_CACHE_DIR at a folder of yours.")
    if count:
        yield Planned("Triton's cache", machine.triton_cache, "Point TRITON_CACHE_DIR at a folder of yours.")
    for name in machine.PACKAGES:
        yield Planned(name, partial(machine.package, name), REPORT)


def self_tests(on_gpus: Sequence[int]) -> Iterator[Planned]:
    """Checks that compile and compute, on the CPU and on these GPUs.

    Inductor compiles for the CPU only where there is no GPU: before its first function it tries each instruction set in a process of its
    own, which has to import PyTorch, ten times over.
    """
    from quartet_compile.cli import ahead, operators

    calls = ahead.Calls()
    devices = [f"cuda:{index}" for index in on_gpus]
    yield Planned("CPU kernels", machine.cpu_kernels, COMPILER)
    for name in operators.operators():
        yield Planned(f"{name} on cpu", partial(operators.operator, name, "cpu", calls), FIRST)
    if devices:
        yield Planned(ahead.NAME, partial(ahead.compile_ahead, calls, devices), REPORT)
    else:
        yield from compiled("cpu")
    for device in devices:
        for name in operators.operators():
            yield Planned(f"{name} on {device}", partial(operators.operator, name, device), FIRST)
        yield from compiled(device)


def compiled(device: str) -> Iterator[Planned]:
    """Checks of what Inductor compiles for a device."""
    from quartet_compile.cli import step

    yield Planned(f"Inductor on {device}", partial(machine.inductor, device), "Nothing can be compiled here, with any backend.")
    yield Planned(f"training step on {device}", partial(step.training_step, device), FIRST)
