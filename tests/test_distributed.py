"""Data and tensor parallel training of two processes on a CPU: the same numbers as one process that plays both ranks in turn."""

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


def on_all_ranks(step: Callable[..., None], folder: Path, *args: Any) -> list[list[Tensor]]:
    """What `step` saved in each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(step, (*args, port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, resharded"])
def test_two_ranks_average_the_gradients_of_each(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = on_all_ranks(train, tmp_path, kind)
    each = [alone(rank, monkeypatch) for rank in range(RANKS)]
    for rank in range(RANKS):
        assert torch.equal(together[rank][0], each[rank][0]), "the forward pass draws nothing"
    for i in range(1, len(each[0])):
        assert torch.equal(together[0][i], together[1][i])
        # Sums of float32 numbers in another order; a code that came out differently would show as 1e-3 or more.
        assert relative_error(together[0][i], (each[0][i] + each[1][i]) / 2) < 1e-5


class MLP(nn.Module):
    """hidden: that of one rank, or of all."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, hidden, bias=False), nn.Linear(hidden, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def mlp_and_batch() -> tuple[MLP, Tensor]:
    torch.manual_seed(0)
    return MLP(RANKS * 128), torch.randn(2, 16, 64, requires_grad=True)


def train_sharded(rank: int, port: int, folder: str) -> None:
    """One step of a rank that holds half of the hidden features."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    net, x = mlp_and_batch()
    parallelize_module(net, init_device_mesh("cpu", (RANKS,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with one_seed():
        y = torch.compile(net, backend="quartet", options={"quartet.strict": True})(x)
        y.square().mean().backward()
    shards = [p.grad.to_local() for p in net.parameters()]  # type: ignore[union-attr]
    torch.save([y.detach(), x.grad, *shards], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_tensor_parallel_ranks_quantize_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is an MLP of its own features; outputs and gradients of the input add up."""
    together = on_all_ranks(train_sharded, tmp_path)
    net, x = mlp_and_batch()
    up, down = net.up.weight.detach().chunk(RANKS, 0), net.down.weight.detach().chunk(RANKS, 1)
    shards, outputs = [], []
    with one_seed():
        for rank in range(RANKS):
            monkeypatch.setattr(ops, "rank", lambda rank=rank: rank)
            torch._dynamo.reset()
            shards.append(MLP(128))
            shards[rank].up.weight.data, shards[rank].down.weight.data = up[rank].clone(), down[rank].clone()
            outputs.append(torch.compile(shards[rank], backend="quartet")(x))
        y = outputs[0] + outputs[1]
        e = 2 * y.detach() / y.numel()
        for rank in range(RANKS):
            monkeypatch.setattr(ops, "rank", lambda rank=rank: rank)
            outputs[rank].backward(e)
    for rank in range(RANKS):
        expected = [y.detach(), x.grad, *(p.grad for p in shards[rank].parameters())]
        assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in zip(together[rank], expected, strict=True))


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
