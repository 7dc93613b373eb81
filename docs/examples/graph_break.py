"""Two blocks of one class behind graph breaks: they share a graph."""

import torch
from torch import nn

import quartet_compile as quartet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            print(f"largest {x.detach().abs().max():.1f}")  # what torch.compile cannot capture
        return x


torch.manual_seed(0)
print(quartet.explain(Model(), torch.randn(4, 64, 256, requires_grad=True)))
