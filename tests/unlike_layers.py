"""A model of thirty unlike layers, as nobody would write it: what a report has to account for."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

D = 64


class Product(nn.Module):
    """x @ W, as GPT-2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(D, D) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class Einsum(Product):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,io->bto", x, self.kernel)


class Left(Product):
    """The weight on the left."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.kernel @ x.flatten(0, 1).t()).t().view_as(x)


class Scaled(Product):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x.flatten(0, 1), x.flatten(0, 1), self.kernel, alpha=0.5).view_as(x)


class Computed(Product):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel.tanh())


class OneVector(Product):
    """A matrix times a vector."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.mv(self.kernel, x.mean((0, 1)))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, 67), nn.Linear(67, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).relu())


class Attention(nn.Module):
    """Projections side by side, scores by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, D // 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 4
        return self.mix((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, D // 4)).permute(2, 0, 3, 1, 4)
        return self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    """Attention of torch's own module, whose weights its forward reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A router, and experts that all see all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 4)
        self.weights = nn.Parameter(torch.randn(4, D, D) / 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = self.router(tokens).softmax(-1)
        return torch.bmm(tokens.expand(4, -1, -1), self.weights).permute(1, 2, 0).matmul(chosen.unsqueeze(-1)).view_as(x)


class Adapter(nn.Module):
    """A frozen linear and a narrow correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.a, self.b = nn.Linear(D, 4, bias=False), nn.Linear(4, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Images(nn.Module):
    """Convolutions over the tokens."""

    def __init__(self, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(D, D, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[return-value]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        torch._dynamo.graph_break()
        return self.after(x.relu())


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(D, D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x.roll(1, 1))


class Twice(nn.Module):
    """One linear, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.same(x).relu())


class Unlike(nn.Module):
    """Thirty layers between an embedding and a head that shares its table. in_a_loop: whether forward calls them so."""

    def __init__(self, in_a_loop: bool = False) -> None:
        super().__init__()
        self.in_a_loop = in_a_loop
        self.embedding = nn.Embedding(96, D)
        self.layers = nn.ModuleList([
            nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.LayerNorm(D), nn.RMSNorm(D), nn.Dropout(0.1), nn.Identity(),
            nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)), Product(), Einsum(), Left(), Scaled(), Computed(),
            OneVector(), Odd(), Attention(), Fused(), Torchs(), SwiGLU(), Experts(), Adapter(), Images(1), Images(3), Images(3, groups=D),
            Checkpointed(), Branch(), Breaking(), Bilinear(), Twice(), parametrizations.weight_norm(nn.Linear(D, D)), nn.Softplus(),
        ])  # fmt: skip
        self.lm_head = nn.Linear(D, 96, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.in_a_loop:
            for layer in self.layers:
                x = x + layer(x)
        else:
            x = self.layers[29](x) + functools.reduce(lambda x, layer: x + layer(x), self.layers[:25], x)
            x = x + self.layers[25](x)
            x = functools.reduce(lambda x, layer: x + layer(x), self.layers[26:29], x)
        return self.lm_head(x)
