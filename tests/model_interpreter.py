"""The recipe, eagerly: each product with a weight calls the recipe's operators in an autograd.Function, without any graph.

Which products are left in the model's dtype, and what a report has to say of each, is written down here as the documentation tells it.
All rotations have the seed that the operators are patched to draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from linear_forms import FORMS, AsWritten, plus
from torch import Tensor

quartet = torch.ops.quartet
FORWARD, BACKWARD = "four_over_six", "ms_eden"
BLOCK = 128
"""Elements that are rotated together, along the dimension that a product sums over."""

Packed = tuple[Tensor, Tensor, Tensor]


def _seeds() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


class Recipe(torch.autograd.Function):
    """x [T, I] times w [O, I] transposed, plus bias; with `left`, w times x transposed, and that transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, left: bool) -> Tensor:
        packed_x, packed_w = quartet.quantize(x, FORWARD), quartet.quantize(w, FORWARD)
        ctx.save_for_backward(*packed_x, *packed_w)
        ctx.features, ctx.dtypes, ctx.left = x.shape[1], (x.dtype, w.dtype), left
        if left:
            return quartet.matmul(*packed_w, *packed_x, None, 1.0, x.dtype).t()
        return quartet.matmul(*packed_x, *packed_w, bias, 1.0, x.dtype)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        results: list[Tensor | None] = []
        for needed, dtype, transpose, other in zip(ctx.needs_input_grad, ctx.dtypes, (False, True), (saved[3:], saved[:3]), strict=False):
            left = quartet.quantize_grad(e, _seeds(), 0, BACKWARD, transpose)
            right = quartet.requantize(*other, ctx.features, _seeds(), 0, BACKWARD)
            if ctx.left and not transpose:  # dx^T = w^T e^T
                results.append(quartet.matmul(*right, *left, None, 1 / BLOCK, dtype).t() if needed else None)
            else:
                results.append(quartet.matmul(*left, *right, None, 1 / BLOCK, dtype) if needed else None)
        return results[0], results[1], e.sum(0) if ctx.needs_input_grad[2] else None, None


def _padded(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _rows(packed: Packed, start: int, end: int) -> Packed:
    return packed[0][start:end], packed[1][start:end], packed[2]


def _columns(packed: Packed, start: int, end: int) -> Packed:
    return packed[0][:, start // 2 : end // 2], packed[1][:, start // 16 : end // 16], packed[2]


class GroupedRecipe(torch.autograd.Function):
    """Rows ends[g-1] to ends[g] of x [T, I] times w[g] of [G, I, O], zeros behind the last end; bfloat16.

    All tokens have one tensor scale, all weights, too. Each group of rows begins at a block of its own, each matrix's O features, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: tuple[int, ...]) -> Tensor:
        groups, features, outs = w.shape
        sizes = [end - start for start, end in itertools.pairwise((0, *ends))]
        ctx.starts = list(itertools.accumulate((_padded(n) for n in sizes), initial=0))
        ctx.places = [row + i for row, n in zip(ctx.starts, sizes, strict=False) for i in range(n)]
        ctx.sizes, ctx.shape = sizes, (x.shape[0], groups, features, outs)
        matrices = w.new_zeros(groups, _padded(outs), features)
        matrices[:, :outs] = w.transpose(1, 2)
        packed_x = quartet.quantize(GroupedRecipe.spread(ctx, x), FORWARD)
        packed_w = quartet.quantize(matrices.flatten(0, 1), FORWARD)
        ctx.save_for_backward(*packed_x, *packed_w)
        y = x.new_zeros(x.shape[0], outs)
        for g, own, tokens in GroupedRecipe.each(ctx):
            matrix = _rows(packed_w, g * _padded(outs), g * _padded(outs) + outs)
            y[tokens] = quartet.matmul(*_rows(packed_x, own.start, own.start + sizes[g]), *matrix, None, 1.0, torch.bfloat16)
        return y

    @staticmethod
    def spread(ctx: Any, x: Tensor) -> Tensor:
        rows = x.new_zeros(ctx.starts[-1] + BLOCK, x.shape[1])
        rows[ctx.places] = x[: len(ctx.places)]
        return rows

    @staticmethod
    def each(ctx: Any) -> list[tuple[int, slice, slice]]:
        """(number, its blocks of rows, its tokens) of each group that has some."""
        ends = list(itertools.accumulate(ctx.sizes, initial=0))
        return [(g, slice(*ctx.starts[g : g + 2]), slice(*ends[g : g + 2])) for g, n in enumerate(ctx.sizes) if n]

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        tokens, groups, features, outs = ctx.shape
        packed_x, packed_w, rows = ctx.saved_tensors[:3], ctx.saved_tensors[3:], GroupedRecipe.spread(ctx, e)
        plain, turned = (quartet.quantize_grad(rows, _seeds(), 0, BACKWARD, transpose) for transpose in (False, True))
        w, x = (quartet.requantize(*packed, features, _seeds(), 0, BACKWARD) for packed in (packed_w, packed_x))
        dx, dw = e.new_zeros(tokens, features), e.new_zeros(groups, features, outs)
        for g, own, here in GroupedRecipe.each(ctx):
            wide = _padded(outs)
            e_own, matrix = _rows(plain, own.start, own.start + ctx.sizes[g]), _columns(w, g * wide, (g + 1) * wide)
            dx[here] = quartet.matmul(*e_own, *matrix, None, 1 / BLOCK, torch.bfloat16)
            x_own, e_turned = _columns(x, own.start, own.stop), _columns(turned, own.start, own.stop)
            dw[g] = quartet.matmul(*x_own, *e_turned, None, 1 / BLOCK, torch.bfloat16)
        return *(d if needed else None for d, needed in zip((dx, dw), ctx.needs_input_grad, strict=False)), None


class Seen(NamedTuple):
    """What the report has to say of one linear: see `LinearReport`."""

    name: str
    shape: tuple[int, ...] | None
    products: tuple[str, ...]
    left_because: str | None


class Interpreter(AsWritten):
    """Runs a model by the recipe and notes every linear in `seen`.

    everything: the option include=["*"]. excluded: the names that the option exclude has. min_features: the option.
    """

    def __init__(self, everything: bool, excluded: tuple[str, ...], min_features: int) -> None:
        self.everything, self.excluded, self.min_features = everything, excluded, min_features
        self.seen: list[Seen] = []
        self.recipes: list[str] = []

    def left(
        self, name: str, x: Tensor, w: Tensor, shape: tuple[int, ...], computed: bool = False, unsupported: bool = False, part: str = ""
    ) -> bool:
        """Note a linear; True if it stays in the model's dtype.

        The innermost recipe counts first, then an option that excludes it; then whether it can be rewritten at all; and where neither a
        recipe nor an option asks for it, what defaults say against it: a weight that is computed, and few features.
        """
        why, recipe = None, self.recipes[-1] if self.recipes else None
        if recipe == "bf16" or (recipe is None and name in self.excluded):
            why = "user"
        elif unsupported:
            why = "unsupported"
        elif recipe is None and not self.everything and (computed or min(shape[1:]) < self.min_features):
            why = "default"
        gradients = [product for product, of in (("dx", x), ("dw", w)) if of.requires_grad and torch.is_grad_enabled()]
        products = () if why else ("y", *gradients)
        self.seen.append(Seen(name if unsupported else name + part, None if unsupported else shape, products, why))
        return why is not None

    def linear(self, name: str, form: str, x: Tensor, w: Tensor, bias: Tensor | None, computed: bool) -> Tensor:
        how, dtype = FORMS[form], _compute_dtype(x)
        several = how.expanded and x.shape[0] > 1
        if several and w.dtype != dtype:  # a copy for each of the batch is cast
            return plus(self.experts(name, x, w.expand(x.shape[0], *w.shape), computed), bias)
        unsupported = (how.scaled and bias is not None) or (several and w.requires_grad and torch.is_grad_enabled())
        shape = x[..., 0].numel(), x.shape[-1], w.shape[1 if how.turned else 0]
        if self.left(name, x, w, shape, computed, unsupported):
            return how.call(x, w, bias)
        x, w = x.to(dtype), w.to(dtype)
        bias = bias.to(dtype) if bias is not None and how.fused else bias
        fused = how.fused and (x.is_contiguous() or how.call is not F.linear)
        y = Recipe.apply(x.flatten(0, -2), w.t() if how.turned else w, bias if fused else None, how.left).reshape(*x.shape[:-1], -1)
        y = y.transpose(1, 2).contiguous().transpose(1, 2) if how.channels_first else y
        return y if fused else plus(y, bias)

    def merged(self, name: str, b: Tensor, a: Tensor) -> Tensor:
        self.left(name, b, a, (b.shape[0], *a.shape), unsupported=True)
        return b @ a

    def experts(self, name: str, x: Tensor, w: Tensor, computed: bool = False) -> Tensor:
        shape, count = (x.shape[1], *w.shape[1:]), w.shape[0]
        left = [self.left(name, x, w, shape, computed, part=f"[{i}]" if count > 1 else "") for i in range(count)]
        if any(left):
            return torch.bmm(x, w)
        x, w = x.to(_compute_dtype(x)), w.to(_compute_dtype(x))
        return torch.stack([Recipe.apply(a, b.t(), None, False) for a, b in zip(x, w, strict=True)])

    def groups(self, name: str, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        if self.left(name, x, w, (x.shape[0], *w.shape[1:]), part=f"[0:{w.shape[0]}]"):
            return super().groups(name, x, w, ends)
        return GroupedRecipe.apply(x.bfloat16(), w.bfloat16(), tuple(ends.tolist())).to(x.dtype)

    def within(self, region: str, steps: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if region == "checkpoint":
            return steps(x)
        self.recipes.append(region)
        y = steps(x)
        self.recipes.pop()
        return y


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
