"""What the benchmarks share: command line, interleaved timing, tables and JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

FLUSH_BYTES = 2**28
"""Written before each measurement, so that the L2 cache holds nothing of use."""


# ---------------------------------------------------------------- command line


def command_line(doc: str, *, cpu: bool) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common; cpu: there is a smoke test on tiny shapes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    if cpu:
        parser.add_argument("--cpu", action="store_true", help="smoke test: tiny shapes on the CPU")
    return parser


def device_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> torch.device:
    """The device to measure; exits with 2 and one line if there is none."""
    if getattr(arguments, "cpu", False):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        hint = "; --cpu runs a smoke test on tiny shapes" if hasattr(arguments, "cpu") else ""
        parser.exit(2, f"{parser.prog}: no CUDA GPU{hint}\n")
    return torch.device("cuda", torch.cuda.current_device())


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the 20th and 80th percentile."""

    seconds: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def interleaved(functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, calls: int = 1) -> dict[str, Timing]:
    """Time all functions in turn, `rounds` times over: drifting clocks meet them alike. A measurement is `calls` calls in a row.

    On a GPU each measurement is a pair of CUDA events. Before it the L2 cache is flushed and the GPU is held up until the host has queued
    all calls, so that what is measured is the GPU's time without the host's launch overhead.
    """
    for function in functions.values():
        for _ in range(3):
            function()
    measure = _on_gpu(functions, calls) if device.type == "cuda" else _on_cpu(functions, calls)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    warm_up = max(1, rounds // 5)
    for i in range(warm_up + rounds):
        for name, seconds in measure().items():
            if i >= warm_up:
                samples[name].append(seconds)
    return {name: Timing.of(values) for name, values in samples.items()}


def _on_cpu(functions: Mapping[str, Callable[[], object]], calls: int) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        seconds = {}
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            seconds[name] = (time.perf_counter() - start) / calls
        return seconds

    return measure


def _on_gpu(functions: Mapping[str, Callable[[], object]], calls: int) -> Callable[[], dict[str, float]]:
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    hold = {name: int(3e9 * (2e-5 + 1.2 * calls * _host_seconds(function))) for name, function in functions.items()}  # cycles

    def measure() -> dict[str, float]:
        events = {}
        for name, function in functions.items():
            events[name] = start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            buffer.zero_()
            torch.cuda._sleep(hold[name])
            start.record()
            for _ in range(calls):
                function()
            end.record()
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 / calls for name, (start, end) in events.items()}

    return measure


def _host_seconds(function: Callable[[], object]) -> float:
    """How long the host takes to queue a call."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


# ---------------------------------------------------------------- output


def progress(text: str) -> None:
    """One line on stderr, which is not part of the table."""
    print(text, file=sys.stderr, flush=True)


def environment(device: torch.device | None) -> dict[str, str]:
    """What the figures depend on. device: None if nothing was measured."""
    if device is None:
        name = "none (a model: nothing was measured)"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (smoke test: the figures mean nothing)"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"device": name, "torch": torch.__version__, "triton": triton}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first `left` of them and a last one named "note" to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    to_left = [i < left or name == "note" for i, name in enumerate(header)]
    lines = []
    for row in (header, *rows):
        aligned = (f"{cell:<{width}}" if flush else f"{cell:>{width}}" for cell, width, flush in zip(row, widths, to_left, strict=True))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def write_json(path: str | None, device: torch.device | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """The environment and one object for each row, if a file was asked for."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"environment": environment(device), "rows": list(rows)}, file, indent=1)
            file.write("\n")
