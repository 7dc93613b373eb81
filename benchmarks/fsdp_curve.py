"""Does training on two processes with FSDP2 follow the same loss curve as training on one, and what does it cost?

    python benchmarks/fsdp_curve.py            two GPUs, the demo's GPT (98M parameters), 200 steps: some minutes
    python benchmarks/fsdp_curve.py --quick    60 steps, fewer runs
    python benchmarks/fsdp_curve.py --cpu      two processes on the CPU, a small model

The demo's GPT is trained on bytes of the standard library with backend="inductor" and with backend="quartet", block by block, on GPUs under
bfloat16 autocast. All runs start from the same parameters and see the same global batch at each step. A run's seed chooses the quantization
noise, and the order of the sequences in each batch: without noise, too, runs differ by the rounding of sums.

    one process     the model as it is, `--runs` times: the spread from run to run. Both devices do such runs, each by itself.
    two processes   FSDP2, half of each batch on each, `--sharded-runs` times

For two figures of a curve, the mean loss of all steps and that of the last 20, the means of both kinds of runs are compared. The bound is
three standard deviations of what more runs of one process would differ by, estimated from those there are (`spread.py`): a correct program
leaves it once in about 90 invocations, which check four figures.

    peak GiB    most memory of tensors on one GPU in a step, parameters and optimizer states included
Exits with 1 if a figure lies outside its bound.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import command_line, environment, progress, table, write_json
from spread import judge

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from gpt_data import load_corpus, training_batch
from gpt_model import GPT, GPTConfig
from gpt_training import PRESETS, learning_rate

import quartet_compile  # noqa: F401  (registers the backend where the package is on the path, but not installed)

RANKS = 2
BF16 = "inductor"
BACKENDS = (BF16, "quartet")
WARM_STEPS = 5
"""Not timed, and not looked at for memory: compilation."""
TAIL = 20
FIGURES = {"all steps": slice(None), f"last {TAIL}": slice(-TAIL, None)}


@dataclass(frozen=True)
class Case:
    """A model, and the sequences of a step over all processes."""

    model: GPTConfig
    batch: int
    lr: float


CASES = {
    "cuda": Case(PRESETS["gpu"].model, PRESETS["gpu"].batch, PRESETS["gpu"].lr),
    "cpu": Case(GPTConfig(vocab=256, context=64, layers=2, heads=2, dim=128, hidden=256), batch=8, lr=3e-3),
}


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """losses: of the global batch at each step, nats per token. step_seconds: mean. peak_bytes: of this process, None on a CPU."""

    backend: str
    ranks: int
    seed: int
    losses: list[float]
    step_seconds: float
    peak_bytes: int | None


class Trained:
    """A model, sharded if there are several ranks and compiled block by block once, which can be trained from the start many times."""

    def __init__(self, case: Case, backend: str, device: torch.device, ranks: int) -> None:
        self.case, self.backend, self.device, self.ranks = case, backend, device, ranks
        torch.manual_seed(0)
        self.model = GPT(case.model)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.to(device)
        if ranks > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (ranks,))
            for module in (*self.model.layers, self.model):
                fully_shard(module, mesh=mesh)
        for block in self.model.layers:
            block.compile(backend=backend)

    def to_the_start(self) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        if self.ranks == 1:
            self.model.load_state_dict(self.start)
        else:
            set_model_state_dict(self.model, dict(self.start), options=StateDictOptions(full_state_dict=True))

    def run(self, tokens: np.ndarray, steps: int, seed: int) -> Run:
        case, rank = self.case, dist.get_rank() if self.ranks > 1 else 0
        self.to_the_start()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()
        torch.manual_seed(seed)
        losses = []
        for step in range(steps):
            if step == WARM_STEPS:
                self.synchronize()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
            batch = training_batch(tokens, step=step, seed=0, batch=case.batch, context=case.model.context)
            order = torch.from_numpy(np.random.default_rng([seed, step]).permutation(case.batch)).chunk(self.ranks)[rank]
            inputs, targets = (part[order].to(self.device) for part in batch)
            optimizer.param_groups[0]["lr"] = learning_rate(step, Namespace(steps=steps, lr=case.lr))
            with autocast:
                loss = self.model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        self.synchronize()
        seconds = (time.perf_counter() - began) / (steps - WARM_STEPS)
        curve = torch.stack(losses).double()
        if self.ranks > 1:
            dist.all_reduce(curve)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return Run(self.backend, self.ranks, seed, (curve / self.ranks).tolist(), seconds, peak)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def worker(rank: int, arguments: Namespace, kind: str, folder: str) -> None:
    """All runs of one process: its share of those alone, then those of all together. They go to a file."""
    started = time.perf_counter()
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else blocks would run uncompiled, in BF16
    case = CASES[kind]
    tokens = load_corpus(None, vocab=256, context=case.model.context, cache=Path(folder, "unused")).train
    runs: list[Run] = []
    for ranks in (1, RANKS):
        if ranks > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
        seeds = range(rank, arguments.runs, RANKS) if ranks == 1 else range(arguments.runs, arguments.runs + arguments.sharded_runs)
        for backend in BACKENDS:
            torch._dynamo.reset()
            gc.collect()
            if kind == "cuda":
                torch.cuda.empty_cache()
            trained = Trained(case, backend, device, ranks)
            for seed in seeds:
                runs.append(run := trained.run(tokens, arguments.steps, seed))
                if ranks == 1 or rank == 0:
                    progress(
                        f"{time.perf_counter() - started:4.0f} s  {backend}, {ranks} process(es), seed {seed}: "
                        f"last loss {run.losses[-1]:.4f}, {run.step_seconds * 1e3:.1f} ms a step"
                    )
            del trained
    torch.save([vars(run) for run in runs], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


# ---------------------------------------------------------------- output


def curves_table(runs: list[Run], steps: int) -> str:
    shown = sorted({0, *(round(steps * part / 5) - 1 for part in range(1, 6))})
    rows = []
    for backend in BACKENDS:
        for ranks in (1, RANKS):
            curve = np.mean([run.losses for run in of(runs, backend, ranks)], axis=0)
            rows.append([backend, str(ranks), *(f"{curve[step]:.4f}" for step in shown)])
    return table(("loss, mean of runs", "processes", *(f"step {step + 1}" for step in shown)), rows)


def verdict_table(verdicts: dict[str, list[dict[str, Any]]], runs: list[Run]) -> str:
    rows = []
    for backend, figures in verdicts.items():
        n, m = (len(of(runs, backend, ranks)) for ranks in (1, RANKS))
        for f in figures:
            rows.append([
                backend, f["figure"], f"{f['one']:.5f} ({n} runs, s = {f['one_stdev']:.1e})", f"{f['two']:.5f} ({m} runs)",
                f"{f['deviation']:+.1e}", f"{f['factor']:.1f} s = {f['bound']:.1e}", "inside" if f["inside"] else "OUTSIDE",
            ])  # fmt: skip
    return table(("mean loss", "of", "one process", "two processes", "difference", "bound", ""), rows, left=2)


def cost_rows(runs: list[Run], tokens: int) -> list[dict[str, Any]]:
    """One object for each backend and number of processes. tokens: of a global batch."""
    rows = []
    for backend in BACKENDS:
        for ranks in (1, RANKS):
            some = of(runs, backend, ranks)
            peaks = [run.peak_bytes for run in some if run.peak_bytes is not None]
            seconds = median(run.step_seconds for run in some)
            rows.append({
                "backend": backend, "processes": ranks, "seconds": seconds, "tokens_per_second": tokens / seconds,
                "peak_bytes": max(peaks, default=None), "curves": {run.seed: run.losses for run in some},
            })  # fmt: skip
    for row in rows:
        base = next(r for r in rows if r["backend"] == BF16 and r["processes"] == row["processes"])
        row["peak_ratio"] = row["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
    return rows


def cost_table(rows: list[dict[str, Any]]) -> str:
    return table(("cost", "processes", "step ms", "tokens/s", "peak GiB per GPU", "ratio to BF16"), [
        [
            row["backend"], str(row["processes"]), f"{row['seconds'] * 1e3:.1f}", f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "-", f"{row['peak_ratio']:.3f}" if row["peak_ratio"] else "-",
        ]
        for row in rows
    ])  # fmt: skip


def merged(runs: list[Run]) -> list[Run]:
    """Each run once: both ranks have recorded those of two processes, with the same losses; the record with more memory stands for it."""
    found: dict[tuple[str, int, int], Run] = {}
    for run in sorted(runs, key=lambda run: (run.peak_bytes or 0, run.step_seconds)):
        found[run.backend, run.ranks, run.seed] = run
    return [found[key] for key in sorted(found)]


def of(runs: list[Run], backend: str, ranks: int) -> list[Run]:
    return [run for run in runs if run.backend == backend and run.ranks == ranks]


def main() -> int:
    parser = command_line(__doc__, cpu=True)
    parser.add_argument("--steps", type=int, help="default: 200; with --quick or --cpu 60, with both 25")
    parser.add_argument("--runs", type=int, help="on one process, with each backend; default: 6, with --quick or --cpu 4")
    parser.add_argument("--sharded-runs", type=int, help="on two processes, with each backend; default: 3, with --quick or --cpu 2")
    arguments = parser.parse_args()
    fewer = arguments.quick + arguments.cpu
    arguments.steps = arguments.steps or (200, 60, 25)[fewer]
    arguments.runs = arguments.runs or (4 if fewer else 6)
    arguments.sharded_runs = arguments.sharded_runs or (2 if fewer else 3)
    if arguments.runs < 2 or arguments.steps < TAIL:
        parser.error(f"at least 2 runs of {TAIL} steps: the spread of one run is unknown")
    if not arguments.cpu and torch.cuda.device_count() < RANKS:
        parser.exit(2, f"{parser.prog}: fewer than {RANKS} CUDA GPUs; --cpu runs a smoke test on tiny shapes\n")
    kind = "cpu" if arguments.cpu else "cuda"
    if arguments.cpu:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, kind, folder), nprocs=RANKS)
        runs = merged([Run(**run) for rank in range(RANKS) for run in torch.load(Path(folder, f"{rank}.pt"))])
    case = CASES[kind]
    verdicts = {b: judge(*([run.losses for run in of(runs, b, ranks)] for ranks in (1, RANKS)), FIGURES) for b in BACKENDS}
    rows = cost_rows(runs, case.batch * case.model.context)
    write_json(arguments.json, torch.device(kind), [row | {"figures": verdicts[row["backend"]]} for row in rows])
    print(", ".join(f"{key} {value}" for key, value in environment(torch.device(kind)).items()))
    print(curves_table(runs, arguments.steps), verdict_table(verdicts, runs), cost_table(rows), sep="\n\n")
    return 0 if all(figure["inside"] for figures in verdicts.values() for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
