"""Data, tensor and sequence parallel training of two processes on a CPU: the same numbers as one process that plays both ranks in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_support import KINDS, RANKS, Net, check_that_two_ranks_average_the_gradients_of_each, join, on_all_ranks
from support import one_seed, relative_error
from torch import Tensor, nn

from quartet_compile.kernels import ops

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]


@pytest.mark.feature("Several processes", "{kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_average_the_gradients_of_each(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_two_ranks_average_the_gradients_of_each(kind, "cpu", tmp_path, monkeypatch)


class MLP(nn.Module):
    """hidden: that of one rank, or of all."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.up, self.down = nn.Linear(64, hidden, bias=False), nn.Linear(hidden, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def mlp_and_batch() -> tuple[MLP, Tensor]:
    torch.manual_seed(0)
    return MLP(RANKS * 128), torch.randn(2, 16, 64, requires_grad=True)


def loss_of(y: Tensor) -> Tensor:
    """A mean over all ranks' numbers of each rank's own."""
    return y.square().sum() / (2 * 16 * 64)


def train_sharded(rank: int, kind: str, port: int, folder: str) -> None:
    """One step of a rank that holds half of the hidden features and, in sequence parallel, half of the tokens outside of the MLP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    join(rank, "cpu", port)
    net, x = mlp_and_batch()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind == "sequence":
        plan = {
            "norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))
        }  # fmt: skip
        x = x.detach().chunk(RANKS, 1)[rank].requires_grad_()
    parallelize_module(net, init_device_mesh("cpu", (RANKS,)), plan)
    with one_seed():
        y = torch.compile(net, backend="quartet", options={"quartet.strict": True})(x)
        loss_of(y).backward()
    shards = [p.grad.to_local() for p in (net.up.weight, net.down.weight)]  # type: ignore[union-attr]
    torch.save([y.detach(), x.grad, *shards], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.feature("Several processes", "{kind} parallel")
@pytest.mark.parametrize("kind", ["tensor", "sequence"])
def test_tensor_parallel_ranks_quantize_their_shards(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is an MLP of its own features; outputs and gradients of the input add up."""
    together = on_all_ranks(train_sharded, tmp_path, kind)
    if kind == "sequence":
        whole = [torch.cat([together[rank][i] for rank in range(RANKS)], 1) for i in (0, 1)]
        together = [[*whole, *own[2:]] for own in together]
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
        y = (outputs[0] + outputs[1]).detach().requires_grad_()
        loss_of(y).backward()
        for rank in range(RANKS):
            monkeypatch.setattr(ops, "rank", lambda rank=rank: rank)
            outputs[rank].backward(y.grad)
    for rank in range(RANKS):
        expected = [y.detach(), x.grad, shards[rank].up.weight.grad, shards[rank].down.weight.grad]
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
