"""The model of the page on reports: print what becomes of it."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import quartet_compile as quartet


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.router = nn.Linear(width, 2)
        self.up = nn.Parameter(torch.randn(2, width, 4 * width) / 16)
        self.down = nn.Parameter(torch.randn(2, 4 * width, width) / 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        x = x + self.mix(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))
        h = F.layer_norm(x, x.shape[-1:]).flatten(0, 1)
        experts = torch.bmm(F.gelu(torch.bmm(h.expand(2, -1, -1), self.up)), self.down)
        return x + torch.einsum("te,etd->td", self.router(h).softmax(-1), experts).view_as(x)


class Model(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(512, width), Block(width)
        self.proj, self.value_head = weight_norm(nn.Linear(width, width)), nn.Linear(width, 1)
        self.lm_head = nn.Linear(width, 512, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.proj(self.block(self.embedding(tokens))))


torch.manual_seed(0)
model, tokens = Model().bfloat16(), torch.randint(512, (4, 128))
print(quartet.explain(model, tokens, options={"quartet.exclude": ["block.mix", "*.gate"]}))
