"""What a training step under FSDP2 costs, by what is kept for the backward pass and what is computed or gathered again.

    torchrun --nproc-per-node 2 benchmarks/sharded_step.py     two GPUs: minutes, most of them compilation
    python benchmarks/sharded_step.py                          one GPU
    torchrun ... benchmarks/sharded_step.py --quick            two layers and fewer steps
    torchrun ... benchmarks/sharded_step.py --cpu --quick      smoke test

The model is that of examples/llama_fsdp.py with its preset 1b, each block sharded and compiled, in bfloat16 with float32 parameters. A step
is forward, backward, clipping and fused AdamW on random tokens, 8 sequences a process. A row is a way to train it:
    again       quartet.recompute: which packed operands the backward pass quantizes again
    checkpoint  activation checkpointing inside each block: of nothing, of all but products and attention (selective), of all (full)
    reshard     whether parameters are freed after the forward pass and gathered again for the backward pass
and its columns
    held GiB    what the forward pass leaves for the backward pass, on one GPU
    peak GiB    most memory at once in a step on one GPU; parameters and optimizer states are in it
    step ms     median; the rows are measured one after the other, the first one once more at the end
    host ms     of it, until the host has queued all of the step's work: where this is nearly all, the GPU waits for the host
    speed       step time of BF16 with the same checkpointing and resharding / that of the row
"""

from __future__ import annotations

import gc
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from measuring import command_line, environment, progress, table, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import llama_fsdp
from llama_fsdp import device, over_ranks

import quartet_compile  # noqa: F401  (registers the backend where the package is on the path, but not installed)

SEQUENCES = 8
"""Of a step on each process."""
UNTIMED_STEPS = 3


@dataclass(frozen=True)
class Way:
    """How the model is trained. again: "-" for BF16."""

    backend: str
    again: str
    checkpoint: str = "none"
    reshard: bool = True

    @property
    def compile_arguments(self) -> dict[str, Any]:
        options = {} if self.backend == BF16 else {"options": {"quartet.recompute": self.again}}
        return {"backend": self.backend, **options}


BF16 = "inductor"
WAYS = (
    Way(BF16, "-"), Way("quartet", "none"), Way("quartet", "weights"), Way("quartet", "operands"),
    Way(BF16, "-", reshard=False), Way("quartet", "none", reshard=False), Way("quartet", "weights", reshard=False),
    Way(BF16, "-", "selective"), Way("quartet", "none", "selective"), Way("quartet", "operands", "selective"),
    Way(BF16, "-", "full"), Way("quartet", "none", "full"),
    Way(BF16, "-"),
)  # fmt: skip


def allocated() -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def synchronize() -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(way: Way, preset: llama_fsdp.Preset, sequences: int, steps: int) -> dict[str, Any]:
    """The row of a way; memory is the largest over the processes, None on a CPU."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = llama_fsdp.sharded(preset.model, Namespace(seed=0, checkpoint=way.checkpoint, reshard=way.reshard), **way.compile_arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = torch.randint(preset.model.vocab, (2, sequences, preset.model.context), device=device)
    seconds, host, held = [], [], 0
    for step in range(UNTIMED_STEPS + steps):
        if step == UNTIMED_STEPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start, before = time.perf_counter(), allocated()
        loss = model(tokens, targets)
        held = allocated() - before
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        host.append(time.perf_counter() - start)
        synchronize()
        seconds.append(time.perf_counter() - start)
    assert loss.isfinite()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    most = [over_ranks(value, dist.ReduceOp.MAX) or None for value in (held, peak)]
    times = {"seconds": median(seconds[UNTIMED_STEPS:]), "host_seconds": median(host[UNTIMED_STEPS:])}
    return {**asdict(way), **times, "held_bytes": most[0], "peak_bytes": most[1]}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`speed` and `peak_ratio` against the first row of BF16 that keeps and gathers the same."""
    for row in rows:
        base = next(r for r in rows if r["backend"] == BF16 and (r["checkpoint"], r["reshard"]) == (row["checkpoint"], row["reshard"]))
        row["speed"] = base["seconds"] / row["seconds"]
        for what in ("held", "peak"):
            row[f"{what}_ratio"] = row[f"{what}_bytes"] / base[f"{what}_bytes"] if base[f"{what}_bytes"] else None
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    def memory(what: str) -> list[str]:
        return [f"{row[f'{what}_bytes'] / 2**30:.2f}", f"{row[f'{what}_ratio']:.3f}"] if row[f"{what}_bytes"] else ["-", "-"]

    return [
        row["backend"], row["again"], row["checkpoint"], "yes" if row["reshard"] else "no", *memory("held"), *memory("peak"),
        f"{row['seconds'] * 1e3:.1f}", f"{row['host_seconds'] * 1e3:.1f}", f"{row['speed']:.3f}",
    ]  # fmt: skip


def main() -> int:
    arguments = command_line(__doc__, cpu=True).parse_args()
    if (device.type == "cpu") != arguments.cpu:
        print("sharded_step.py: --cpu is for machines without a GPU, and needed there", file=sys.stderr)
        return 2
    llama_fsdp.start_processes()
    preset = llama_fsdp.PRESETS["tiny" if arguments.cpu else "1b"]
    if arguments.quick:
        preset = replace(preset, model=replace(preset.model, layers=1 if arguments.cpu else 2))
    sequences, steps = (2, 1) if arguments.cpu else (SEQUENCES, 5 if arguments.quick else 10)
    rows = []
    for way in WAYS:
        rows.append(measure(way, preset, sequences, steps))
        if dist.get_rank() == 0:
            progress(f"{way}: {rows[-1]['seconds'] * 1e3:.1f} ms")
    if dist.get_rank() == 0:
        print(", ".join(f"{key} {value}" for key, value in environment(device).items()), f"processes {dist.get_world_size()}", sep=", ")
        rows = with_ratios(rows)
        write_json(arguments.json, device, rows)
        header = ("backend", "again", "checkpoint", "reshard", "held GiB", "ratio", "peak GiB", "ratio", "step ms", "host ms", "speed")
        print(table(header, [cells(row) for row in rows], left=4))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
