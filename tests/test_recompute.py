"""Quantizing again in the backward pass: what is kept shrinks, never grows, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import capture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from quartet_compile.kernels.format import GROUP
from quartet_compile.options import split_options

aten = torch.ops.aten

TOKENS, DIM, HIDDEN = 96, 64, 128


def packed(rows: int, columns: int) -> int:
    """Bytes of a packed matrix."""
    return rows * columns // 2 + rows * columns // GROUP + 4


class Block(nn.Module):
    """A transformer block without a residual: four different inputs of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.gate, self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, 4, DIM // 4)).permute(1, 2, 0, 3).unsqueeze(1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)
        x = self.norm2(self.out(attended))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    """One linear behind an activation, whose input stems from another one."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.25)


def noisy_gelu(x: Tensor) -> Tensor:
    """Its backward reads x and not the noise."""
    return F.gelu(x) + torch.bernoulli(torch.sigmoid(x.detach()))


def normed_gelu(x: Tensor) -> Tensor:
    return F.rms_norm(F.gelu(x), (HIDDEN,))


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(normed_gelu, x, use_reentrant=False)


def selectively(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Checkpointed, but for products and attention."""
    kept = [aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default]
    return checkpoint(layer, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, kept))


class Selective(Block):
    def forward(self, x: Tensor) -> Tensor:
        return selectively(super().forward, x)


class SelectiveMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return selectively(super().forward, x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "selective": Selective,
    "selective relu": lambda: SelectiveMLP(F.relu),
    "cumsum": lambda: MLP(lambda x: torch.cumsum(x, 1)),
    **{f.__name__: lambda f=f: MLP(f) for f in (F.gelu, F.silu, F.relu, squared_relu, dropout, noisy_gelu, normed_gelu, checkpointed)},
}


def step(model: nn.Module, choice: str, autocast: bool) -> tuple[list[Tensor], Any]:
    """(result and all gradients, what was kept)."""
    model.zero_grad()
    torch._dynamo.reset()
    compiled, backend = capture(model, recompute=choice)
    x = torch.linspace(-2, 2, TOKENS * DIM).sin().view(TOKENS, DIM).requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = compiled(x)
    y.float().square().mean().backward()
    (graph,) = backend.graphs
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())], graph


@pytest.mark.feature("Ways to train", "quartet.recompute")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_from_less(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    plain, kept = step(model, "none", autocast)
    for choice in ("weights", "operands"):
        again, less = step(model, choice, autocast)
        assert all(map(torch.equal, again, plain))
        assert less.weights_after < kept.weights_after
        assert less.activations_after <= kept.activations_after
        assert all(linear.weight_bytes == 0 for linear in less.linears)


def test_of_the_matrices_of_a_batch_nothing_is_kept() -> None:
    """What is quantized again is one of them, not the whole that a linear's operand points to."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, DIM, DIM))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.tanh().expand(2, -1, -1).clone(), self.weights)

    model = Experts()
    for choice, kept in (("none", 2), ("weights", 0)):
        _, graph = step(model, choice, False)
        packed = [linear.weight_bytes for linear in graph.linears]
        assert sum(packed) == graph.weights_after
        assert sum(map(bool, packed)) == kept


def test_what_a_block_keeps() -> None:
    """Four inputs of linears go; nothing comes in their place."""
    torch.manual_seed(0)
    model = Block()
    kept, less = (step(model, choice, False)[1] for choice in ("none", "operands"))
    inputs = 3 * packed(TOKENS, DIM) + packed(TOKENS, HIDDEN)
    assert kept.activations_after - less.activations_after == inputs
    assert less.weights_after == 0
    assert [linear.saved_after for linear in less.linears] == [0] * 5
    assert "quartet.quantize." not in kept.backward
    assert less.backward.count("quartet.quantize.default") == 4 + 5  # inputs and weights
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" not in less.backward


@pytest.mark.parametrize(
    ("name", "again"), [("gelu", True), ("squared_relu", True), ("relu", False), ("cumsum", False), ("noisy_gelu", False)]
)
def test_only_what_needs_nothing_else(name: str, again: bool) -> None:
    """ReLU keeps a bit of each element, not the element; a sum is no pointwise code; noise would be drawn anew."""
    (_, down) = step(MODELS[name](), "operands", False)[1].linears
    assert down.saved_after == (0 if again else packed(TOKENS, HIDDEN))


def test_products_that_checkpointing_keeps_are_started_from() -> None:
    """Which is not to keep their operands, too."""
    torch.manual_seed(0)
    model = Selective()
    kept, less = (step(model, choice, False)[1] for choice in ("none", "operands"))
    assert kept.backward.count("quartet.quantize.default") == 0
    assert kept.activations_after - less.activations_after == 3 * packed(TOKENS, DIM) + packed(TOKENS, HIDDEN)
    assert less.backward.count("quartet.quantize.default") == 4 + 5
    assert less.backward.count("quartet.matmul.default") == 2 * 5, "no product of the forward pass"


def test_what_checkpointing_keeps_is_started_from_though_the_backward_pass_does_not_read_it() -> None:
    """ReLU's backward does not read the product before it; it is kept because checkpointing was told to."""
    kept, less = (step(SelectiveMLP(F.relu), choice, False)[1] for choice in ("none", "operands"))
    assert kept.linears[1].saved_after == packed(TOKENS, HIDDEN)
    assert less.linears[1].saved_after == 0
    assert kept.activations_after - less.activations_after == packed(TOKENS, HIDDEN)


def test_a_graph_input_is_not_kept_for_it() -> None:
    """It would be freed otherwise: only parameters are there in any case."""
    (up, _) = step(MLP(F.gelu), "operands", False)[1].linears
    assert up.saved_after == packed(TOKENS, DIM)


@pytest.mark.slow
def test_inductor_gives_the_same_gradients() -> None:
    gradients = []
    for choice in ("none", "operands"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Block()
        compiled = torch.compile(model, backend="quartet", options={"quartet.recompute": choice})
        torch.manual_seed(3)
        compiled(torch.linspace(-2, 2, TOKENS * DIM).sin().view(TOKENS, DIM)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_an_unknown_choice() -> None:
    with pytest.raises(ValueError, match=r"'quartet\.recompute' is one of 'none', 'weights', 'operands', got 'all'"):
        split_options({"quartet.recompute": "all"})
