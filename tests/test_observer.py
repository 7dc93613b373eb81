"""Numerics while training: figures belong to the right layer and call, in one process or several."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_support import KINDS, RANKS, join, model_and_batch, on_all_ranks, parallel
from observe_support import ALL, FIRST, Heard, mlp, observed, only, step, uses
from support import one_seed, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import quartet_compile as quartet

# ---------------------------------------------------------------- which calls


def test_every_nth_call_in_training_with_gradients_is_observed() -> None:
    model, x = mlp(), torch.randn(8, 64)
    compiled, observer = observed(model, every=3)
    for _ in range(5):
        compiled(x).sum().backward()
        with torch.no_grad():
            compiled(x)
        compiled.eval()
        compiled(x)
        compiled.train()
    assert sorted({r.call for r in observer}) == [0, 3]
    assert uses(observer.of(call=3)) == {"0": FIRST, "2": ALL}
    assert observer.calls == 5


def test_two_forward_passes_before_their_backward_passes() -> None:
    """Each figure is of the call that it belongs to: the second input is another one."""
    model, a, b = nn.Linear(64, 64), torch.randn(8, 64), 3 * torch.randn(8, 64)
    compiled, observer = observed(model)
    first, second = compiled(a), compiled(b)
    second.sum().backward()
    (5 * first).sum().backward()
    for call, x, e in ((0, a, 5), (1, b, 1)):
        own = observer.of(call=call)
        assert uses(own) == {"(root)": FIRST}
        assert only(own, "(root)", "y x").amax == x.abs().max()
        assert only(own, "(root)", "dw e").amax == e
    assert observer.table().splitlines()[0] == "quartet: call 1, 1 linear"


def test_of_two_backward_passes_of_one_call_the_first_is_recorded() -> None:
    model = nn.Linear(64, 64)
    compiled, observer = observed(model)
    y = compiled(torch.randn(8, 64))
    y.sum().backward(retain_graph=True)
    (3 * y).sum().backward()
    assert uses(observer) == {"(root)": FIRST}
    assert only(observer, "(root)", "dw e").amax == 1


# ---------------------------------------------------------------- which layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


NAMES = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]


def scaled_stack() -> Stack:
    """Weights of different size in each block, to tell them apart."""
    net = Stack()
    for i, block in enumerate(net.blocks):
        nn.init.uniform_(block.up.weight, -(10.0**-i), 10.0**-i)
    return net


def check_stack(net: Stack, observer: quartet.Observer, first: list[str]) -> None:
    assert uses(observer) == {name: first if name == NAMES[0] else ALL for name in NAMES}
    for i, block in enumerate(net.blocks):
        for use in ("y w", "dx w") if f"blocks.{i}.up" != NAMES[0] or first == ALL else ("y w",):
            record = only(observer, f"blocks.{i}.up", use)
            assert record.amax == pytest.approx(float(block.up.weight.detach().abs().max()), rel=0.15 if record.product == "dx" else 1e-6)


@pytest.mark.parametrize("how", ["compile", "torch.compile", "whole"])
def test_blocks_that_share_a_graph_are_told_apart(how: str) -> None:
    net, backend = scaled_stack(), Heard()
    compiled: nn.Module = net
    if how == "compile":
        for block in net.blocks:
            block.compile(backend=backend)
    elif how == "torch.compile":
        net.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in net.blocks)
    else:
        net.compile(backend=backend)
    observer = quartet.observe(compiled, every=2, file=None)
    for _ in range(2):
        compiled(torch.randn(8, 64)).sum().backward()
    check_stack(net, observer, FIRST)
    assert {r.call for r in observer} == {0}
    assert [line.split()[0] for line in observer.table().splitlines()[3:9]] == NAMES


class CheckpointedBlock(Block):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class CheckpointedStack(Stack):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["in compiled blocks", "of compiled blocks", "of compiled blocks in wrappers"])
def test_checkpointed_layers_are_recorded_once(how: str, reentrant: bool) -> None:
    """The forward pass that runs again in the backward pass is observed as the first one was."""
    net, backend = scaled_stack(), Heard()
    for block in net.blocks:
        block.compile(backend=backend)
        if how == "in compiled blocks":
            block.__class__, block.reentrant = CheckpointedBlock, reentrant
    if how == "of compiled blocks":
        net.__class__, net.reentrant = CheckpointedStack, reentrant
    if how == "of compiled blocks in wrappers":
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        net.blocks = nn.ModuleList(checkpoint_wrapper(block, kind) for block in net.blocks)
    observer, x = quartet.observe(net, every=2, file=None), torch.randn(8, 64, requires_grad=True)
    steps = [step(net, x) for _ in range(3)]
    for other in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], other, strict=True))
    assert sorted({r.call for r in observer}) == [0, 2]
    check_stack(net, observer.of(call=0), ALL)
    check_stack(net, observer.of(call=2), ALL)


def test_layers_behind_a_graph_break_and_linears_that_share_an_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) + self.k(x)
            torch._dynamo.graph_break()
            return self.out(torch.tanh(y))

    compiled, observer = observed(Model())
    compiled(torch.randn(8, 64)).sum().backward()
    assert uses(observer) == {"q": FIRST, "k": FIRST, "out": ALL}
    for use in ("y x", "dw x"):
        q, k = (only(observer, name, use) for name in "qk")
        assert (q.error, q.gain) == (k.error, k.gain), "one tensor, measured once"


def test_a_compiled_function() -> None:
    model = mlp()
    compiled = torch.compile(lambda x: model(x).square(), backend=Heard())
    observer = quartet.observe(compiled, every=1, file=None)
    observer(torch.randn(8, 64)).sum().backward()
    assert uses(observer) == {"0": FIRST, "2": ALL}
    observer.remove()
    observer(torch.randn(8, 64)).sum().backward()
    assert len(observer) == 13


# ---------------------------------------------------------------- several processes, GPUs


def train_observed(rank: int, kind: str, device_type: str, port: int, folder: str) -> None:
    """Two steps of one rank, the first of them observed, with the same seeds; gradients and names go to files."""
    device = join(rank, device_type, port)
    torch.save(two_steps(rank, kind, device, folder), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def two_steps(rank: int, kind: str, device: torch.device, folder: str) -> list[Tensor]:
    """The gradients. Model and observer go before the process group does, see `distributed_support.one_step`."""
    net, x = model_and_batch(rank, device)
    with torch.no_grad():
        for i, block in enumerate(net.blocks):
            block.linear.weight.uniform_(-(10.0**-i), 10.0**-i)
    model = parallel(net, kind, device)
    observer = quartet.observe(model, every=2, file=Path(folder, "n.jsonl"))
    results = []
    for _ in range(2):
        net.zero_grad()
        with one_seed():
            model(x).square().mean().backward()
        gradients: list[Any] = [p.grad for p in net.parameters()]
        results += [(g.full_tensor() if hasattr(g, "full_tensor") else g).cpu() for g in gradients]
    observer.remove()
    return results


def check_two_ranks(kind: str, device_type: str, folder: Path) -> None:
    together = on_all_ranks(train_observed, folder, kind, device_type)
    for first, second in zip(together[0][:8], together[0][8:], strict=True):
        if device_type == "cpu":
            assert torch.equal(first, second), "the observed step is like the other one"
        else:
            assert relative_error(first, second) < 1e-3
    prefix = "module." if kind == "ddp" else ""
    both = [quartet.read_observations(folder / f"n.rank{rank}.jsonl") for rank in range(RANKS)]
    for rank, own in enumerate(both):
        assert {(r.rank, r.call) for r in own} == {(rank, 0)}
        expected = {f"{prefix}blocks.{i}.linear": ALL if i else FIRST for i in range(4)}
        assert uses(own) == expected
        for i in range(4):
            assert only(own, f"{prefix}blocks.{i}.linear", "y w").amax == pytest.approx(10.0**-i, rel=0.01)
    x = [only(own, f"{prefix}blocks.0.linear", "y x") for own in both]
    assert x[0].error != x[1].error, "tokens of its own"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.feature("Several processes", "observed numerics: {kind}")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.exhaustive) if kind == "fsdp2" else kind for kind in KINDS])
def test_each_rank_records_its_own_numbers_under_the_names_of_the_model(kind: str, tmp_path: Path) -> None:
    check_two_ranks(kind, "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
@pytest.mark.feature("Several processes", "observed numerics: {kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_each_gpu_records_its_own_numbers(kind: str, tmp_path: Path) -> None:
    check_two_ranks(kind, "cuda", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.feature("Ways to compile", "observed numerics beside CUDA graphs (reduce-overhead)")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_a_gpu_every_observed_step_is_recorded_and_the_others_run_as_ever(mode: str | None) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    x = torch.randn(2048, 256, device="cuda", requires_grad=True)
    compiled = torch.compile(model, backend="quartet", options={"quartet.mode": mode})
    observer = quartet.observe(compiled, every=4, file=None, elements=None)
    results = []
    counters.clear()
    for _ in range(10):
        torch.compiler.cudagraph_mark_step_begin()
        with one_seed():  # rotations are drawn in the graph, but these take what they are given
            results.append(step(compiled, x))
    assert {r.call for r in observer} == {0, 4, 8}
    for call in (0, 4, 8):
        assert uses(observer.of(call=call)) == {"0": ALL, "2": ALL}
    for r in observer:
        assert math.isfinite(r.error)
        if (r.linear, r.product, r.operand) == ("0", "y", "x"):
            assert r.error == pytest.approx(7.562e-3, rel=0.01)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, results[0], strict=True))
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------- what the user sees


def test_remove_leaves_everything_as_it_was() -> None:
    for make in (lambda: torch.compile(mlp(), backend=Heard()), lambda: _compiled(mlp()), _regional):
        model = make()
        before = [dict(m.__dict__) for m in model.modules()], [dict(m._forward_pre_hooks) for m in model.modules()]
        observer = quartet.observe(model, every=1, file=None)
        assert before[0] != [dict(m.__dict__) for m in model.modules()]
        model(torch.randn(8, 64)).sum().backward()
        observer.remove()
        count = len(observer)
        assert count > 0
        model.zero_grad()
        observer.remove()
        assert before[1] == [dict(m._forward_pre_hooks) for m in model.modules()]
        for m, state in zip(model.modules(), before[0], strict=True):
            assert all(m.__dict__[k] is v for k, v in state.items() if k in ("forward", "_compiled_call_impl"))
            assert set(m.__dict__) == set(state)
        model(torch.randn(8, 64)).sum().backward()
        assert len(observer) == count


def _compiled(model: nn.Module) -> nn.Module:
    model.compile(backend=Heard())
    return model


def _regional() -> nn.Module:
    net = Stack()
    for block in net.blocks:
        block.compile(backend=Heard())
    return net


@pytest.mark.parametrize("make", [lambda: torch.compile(mlp(), backend=Heard()), lambda: _compiled(mlp()), lambda: _regional()])
def test_a_model_has_one_observer_at_a_time(make: Callable[[], nn.Module]) -> None:
    model = make()
    first = quartet.observe(model, file=None)
    with pytest.raises(ValueError, match="is observed already"):
        quartet.observe(model, file=None)
    first.remove()
    quartet.observe(model, file=None)
