"""Random small models that run in two ways: as a user would have written them, and by an eager interpreter of the recipe.

A model is a program of steps on a tensor [batch, tokens, features]. Its linears go through a function `multiply`: that of the user calls
F.linear, `@`, einsum, bmm..., that of the interpreter calls the recipe's operators in an autograd.Function, without any graph. All else is
the same code, from operations that no compiler decomposes into differently rounded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

quartet = torch.ops.quartet
RULES = ("four_over_six", "ms_eden")


# ---------------------------------------------------------------- ways to write a linear


class Form(NamedTuple):
    """How a user writes x times a weight. turned: the weight is stored [in, out]. fused: the product adds the bias; F.linear does for a
    contiguous x only. left: the weight is the product's left operand, y^T = w x^T. channels_first: the result lies in memory as
    [batch, features, tokens]."""

    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    turned: bool = False
    fused: bool = False
    left: bool = False
    channels_first: bool = False


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


FORMS = {
    "F.linear": Form(F.linear, fused=True),
    "x @ W": Form(lambda x, w, b: _plus(x @ w, b), turned=True),
    "x @ W.t()": Form(lambda x, w, b: _plus(x @ w.t(), b)),
    "W @ x": Form(lambda x, w, b: _plus((w @ x.flatten(0, -2).t()).t().reshape(*x.shape[:-1], -1), b), left=True),
    "einsum": Form(lambda x, w, b: _plus(torch.einsum("bti,oi->bto", x, w), b)),
    "bmm": Form(lambda x, w, b: _plus(torch.bmm(x.flatten(0, 1)[None], w[None]).view(*x.shape[:-1], -1), b), turned=True),
    "convolution": Form(lambda x, w, b: F.conv1d(x.transpose(1, 2), w[:, :, None], b).transpose(1, 2), fused=True, channels_first=True),
}


class Recipe(torch.autograd.Function):
    """x [T, I] times w [O, I] transposed, plus bias, by the recipe; with `left`, w times x transposed, and that transposed.

    All rotations have the seed that the operators are patched to draw.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, left: bool) -> Tensor:
        packed_x, packed_w = quartet.quantize(x, RULES[0]), quartet.quantize(w, RULES[0])
        ctx.save_for_backward(*packed_x, *packed_w)
        ctx.features, ctx.dtypes, ctx.left = x.shape[1], (x.dtype, w.dtype), left
        if left:
            return quartet.matmul(*packed_w, *packed_x, None, 1.0, x.dtype).t()
        return quartet.matmul(*packed_x, *packed_w, bias, 1.0, x.dtype)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        saved, seeds = ctx.saved_tensors, torch.zeros(1, dtype=torch.int64)
        results: list[Tensor | None] = []
        for needed, dtype, transpose, other in zip(ctx.needs_input_grad, ctx.dtypes, (False, True), (saved[3:], saved[:3]), strict=False):
            left = quartet.quantize_grad(e, seeds, 0, RULES[1], transpose)
            right = quartet.requantize(*other, ctx.features, seeds, 0, RULES[1])
            if ctx.left and not transpose:  # dx^T = w^T e^T
                results.append(quartet.matmul(*right, *left, None, 1 / 128, dtype).t() if needed else None)
            else:
                results.append(quartet.matmul(*left, *right, None, 1 / 128, dtype) if needed else None)
        return results[0], results[1], e.sum(0) if ctx.needs_input_grad[2] else None, None


def as_written(form: Form, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return form.call(x, w, bias)


def interpreted(form: Form, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x, w = x.bfloat16(), w.bfloat16()
        bias = bias.bfloat16() if bias is not None and form.fused else bias
    fused = form.fused and (x.is_contiguous() or form.call is not F.linear)
    y = Recipe.apply(x.flatten(0, -2), w.t() if form.turned else w, bias if fused else None, form.left).reshape(*x.shape[:-1], -1)
    y = y.transpose(1, 2).contiguous().transpose(1, 2) if form.channels_first else y
    return y if fused else _plus(y, bias)


def experts_as_written(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x, w)


def experts_interpreted(x: Tensor, w: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x, w = x.bfloat16(), w.bfloat16()
    return torch.stack([Recipe.apply(a, b.t(), None, False) for a, b in zip(x, w, strict=True)])


# ---------------------------------------------------------------- programs


@dataclass(frozen=True)
class Linear:
    """One linear. tied: the weight of an earlier one, if one has its shape. frozen: no gradient for its weight."""

    form: str
    out: int
    bias: bool
    tied: bool
    frozen: bool


@dataclass(frozen=True)
class Sum:
    """Two linears of the same input, added."""

    left: Linear
    right: Linear


@dataclass(frozen=True)
class Experts:
    """A batch of matrices: tokens are dealt out evenly."""

    count: int
    out: int


@dataclass(frozen=True)
class Checkpoint:
    """Steps that are computed again in the backward pass."""

    steps: tuple[Any, ...]


WIDTHS = st.sampled_from([64, 80, 128])
LINEARS = st.builds(Linear, st.sampled_from(sorted(FORMS)), WIDTHS, st.booleans(), st.booleans(), st.booleans())
STEPS = st.one_of(
    LINEARS,
    st.builds(lambda a, b: Sum(a, Linear(b.form, a.out, b.bias, b.tied, b.frozen)), LINEARS, LINEARS),
    st.builds(Experts, st.sampled_from([1, 2, 3]), WIDTHS),
    st.sampled_from(["relu", "square", "residual"]),
)
PROGRAMS = st.lists(st.one_of(STEPS, st.builds(Checkpoint, st.lists(STEPS, min_size=1, max_size=3).map(tuple))), min_size=1, max_size=5)


@dataclass(frozen=True)
class Case:
    """A program, and what it is run on. precision: "float32", "bfloat16" (parameters, too) or "autocast"."""

    steps: tuple[Any, ...]
    batch: int
    tokens: int
    features: int
    precision: str
    input_gradient: bool


CASES = st.builds(
    Case, PROGRAMS.map(tuple), st.integers(1, 3), st.sampled_from([6, 18, 30]), WIDTHS,
    st.sampled_from(["float32", "bfloat16", "autocast"]), st.booleans(),
)  # fmt: skip


class Model(nn.Module):
    """The model of a case. `linears`: how many linears it runs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.linears = case, 0
        self.weights = nn.ParameterList()
        self.plan = self._build(case.steps, case.features)[0]
        if case.precision == "bfloat16":
            self.bfloat16()

    def _parameter(self, *shape: int, requires_grad: bool = True) -> int:
        self.weights.append(nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5, requires_grad=requires_grad))
        return len(self.weights) - 1

    def _linear(self, step: Linear, features: int) -> tuple[Any, ...]:
        self.linears += 1
        shape = (features, step.out) if FORMS[step.form].turned else (step.out, features)
        same = [i for i, w in enumerate(self.weights) if tuple(w.shape) == shape]
        weight = same[0] if step.tied and same else self._parameter(*shape, requires_grad=not step.frozen)
        return "linear", step.form, weight, self._parameter(step.out) if step.bias else None

    def _build(self, steps: tuple[Any, ...], features: int) -> tuple[list[tuple[Any, ...]], int]:
        plan: list[tuple[Any, ...]] = []
        for step in steps:
            if isinstance(step, Linear):
                plan.append(self._linear(step, features))
                features = step.out
            elif isinstance(step, Sum):
                plan.append(("sum", self._linear(step.left, features), self._linear(step.right, features)))
                features = step.left.out
            elif isinstance(step, Experts):
                self.linears += step.count
                plan.append(("experts", self._parameter(step.count, features, step.out)))
                features = step.out
            elif isinstance(step, Checkpoint):
                inner, features = self._build(step.steps, features)
                plan.append(("checkpoint", inner))
            else:
                plan.append((step,))
        return plan, features

    def forward(self, x: Tensor, eager: bool = False) -> Tensor:
        return self._run(self.plan, x, eager)

    def _multiply(self, step: tuple[Any, ...], x: Tensor, eager: bool) -> Tensor:
        _, form, weight, bias = step
        run = interpreted if eager else as_written
        return run(FORMS[form], x, self.weights[weight], None if bias is None else self.weights[bias])

    def _run(self, plan: list[tuple[Any, ...]], x: Tensor, eager: bool) -> Tensor:
        start = x
        for step in plan:
            if step[0] == "linear":
                x = self._multiply(step, x, eager)
            elif step[0] == "sum":
                x = self._multiply(step[1], x, eager) + self._multiply(step[2], x, eager)
            elif step[0] == "experts":
                w = self.weights[step[1]]
                dealt = x.reshape(w.shape[0], -1, x.shape[-1])
                x = (experts_interpreted if eager else experts_as_written)(dealt, w).reshape(*x.shape[:-1], -1)
            elif step[0] == "checkpoint":
                x = self._run(step[1], x, True) if eager else checkpoint(self._run, step[1], x, False, use_reentrant=False)
            elif step[0] == "residual":
                x = x + start if x.shape == start.shape else x
            else:
                x = x.relu() if step[0] == "relu" else x * x
        return x
