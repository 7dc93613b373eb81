"""Data and context parallel training of two GPUs over NCCL: the same numbers as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_support import KINDS, RANKS, check_that_two_ranks_average_the_gradients_of_each, join, on_all_ranks
from support import capture, one_seed, relative_error
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus, pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")]


@pytest.mark.feature("Several processes", "{kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_average_the_gradients_of_each(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_two_ranks_average_the_gradients_of_each(kind, "cuda", tmp_path, monkeypatch)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(256, 768, bias=False), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 64)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def attention_and_batch() -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention().cuda().bfloat16(), torch.randn(2, 512, 256).cuda().bfloat16()


def train_on_a_part_of_the_context(rank: int, port: int, folder: str) -> None:
    """One step of a rank that holds half of every sequence."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    join(rank, "cuda", port)
    net, x = attention_and_batch()
    compiled = torch.compile(net, backend="quartet", options={"quartet.strict": True})
    with one_seed(), context_parallel(init_device_mesh("cuda", (RANKS,)), buffers=[x], buffer_seq_dims=[1]):
        y = compiled(x)
        y.float().square().sum().backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
    torch.save([t.detach().cpu() for t in (y, *(p.grad for p in net.parameters()))], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.feature("Several processes", "context parallel")
def test_context_parallel(tmp_path: Path) -> None:
    """Attention goes around the ring; linears see the tokens that a rank has."""
    together = on_all_ranks(train_on_a_part_of_the_context, tmp_path)
    net, x = attention_and_batch()
    compiled, backend = capture(net)
    y = compiled(x)
    y.float().square().sum().backward()
    assert len(backend.report(net).linears) == 2
    # A rank has every second chunk of four, for balance; which ones does not matter here, all are there.
    ours, whole = (t.float().sort(dim=1).values for t in (torch.cat([own[0] for own in together], 1), y.detach().cpu()))
    # Attention sums in another order, so some codes of its output flip (2% of an operand, see test_gpu.py).
    assert relative_error(ours, whole) < 0.05
    for i, p in enumerate(net.parameters(), 1):
        assert torch.equal(together[0][i], together[1][i])
        assert relative_error(together[0][i], p.grad.cpu()) < 0.3, "two draws, each off by 0.14"
