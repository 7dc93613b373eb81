"""What a whole training step costs in NVFP4 against BF16: time, memory and compilation.

    python benchmarks/train_step.py                          both models, bfloat16 autocast: minutes on a GPU, most of them compilation
    python benchmarks/train_step.py --quick                  the demo's GPT, few steps
    python benchmarks/train_step.py --dtype bfloat16         parameters in bfloat16, no autocast
    python benchmarks/train_step.py --mode reduce-overhead   with CUDA graphs
    python benchmarks/train_step.py --models llama-1b --profile      the kernels of one quartet step, too
    python benchmarks/train_step.py --recompute weights              quartet with these values of quartet.recompute only

Models are the demo's GPT (examples/gpt_model.py): "demo" is its preset gpu, "llama-1b" has the sizes of Llama 3.2 1B, without grouped
queries and with a smaller vocabulary. A step is forward, cross-entropy, backward and fused AdamW on random tokens. The same parameters
are trained in turns, compiled with backend="inductor" and with backend="quartet":
    first step s   wall time of the first step with empty compilation caches and nothing else compiled, mostly compilation
    step ms        median over blocks of a few steps, the backends taking turns; the host waits for the GPU at the end of a block only
    speed          BF16 time / quartet time: 1 is as fast as BF16
    peak GiB       most memory at once in a step; parameters and optimizer states are in it
Ratios of the other columns are quartet's figure / BF16's. With --profile also the kernels with the largest total time in one quartet step.
Exits with 1 if a model fails.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import Timing, command_line, device_of, environment, progress, table, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from gpt_model import GPT, GPTConfig
from gpt_training import PRESETS

import quartet_compile  # noqa: F401  (registers the backend where the package is on the path, but not installed)
from quartet_compile.passes.recompute import CHOICES

BF16 = "inductor"
HEADER = (
    "model", "parameters", "backend", "first step s", "ratio", "step ms", "p20-p80", "tokens/s", "speed", "peak GiB", "ratio"
)  # fmt: skip
TOP_KERNELS = 10


@dataclass(frozen=True)
class Case:
    """A model, and the sequences of a step."""

    model: GPTConfig
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.model.context


CASES = {
    "demo": Case(PRESETS["gpu"].model, PRESETS["gpu"].batch),
    "llama-1b": Case(GPTConfig(vocab=32768, context=2048, layers=16, heads=32, dim=2048, hidden=8192), batch=8),
}


class Trained:
    """A model on random tokens, and a training step through any function that computes its loss."""

    def __init__(self, case: Case, device: torch.device, dtype: str) -> None:
        torch.manual_seed(0)
        with device:
            self.model = GPT(case.model)
            self.tokens, self.targets = torch.randint(case.model.vocab, (2, case.batch, case.model.context))
        if dtype == "bfloat16":
            self.model.bfloat16()
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.step(self.model, sequences=1)  # eager: optimizer states, cuBLAS, and what else exists once

    def step(self, loss_of: Callable[..., torch.Tensor], sequences: int | None = None) -> None:
        with self.autocast():
            loss = loss_of(self.tokens[:sequences], self.targets[:sequences])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time until the GPU is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


@contextlib.contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Inductor's and Triton's caches in a folder, with nothing of them in memory."""
    from torch._inductor.utils import clear_caches

    for name, module in list(sys.modules.items()):
        if name.startswith("quartet_compile.kernels.triton_kernels"):
            for value in vars(module).values():
                if hasattr(value, "device_caches"):  # a Triton kernel: what this process has loaded for an earlier model
                    value.device_caches.clear()
            if name.endswith(".launch"):
                module.forget_binaries()
    clear_caches()
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(folder), TRITON_CACHE_DIR=str(folder / "triton")):
        yield
    clear_caches()


def forget_compiled(device: torch.device) -> None:
    """What is left of earlier compilations costs the next one time: memory, and rounds of the garbage collector."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(run: Callable[[], object], device: torch.device, others: int) -> int | None:
    """Most bytes at once, less `others` that the run has nothing to do with; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    seconds_of(run, device)
    return torch.cuda.max_memory_allocated(device) - others


def profile(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Kernels of one step by total time, largest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds_of(run, device)
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    total = sum(e.self_device_time_total for e in events) or 1.0
    kernels = [
        {"kernel": e.key, "calls": e.count, "seconds": e.self_device_time_total / 1e6, "share": e.self_device_time_total / total}
        for e in events
    ]
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def backends(arguments: Any) -> dict[str, dict[str, Any]]:
    """How torch.compile is called for each row, by the row's name."""
    found: dict[str, dict[str, Any]] = {BF16: {"backend": "inductor", "mode": arguments.mode}}
    for choice in arguments.recompute:
        options = {"quartet.recompute": choice, "quartet.mode": arguments.mode}
        found["quartet" if choice == "none" else f"quartet, {choice} again"] = {"backend": "quartet", "options": options}
    return found


def measure(name: str, case: Case, device: torch.device, blocks: int, steps: int, arguments: Any) -> tuple[list[dict[str, Any]], list]:
    """One row for each backend, and the kernels of a step of the last one if they were asked for."""
    torch._dynamo.reset()
    gc.collect()
    before = allocated(device)
    trained = Trained(case, device, arguments.dtype)
    own = allocated(device) - before
    runs: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        compiled = {key: partial(torch.compile, trained.model, dynamic=False, **settings) for key, settings in backends(arguments).items()}
        caches = {key: Path(folder, str(i)) for i, key in enumerate(compiled)}
        first_step = {}
        for key, compile_model in compiled.items():
            progress(f"{name}: compiling with {key}")
            forget_compiled(device)
            with caches_in(caches[key]):
                first_step[key] = seconds_of(partial(trained.step, compile_model()), device)
        forget_compiled(device)
        for key, compile_model in compiled.items():
            others = allocated(device) - own  # the other backend's CUDA graphs, for one
            runs[key] = partial(trained.step, compile_model())
            rows[key] = {
                "model": name, "parameters": trained.model.parameter_count(), "backend": key, "tokens": case.tokens,
                "dtype": arguments.dtype, "mode": arguments.mode, "first_step_seconds": first_step[key],
            }  # fmt: skip
            with caches_in(caches[key]):
                for _ in range(4):  # once to compile, from the caches, then to warm up, CUDA graphs included
                    runs[key]()
            rows[key]["peak_bytes"] = peak_bytes(runs[key], device, others)
        progress(f"{name}: timing")
        samples: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(blocks):
            for key, run in runs.items():
                run()  # after the other backend's steps: not timed
                samples[key].append(seconds_of(lambda run=run: [run() for _ in range(steps)], device) / steps)
        kernels = profile(runs[key], device) if arguments.profile else []
    for key, row in rows.items():
        timing = Timing.of(samples[key])
        row |= {"seconds": timing.seconds, "seconds_p20": timing.low, "seconds_p80": timing.high}
        row["tokens_per_second"] = case.tokens / timing.seconds
        if key != BF16:
            bf16 = rows[BF16]
            row["speed"] = bf16["seconds"] / row["seconds"]
            row["first_step_ratio"] = row["first_step_seconds"] / bf16["first_step_seconds"]
            row["peak_ratio"] = row["peak_bytes"] / bf16["peak_bytes"] if bf16["peak_bytes"] else None
    if kernels:
        row["kernels"] = kernels
    return list(rows.values()), kernels


def warm_up_compiler(device: torch.device) -> None:
    """Compile something small, so that the first backend does not pay for imports and for starting the compiler's processes."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).to(device)
    torch.compile(layer, backend="inductor")(torch.randn(64, 64, device=device)).sum().backward()


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def ratio(key: str) -> str:
        return f"{row[key]:.3f}" if row.get(key) else ""

    return [
        row["model"], f"{row['parameters'] / 1e6:.0f}M", row["backend"], f"{row['first_step_seconds']:.1f}", ratio("first_step_ratio"),
        f"{row['seconds'] * 1e3:.2f}", f"{row['seconds_p20'] * 1e3:.2f}-{row['seconds_p80'] * 1e3:.2f}",
        f"{row['tokens_per_second']:,.0f}", ratio("speed"),
        f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "-", ratio("peak_ratio"),
    ]  # fmt: skip


def print_kernels(name: str, kernels: list[dict[str, Any]], step_seconds: float) -> None:
    busy = sum(kernel["seconds"] for kernel in kernels)
    print(f"\n{name}: {busy * 1e3:.2f} ms of kernels in one step, {busy / step_seconds:.0%} of its {step_seconds * 1e3:.2f} ms")
    rows = [[k["kernel"][:90], str(k["calls"]), f"{k['seconds'] * 1e3:.3f}", f"{k['share']:.1%}"] for k in kernels[:TOP_KERNELS]]
    print(table(("kernel", "calls", "ms", "share"), rows))


def main() -> int:
    parser = command_line(__doc__, cpu=False)
    parser.add_argument("--models", nargs="+", choices=CASES, help="default: both; with --quick demo")
    parser.add_argument("--dtype", choices=("autocast", "bfloat16"), default="autocast", help="default: bfloat16 autocast")
    parser.add_argument("--mode", help="torch.compile's mode, for both backends")
    both = ["none", "operands"]
    parser.add_argument("--recompute", nargs="+", choices=CHOICES, default=both, help="values of quartet.recompute; default: none operands")
    parser.add_argument("--batch", type=int, help="sequences in a step, in place of the model's own number")
    parser.add_argument("--profile", action="store_true", help=f"print the {TOP_KERNELS} largest kernels of one step of the last row")
    arguments = parser.parse_args()
    device = device_of(parser, arguments)
    warm_up_compiler(device)
    rows: list[dict[str, Any]] = []
    profiles: dict[str, list[dict[str, Any]]] = {}
    failed = False
    for name in arguments.models or (["demo"] if arguments.quick else list(CASES)):
        case = CASES[name] if arguments.batch is None else Case(CASES[name].model, arguments.batch)
        try:
            measured, profiles[name] = measure(name, case, device, 5 if arguments.quick else 15, 4, arguments)
        except Exception as error:
            failed = True
            progress(f"{name}: {type(error).__name__}: {error}")
        else:
            rows += measured
            write_json(arguments.json, device, rows)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()), f"dtype {arguments.dtype}", sep=", ")
    print(table(HEADER, [cells(row) for row in rows]))
    for row in rows:
        if row.get("kernels"):
            print_kernels(row["model"], profiles[row["model"]], row["seconds"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
