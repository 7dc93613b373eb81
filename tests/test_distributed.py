"""Data parallel training of two processes on a CPU: the same numbers as one process that plays both ranks after each other."""

from __future__ import annotations

import socket
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

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]

RANKS = 2


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


def model_and_batch(rank: int) -> tuple[Net, Tensor]:
    """The same parameters for all, tokens of its own for each rank."""
    torch.manual_seed(0)
    return Net(), torch.randn(RANKS, 32, 64)[rank]


def parallel(net: Net, kind: str) -> nn.Module:
    """The net in data parallel form, compiled as torch's documentation has it: DDP whole, FSDP2 block by block."""
    if kind == "ddp":
        dist._DEFAULT_FIRST_BUCKET_BYTES = 20_000  # a block, so that the graph is split between buckets
        return torch.compile(nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.02), backend="quartet")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=kind == "fsdp2, resharded")
    for block in net.blocks:
        block.compile(backend="quartet")
    return net


def train(rank: int, kind: str, port: int, folder: str) -> None:
    """One step of one rank; its output and the gradients that it holds go to a file."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    net, x = model_and_batch(rank)
    model = parallel(net, kind)
    with one_seed():
        y = model(x)
        y.square().mean().backward()
    gradients: list[Any] = [p.grad for p in net.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    torch.save([y.detach(), *whole], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What a rank would compute by itself."""
    monkeypatch.setattr(ops, "rank", lambda: rank)
    net, x = model_and_batch(rank)
    for block in net.blocks:
        block.compile(backend="quartet")
    with one_seed():
        y = net(x)
        y.square().mean().backward()
    return [y.detach(), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, resharded"])
def test_two_ranks_average_the_gradients_of_each(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (kind, port, str(tmp_path)), nprocs=RANKS)
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    each = [alone(rank, monkeypatch) for rank in range(RANKS)]
    for rank in range(RANKS):
        assert torch.equal(together[rank][0], each[rank][0]), "the forward pass draws nothing"
    for i in range(1, len(each[0])):
        assert torch.equal(together[0][i], together[1][i])
        # Sums of float32 numbers in another order; a code that came out differently would show as 1e-3 or more.
        assert relative_error(together[0][i], (each[0][i] + each[1][i]) / 2) < 1e-5


def test_ranks_draw_differently_from_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for rank in range(RANKS):
        monkeypatch.setattr(ops, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        net, x = Net(), torch.randn(32, 64)
        torch._dynamo.reset()
        y = torch.compile(net, backend="quartet")(x)
        torch.manual_seed(1)
        y.square().mean().backward()
        results.append([p.grad for p in net.parameters()])
    weights = [i for i, g in enumerate(results[0]) if g.dim() == 2]
    assert all(not torch.equal(results[0][i], results[1][i]) for i in weights)
