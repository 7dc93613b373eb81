"""A Llama in plain PyTorch: the demo's GPT with grouped queries and activation checkpointing.

Nothing in this file knows about 4-bit training or about other processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from gpt_model import MLP, rotary_tables, rotate
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten

EXPENSIVE = [
    aten.mm.default, aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
]  # fmt: skip
"""What selective checkpointing does not compute twice."""

CHECKPOINTING: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda layer, *args: layer(*args),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, EXPENSIVE)),
    "full": partial(checkpoint, use_reentrant=False),
}
"""How a layer is called: what its backward pass needs is kept; kept only if it was expensive; all computed again."""


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model."""

    vocab: int
    context: int
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; each serves `heads / kv_heads` heads of queries."""
    dim: int
    hidden: int


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in projections)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each normalized first and added to the residual stream."""

    def __init__(self, config: LlamaConfig, checkpointing: str) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.attn_norm, self.attn = nn.RMSNorm(config.dim, eps=1e-5), Attention(config)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.dim, eps=1e-5), MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return CHECKPOINTING[self.checkpointing](self.layer, x, cos, sin)

    def layer(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """`llama(tokens, targets)` is the mean cross-entropy in nats per token."""

    def __init__(self, config: LlamaConfig, checkpointing: str = "none") -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config, checkpointing) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)
        cos, sin = rotary_tables(config.context, config.dim // config.heads, base=500_000.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        positions = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, *positions)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1).float(), targets.flatten())
