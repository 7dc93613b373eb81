"""Ways to write a model and to train it that are no special case: each linear is found, and gradients are what they should be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import capture, recorded_seeds
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.usefixtures("device")

ALL, FIRST = ("y", "dx", "dw"), ("y", "dw")
"""The products of a linear, and of one whose input takes no gradient."""


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def products(backend: Any, model: Any = None) -> dict[str, tuple[str, ...]]:
    return {linear.name: linear.products for linear in backend.report(model).linears}


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def backward(loss: Tensor, seed: int = 5, **kwargs: Any) -> None:
    """With draws that another call with the same seed repeats."""
    torch.manual_seed(seed)
    loss.backward(**kwargs)


# ---------------------------------------------------------------- models


@pytest.mark.feature("Ways to write a linear", "nn.MultiheadAttention")
def test_attention_with_packed_projections() -> None:
    model, x = nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 8, 64, requires_grad=True)
    compiled, backend = capture(model)
    compiled(x, x, x, need_weights=False)[0].sum().backward()
    assert products(backend, model) == {"in_proj_weight": ALL, "out_proj": ALL}


def test_cross_attention_reads_slices_of_the_packed_projection() -> None:
    model, x, memory = nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 8, 64)
    compiled, backend = capture(model)
    compiled(x, memory, memory, need_weights=False)[0].sum().backward()
    assert [(n.name, n.shape[2], n.products) for n in backend.report(model).linears] == [
        ("in_proj_weight", 64, ALL), ("in_proj_weight", 128, FIRST), ("out_proj", 64, ALL),
    ]  # fmt: skip


@pytest.mark.feature("Ways to write a linear", "nn.TransformerEncoderLayer in training")
def test_an_encoder_layer() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    compiled, backend = capture(model)
    compiled(torch.randn(2, 8, 64)).sum().backward()
    assert products(backend, model) == {"self_attn.in_proj_weight": FIRST, "self_attn.out_proj": ALL, "linear1": ALL, "linear2": ALL}


@pytest.mark.feature("Ways to write a linear", "adapter (LoRA) on a frozen base")
def test_an_adapter_on_a_frozen_base() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 64, bias=False).requires_grad_(False)
            self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = Adapted()
    compiled, backend = capture(model)
    compiled(torch.randn(2, 8, 64, requires_grad=True)).sum().backward()
    assert products(backend, model) == {"base": ("y", "dx"), "down": (), "up": ()}


@pytest.mark.feature("Ways to write a linear", "computed weight, when asked for: weight norm, parametrizations")
def test_weight_norm_learns_through_its_quantized_weight() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    compiled, backend = capture(model, include=["*"])
    compiled(torch.randn(8, 64)).square().mean().backward()
    assert list(products(backend, model).values()) == [FIRST]
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.mark.feature("Ways to write a linear", "tied weights")
def test_tied_linears_share_a_packed_weight_and_add_their_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = Tied()
    compiled, backend = capture(model)
    compiled(torch.randn(8, 64)).sum().backward()
    assert [n.products for n in backend.report(model).linears] == [FIRST, ALL]
    assert backend.graphs[0].forward.count("quartet.quantize.default") == 3, "two inputs, one weight"


# ---------------------------------------------------------------- loops


@pytest.mark.feature("Ways to train", "gradient accumulation")
def test_gradients_accumulate() -> None:
    model, batches = mlp(), [torch.randn(8, 64) for _ in range(3)]
    compiled, backend = capture(model)
    alone = []
    for i, x in enumerate(batches):
        backward(compiled(x).sum(), seed=i)
        alone.append(gradients(model))
    for i, x in enumerate(batches):
        backward(compiled(x).sum(), seed=i)
    for total, parts in zip(gradients(model), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(total, sum(parts[1:], parts[0]))
    assert len(backend.graphs) == 1


@pytest.mark.feature("Ways to train", "retain_graph")
def test_a_retained_graph_draws_anew_each_time() -> None:
    model = mlp()
    compiled, _ = capture(model)
    with recorded_seeds() as seeds:
        y = compiled(torch.randn(8, 64))
        y.sum().backward(retain_graph=True)
        first = gradients(model)
        y.sum().backward()
    drawn = seeds.plain + seeds.transposed
    assert len(set(drawn)) == len(drawn) == 6
    assert not torch.equal(first[0], gradients(model)[0])


@pytest.mark.feature("Ways to train", "several losses")
def test_several_losses() -> None:
    """Two outputs with one backward pass, or each with its own."""
    model, x = mlp(), torch.randn(8, 64)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model[0](x)
        return hidden, model[2](F.gelu(hidden))

    compiled, backend = capture(both)
    hidden, y = compiled(x)
    (hidden.sum() + y.sum()).backward()
    assert products(backend) == {"0": FIRST, "2": ALL}
    gradients(model)
    compiled, _ = capture(both)  # where a backward pass has run once without, torch refuses retain_graph=True: it gave its buffers away
    hidden, y = compiled(x)
    hidden.sum().backward(retain_graph=True)
    assert model[0].weight.grad.norm() > 0
    assert model[2].weight.grad is None or model[2].weight.grad.norm() == 0
    y.sum().backward()
    assert model[2].weight.grad.norm() > 0


@pytest.mark.feature("Ways to train", "activation checkpointing, use_reentrant={reentrant}")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_number(reentrant: bool) -> None:
    """Forward quantizers draw nothing: what is computed again is the same."""
    model, x = mlp(), torch.randn(8, 64, requires_grad=True)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    plain, _ = capture(model)
    again, backend = capture(checkpointed)
    results = []
    for run in (plain, again):
        y = run(x)
        backward(y.square().sum())
        results.append([y.detach(), x.grad, *gradients(model)])
        x.grad = None
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert products(backend) == {"0": ALL, "2": ALL}
    assert backend.report(None).saved_bytes_after == 0


@pytest.mark.feature("Ways to train", "selective activation checkpointing")
def test_selective_checkpointing_keeps_what_it_is_told_to() -> None:
    model, x = mlp(), torch.randn(8, 64, requires_grad=True)

    def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products))

    compiled, backend = capture(checkpointed)
    compiled(x).sum().backward()
    (graph,) = backend.graphs
    assert products(backend) == {"0": ALL, "2": ALL}
    assert graph.backward.count("quartet.quantize.default") == 0, "packed operands belong to the product that is kept"
    assert graph.backward.count("quartet.matmul.default") == 4


@pytest.mark.feature("Ways to compile", "a whole step with its optimizer in one graph")
def test_a_whole_step_never_reads_a_stale_weight() -> None:
    """Forward, backward and optimizer in one compiled function: each step multiplies by what the optimizer left."""
    model, x = mlp(), torch.randn(8, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, backend = capture(model)

    @functools.partial(torch.compile, backend=backend)
    def step(x: Tensor) -> Tensor:
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return y.detach()

    for _ in range(3):
        with torch.no_grad():
            expected, _ = capture(model)
            before = expected(x)
        assert torch.equal(step(x), before)
    assert products(backend) == {"0": FIRST, "2": ALL}


@pytest.mark.feature("Ways to compile", "torch.func.functional_call")
@pytest.mark.parametrize("make", [lambda t: t.detach().clone(), lambda t: nn.Parameter(t.detach().clone())], ids=["tensor", "parameter"])
def test_functional_call_with_tensors_of_ones_own(make: Callable[[Tensor], Tensor]) -> None:
    model, x = mlp(), torch.randn(8, 64)
    own = {name: make(p).requires_grad_() for name, p in model.named_parameters()}
    compiled, backend = capture(lambda own, x: torch.func.functional_call(model, own, (x,)))
    y = compiled(own, x)
    backward(y.square().sum())
    assert products(backend) == {"0": FIRST, "2": ALL}
    assert all(p.grad is None for p in model.parameters())
    usual, _ = capture(model)
    backward(usual(x).square().sum())
    for p, q in zip(own.values(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.feature("Ways to train", "GradScaler and gradient clipping")
def test_scaled_losses_and_clipped_gradients(device: torch.device) -> None:
    model = mlp()
    compiled, backend = capture(model)
    scaler, optimizer = torch.amp.GradScaler(device.type, init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast(device.type, torch.float16):
        loss = compiled(torch.randn(8, 64)).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    scaler.step(optimizer)
    assert 1e-2 < norm < 10
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.1 * 1e-2), rtol=1e-3, atol=0)
    assert products(backend, model) == {"0": FIRST, "2": ALL}
