"""What the tests of `suggest` share: small models, batches near the minimum of their loss, and losses with linears left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from support import capture
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class BrokenBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Model(nn.Module):
    """Returns the mean squared error; `lm_head` is left alone by default."""

    def __init__(self, blocks: int = 3, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(blocks))
        self.lm_head = nn.Linear(64, 64)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.mse_loss(self.lm_head(x), target)


def with_bad_linear(model: Model, block: int = 1) -> Model:
    """`down` of a block has an outlier in each group of 16 weights, for features that are always 0: its output does not depend on them,
    but they take the range from the other 15."""
    up, down = model.layers[block].up, model.layers[block].down
    with torch.no_grad():
        up.bias[::16] = -1000.0
        down.weight[:, ::16] = 30.0
    return model


def batches_for(model: Model, count: int = 6, tokens: int = 64) -> list[Batch]:
    """Inputs, and what the model makes of them with a little noise: the loss is near its minimum."""
    batches = []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        x, noise = (torch.randn(tokens, 64, generator=g, device="cpu").to(model.lm_head.weight) for _ in range(2))
        y = x
        with torch.no_grad():
            for layer in model.layers:
                y = layer(y)
            batches.append((x, model.lm_head(y) + 0.01 * noise))
    return batches


def losses(model: nn.Module, batches: Iterable[Batch], **options: Any) -> list[float]:
    """By graphs of their own, captured with these options."""
    torch._dynamo.reset()
    compiled, _ = capture(model, **options)
    with torch.no_grad():
        return [compiled(*batch).item() for batch in batches]
