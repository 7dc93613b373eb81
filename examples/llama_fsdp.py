"""Train a Llama with FSDP2 and its linears in NVFP4, on any number of processes and nodes: GPUs, or CPUs where there are none.

    torchrun --nproc-per-node 8 examples/llama_fsdp.py --preset 1b             # one node with eight GPUs
    torchrun --nproc-per-node 8 examples/llama_fsdp.py --preset 1b --compare   # in BF16, too: loss, time, memory
    torchrun --nproc-per-node 2 examples/llama_fsdp.py                         # two processes on the CPU
    python examples/llama_fsdp.py                                              # one process
    torchrun ... --steps 100 --save runs/llama && torchrun ... --steps 200 --resume runs/llama

What is special about 4-bit training here is the word "quartet" in `sharded`: each block is sharded, then compiled by itself. Parameters,
gradients and optimizer states are those of ordinary training, so checkpoints hold nothing of the backend's: one written with "quartet"
goes on with "inductor", or on another number of processes, and the other way round.
"""

import argparse
import logging
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt_data import Corpus, load_corpus, training_batch
from llama_model import CHECKPOINTING, Llama, LlamaConfig
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


@dataclass(frozen=True)
class Preset:
    model: LlamaConfig
    batch: int
    """Sequences in a step, over all processes."""
    lr: float


PRESETS = {
    "tiny": Preset(LlamaConfig(vocab=256, context=128, layers=2, heads=4, kv_heads=2, dim=256, hidden=512), batch=8, lr=3e-3),
    "1b": Preset(LlamaConfig(vocab=8192, context=2048, layers=16, heads=32, kv_heads=8, dim=2048, hidden=8192), batch=16, lr=3e-4),
}
UNTIMED_STEPS = 3
"""They compile and warm up."""

device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def start_processes() -> None:
    """Join the processes that torchrun started, or be the only one."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)


def show(*text: object) -> None:
    if dist.get_rank() == 0:
        print(*text, flush=True)


def over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    """The sum or the maximum of a number that each rank has."""
    tensor = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.item()


def shared_corpus(preset: Preset, args: argparse.Namespace) -> Corpus:
    """The text, read and tokenized by one process for all."""
    files, tokenizer = [Path(file) for file in args.data], Path("runs", f"tokenizer_llama_{preset.model.vocab}.json")
    box = [None]
    if dist.get_rank() == 0:
        box = [load_corpus(files, vocab=preset.model.vocab, context=preset.model.context, cache=tokenizer)]
    dist.broadcast_object_list(box, device=device)
    return box[0]


def sharded(config: LlamaConfig, args: argparse.Namespace, **compile_arguments: Any) -> Llama:
    """The model, its parameters spread over all processes, each block compiled. Equal seeds give equal parameters."""
    torch.manual_seed(args.seed)
    with device:
        model = Llama(config, args.checkpoint)
    # On GPUs blocks compute in bfloat16 with copies of the float32 parameters. Their inputs are bfloat16 by then; the tables of rotary
    # angles are float32 and shall stay so.
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    common = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": bf16 if device.type == "cuda" else MixedPrecisionPolicy(),
    }
    for block in model.layers:
        fully_shard(block, **common, reshard_after_forward=args.reshard)
    fully_shard(model, **common)
    for block in model.layers:
        block.compile(**compile_arguments)
    return model


def train(backend: str, preset: Preset, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train from equal parameters on equal batches, whatever the backend and the number of processes. Returns what the table shows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch._dynamo.reset()
    model = sharded(preset.model, args, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    first = load(model, optimizer, args.resume) if args.resume else 0
    losses, seconds = [], []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in range(first, args.steps):
        batch = training_batch(corpus.train, step=step, seed=args.seed, batch=preset.batch, context=preset.model.context)
        tokens, targets = (part.chunk(ranks)[rank].to(device) for part in batch)
        optimizer.param_groups[0]["lr"] = preset.lr * min(1.0, (step + 1) / max(1, args.steps // 10))
        torch.manual_seed(args.seed + step)  # the noise of a step: each rank draws its own from the same seed, and a resumed run the same
        start = time.perf_counter()
        loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(over_ranks(loss.item(), dist.ReduceOp.SUM) / ranks)
        seconds.append(time.perf_counter() - start)
        if (step + 1) % max(1, args.steps // 10) == 0:
            show(f"{backend} {step + 1}/{args.steps}  loss {losses[-1]:.4f}  {seconds[-1] * 1e3:.0f} ms")
    if args.save:
        save(model, optimizer, args.steps, args.save)
    peak = over_ranks(torch.cuda.max_memory_allocated(), dist.ReduceOp.MAX) if device.type == "cuda" else None
    return {"backend": backend, "losses": losses, "seconds": median(seconds[UNTIMED_STEPS:] or seconds), "peak": peak}


def save(model: Llama, optimizer: torch.optim.Optimizer, step: int, folder: str) -> None:
    """Each process writes its part."""
    parameters, states = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": states, "step": step}, checkpoint_id=folder)
    show(f"saved {folder} after step {step}")


def load(model: Llama, optimizer: torch.optim.Optimizer, folder: str) -> int:
    """Each process reads its part, whatever the number of processes that wrote. Returns the number of steps done."""
    parameters, states = get_state_dict(model, optimizer)
    state = {"model": parameters, "optimizer": states, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    show(f"going on from {folder} after step {state['step']}")
    return state["step"]


def comparison(runs: list[dict[str, Any]], preset: Preset) -> str:
    """A line for each backend; the loss is the mean of the last tenth of the steps."""
    lines = [f"{'backend':<10}{'loss':>8}{'step ms':>10}{'tokens/s':>12}{'peak GiB per GPU':>18}"]
    for run in runs:
        tail = run["losses"][-max(1, len(run["losses"]) // 10) :]
        speed = preset.batch * preset.model.context / run["seconds"]
        peak = "-" if run["peak"] is None else f"{run['peak'] / 2**30:.2f}"
        lines.append(f"{run['backend']:<10}{mean(tail):>8.4f}{run['seconds'] * 1e3:>10.1f}{speed:>12,.0f}{peak:>18}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--backend", choices=("quartet", "inductor"), default="quartet", help="of torch.compile: NVFP4, or BF16")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, help="sequences in a step, over all processes (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="your own text (default: Python's standard library)")
    parser.add_argument(
        "--reshard", action=argparse.BooleanOptionalAction, default=True, help="gather parameters again in the backward pass (default)"
    )
    parser.add_argument("--checkpoint", choices=CHECKPOINTING, default="none", help="what each block computes again in the backward pass")
    parser.add_argument("--compare", action="store_true", help="train with inductor, then with quartet, from the same parameters")
    parser.add_argument("--save", metavar="FOLDER", help="write a checkpoint after the last step")
    parser.add_argument("--resume", metavar="FOLDER", help="go on from a checkpoint")
    args = parser.parse_args()
    args.batch = args.batch or PRESETS[args.preset].batch
    if args.batch % (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        parser.error(f"{args.batch} sequences cannot be shared by {ranks} processes; choose another --batch")
    if args.compare and args.save:
        parser.error("--compare trains two models: there is not one to --save")
    return args


def main() -> int:
    args = arguments()
    start_processes()
    if dist.get_rank() == 0:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("quartet_compile").setLevel(logging.INFO)  # says at each compilation which linears were rewritten
    preset = replace(PRESETS[args.preset], batch=args.batch)
    corpus = shared_corpus(preset, args)
    show(f"{args.preset} on {dist.get_world_size()} process(es) with {device.type}; text: {corpus.source}, {len(corpus.train):,} tokens")
    backends = ("inductor", "quartet") if args.compare else (args.backend,)
    show(comparison([train(backend, preset, corpus, args) for backend in backends], preset))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
