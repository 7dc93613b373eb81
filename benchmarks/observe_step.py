"""What an observed training step costs: a stack of linears in bfloat16, with quartet.observe and without.

    python benchmarks/observe_step.py            24 linears of 2048 x 2048 (101M parameters), 8192 and 32768 tokens
    python benchmarks/observe_step.py --quick    8192 tokens only
    python benchmarks/observe_step.py --cpu      smoke test: tiny shapes on the CPU

Steps are timed in a row, as a training loop runs them, with everything that an observed one brings about: taking samples, measuring them,
writing the file. Ratio: of an observed step's time to that of another one. Memory: the peak of a step, which grows by the inputs of the
linears, kept in bfloat16 for the comparison of gradients, and by the samples. First: seconds until the first step of its kind is done,
compilation included.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import command_line, device_of, environment, progress, table, write_json
from torch import nn

import quartet_compile as quartet

MODES = {"default": None, "CUDA graphs": "reduce-overhead"}


def stack(layers: int, features: int, device: torch.device) -> nn.Sequential:
    """Linears with something between them that keeps their outputs at the size of their inputs."""
    parts = [nn.Sequential(nn.Linear(features, features, bias=False), nn.RMSNorm(features)) for _ in range(layers)]
    return nn.Sequential(*parts).to(device, torch.bfloat16)


def seconds(step: Callable[[], None], device: torch.device, steps: int, rounds: int) -> float:
    """Of a step among `steps` in a row; the median of some rounds."""
    found = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait(device)
        found.append((time.perf_counter() - start) / steps)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(tokens: int, layers: int, features: int, mode: str, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = stack(layers, features, device), torch.randn(tokens, features, device=device, dtype=torch.bfloat16)
    options = {"quartet.mode": MODES[mode]} if device.type == "cuda" else {}
    compiled = torch.compile(model, backend="quartet", options=options)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).float().square().mean().backward()
        for p in model.parameters():
            p.grad = None

    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens, "mode": mode}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "observed"):
            observer = quartet.observe(compiled, every=1, file=Path(folder, "numerics.jsonl")) if name == "observed" else None

            def whole(observer: quartet.Observer | None = observer) -> None:
                step()
                if observer is not None:
                    observer.records  # noqa: B018  (measures the step's samples)

            start = time.perf_counter()
            whole()
            _wait(device)
            row[f"{name}_first_seconds"] = time.perf_counter() - start
            for _ in range(4):
                whole()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row[f"{name}_seconds"] = seconds(whole, device, steps, rounds)
            row[f"{name}_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            if observer is not None:
                observer.remove()
                row["records"] = sum(r.call == 0 for r in observer)
    row["ratio"] = row["observed_seconds"] / row["plain_seconds"]
    return row


def main() -> int:
    parser = command_line(__doc__ or "", cpu=True)
    arguments = parser.parse_args()
    device = device_of(parser, arguments)
    shapes = [(8192, 24, 2048), (32768, 24, 2048)]
    modes, steps, rounds = list(MODES), 10, 5
    if device.type == "cpu":
        shapes, modes, steps, rounds = [(64, 2, 64)], ["default"], 2, 2
    elif arguments.quick:
        shapes = shapes[:1]
    print(" ".join(f"{key} {value}" for key, value in environment(device).items()))
    rows = []
    for tokens, layers, features in shapes:
        for mode in modes:
            progress(f"{layers} linears of {features} x {features}, {tokens} tokens, {mode}")
            rows.append(measured(tokens, layers, features, mode, device, steps, rounds))
    header = ["parameters", "tokens", "mode", "step, ms", "observed, ms", "ratio", "peak, GiB", "observed, GiB", "first, s", "observed, s"]
    print(table(header, [_cells(row) for row in rows], left=0))
    write_json(arguments.json, device, rows)
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['parameters']:,}", f"{row['tokens']}", row["mode"],
        f"{row['plain_seconds'] * 1e3:.1f}", f"{row['observed_seconds'] * 1e3:.1f}", f"{row['ratio']:.2f}",
        f"{row['plain_bytes'] / 2**30:.2f}", f"{row['observed_bytes'] / 2**30:.2f}",
        f"{row['plain_first_seconds']:.0f}", f"{row['observed_first_seconds']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
