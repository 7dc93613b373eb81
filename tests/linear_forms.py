"""Ways in which users write the product of tokens with a weight, for models drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import quartet_compile as quartet


class Form(NamedTuple):
    """How a user writes x [B, T, I] times a weight.

    turned: the weight is stored [in, out]. fused: the product adds the bias; F.linear does for a contiguous x only. left: the weight is the
    product's left operand, y^T = w x^T. channels_first: the result lies in memory as [batch, features, tokens]. expanded: a batch of
    products with the weight, expanded. scaled: the product of an addmm with a bias has a factor.
    """

    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    turned: bool = False
    fused: bool = False
    left: bool = False
    channels_first: bool = False
    expanded: bool = False
    scaled: bool = False


def plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _addmm(x: Tensor, w: Tensor, bias: Tensor | None, alpha: float = 1.0) -> Tensor:
    flat = x.flatten(0, -2)
    y = flat @ w.t() if bias is None else torch.addmm(bias, flat, w.t(), alpha=alpha)
    return y.view(*x.shape[:-1], -1)


FORMS = {
    "F.linear": Form(F.linear, fused=True),
    "x @ W": Form(lambda x, w, b: plus(x @ w, b), turned=True),
    "x @ W.t()": Form(lambda x, w, b: plus(x @ w.t(), b)),
    "W @ x": Form(lambda x, w, b: plus((w @ x.flatten(0, -2).t()).t().reshape(*x.shape[:-1], -1), b), left=True),
    "addmm": Form(_addmm, fused=True),
    "addmm, alpha=2": Form(lambda x, w, b: _addmm(x, w, b, 2.0), fused=True, scaled=True),
    "einsum": Form(lambda x, w, b: plus(torch.einsum("bti,oi->bto", x, w), b)),
    "bmm": Form(lambda x, w, b: plus(torch.bmm(x.flatten(0, 1)[None], w[None]).view(*x.shape[:-1], -1), b), turned=True),
    "bmm, expanded": Form(lambda x, w, b: plus(torch.bmm(x, w.expand(x.shape[0], *w.shape)), b), turned=True, expanded=True),
    "convolution": Form(lambda x, w, b: F.conv1d(x.transpose(1, 2), w[:, :, None], b).transpose(1, 2), fused=True, channels_first=True),
}


class AsWritten:
    """What a user's model does."""

    def linear(self, name: str, form: str, x: Tensor, w: Tensor, bias: Tensor | None, computed: bool) -> Tensor:
        return FORMS[form].call(x, w, bias)

    def merged(self, name: str, b: Tensor, a: Tensor) -> Tensor:
        """The update of a weight by an adapter [O, R] and [R, I]."""
        return b @ a

    def experts(self, name: str, x: Tensor, w: Tensor) -> Tensor:
        """x [E, T, I] times w [E, I, O]."""
        return torch.bmm(x, w)

    def groups(self, name: str, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        """Tokens [T, I], sorted by group, times w [G, I, O]. torch multiplies groups in bfloat16."""
        return torch._grouped_mm(x.bfloat16(), w.bfloat16(), offs=ends).to(x.dtype)

    def within(self, region: str, steps: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Steps that are computed again in the backward pass ("checkpoint"), or in the context of a recipe."""
        if region == "checkpoint":
            y: Tensor = checkpoint(steps, x, use_reentrant=False)
            return y
        with quartet.recipe(region):
            return steps(x)


AS_WRITTEN = AsWritten()
