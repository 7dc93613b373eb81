"""Data parallel training of two processes, on two CPUs or two GPUs, and of one process that plays both ranks in turn."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import one_seed, relative_error
from torch import Tensor, nn

import quartet_compile  # noqa: F401  (registers the backend)
from quartet_compile.kernels import ops

RANKS = 2
KINDS = ("ddp", "fsdp2", "fsdp2, resharded")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def model_and_batch(rank: int, device: torch.device) -> tuple[Net, Tensor]:
    """The same parameters for all, tokens of its own for each rank."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(RANKS, 32, 64)[rank]
    return net.to(device), x.to(device)


def parallel(net: Net, kind: str, device: torch.device) -> nn.Module:
    """The net in data parallel form, compiled as torch's documentation has it: DDP whole, FSDP2 block by block."""
    if kind == "ddp":
        dist._DEFAULT_FIRST_BUCKET_BYTES = 20_000  # a block, so that the graph is split between buckets
        return torch.compile(nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.02), backend="quartet")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (RANKS,))
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=kind == "fsdp2, resharded")
    for block in net.blocks:
        block.compile(backend="quartet")
    return net


def join(rank: int, device_type: str, port: int) -> torch.device:
    """Make this process that rank of two. Returns its device."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    return device


def train(rank: int, kind: str, device_type: str, port: int, folder: str) -> None:
    """One step of one rank; its output and the gradients of all ranks go to a file."""
    device = join(rank, device_type, port)
    torch.save(one_step(rank, kind, device), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def one_step(rank: int, kind: str, device: torch.device) -> list[Tensor]:
    """Output and gradients. The model goes before the process group does: the last reference to a group of gloo, if it is a model's under
    DDP, is dropped with Python's lock held, for which a thread of the group may be waiting."""
    net, x = model_and_batch(rank, device)
    model = parallel(net, kind, device)
    with one_seed():
        y = model(x)
        y.square().mean().backward()
    gradients: list[Any] = [p.grad for p in net.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return [t.detach().cpu() for t in (y, *whole)]


def alone(rank: int, device_type: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What a rank would compute by itself."""
    monkeypatch.setattr(ops, "rank", lambda: rank)
    net, x = model_and_batch(rank, torch.device(device_type))
    for block in net.blocks:
        block.compile(backend="quartet")
    with one_seed():
        y = net(x)
        y.square().mean().backward()
    return [t.detach().cpu() for t in (y, *(p.grad for p in net.parameters()))]


def on_all_ranks(step: Callable[..., None], folder: Path, *args: Any) -> list[list[Tensor]]:
    """What `step` saved in each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(step, (*args, port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def check_that_two_ranks_average_the_gradients_of_each(
    kind: str, device_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = on_all_ranks(train, folder, kind, device_type)
    each = [alone(rank, device_type, monkeypatch) for rank in range(RANKS)]
    for rank in range(RANKS):
        assert torch.equal(together[rank][0], each[rank][0]), "the forward pass draws nothing"
    for i in range(1, len(each[0])):
        assert torch.equal(together[0][i], together[1][i])
        # Sums of float32 numbers in another order; a code that came out differently would show as 1e-3 or more.
        assert relative_error(together[0][i], (each[0][i] + each[1][i]) / 2) < 1e-5
