"""The model of a random program, which runs in two ways: as a user would have written it, and by an eager interpreter of the recipe.

Its products with weights are methods of `ways`: those of the user (`linear_forms`) call F.linear, `@`, einsum, bmm..., those of the
interpreter (`model_interpreter`) the recipe's operators. All else is the same code, from operations that no compiler decomposes into
differently rounded ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from linear_forms import AS_WRITTEN, FORMS, AsWritten
from random_programs import Adapter, Case, Experts, Groups, Linear, Mixer, Pair, Region, Twice
from torch import Tensor, nn


class Model(nn.Module):
    """The model of a case. excluded: names for the option exclude. unused: names of weights that no step reads."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.weights = nn.ParameterList()
        self.excluded: dict[str, None] = {}
        self.used: set[int] = set()
        self.plan = self._build(case.steps, case.features)[0]
        self.to(case.dtype)

    @property
    def unused(self) -> tuple[str, ...]:
        return tuple(f"weights.{i}" for i, w in enumerate(self.weights) if w.dim() > 1 and i not in self.used)

    def _parameter(self, *shape: int, frozen: bool = False) -> int:
        self.weights.append(nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5, requires_grad=not frozen))
        return len(self.weights) - 1

    def _linear(self, step: Linear, features: int, used: bool = True) -> tuple[Any, ...]:
        shape = (features, step.out) if FORMS[step.form].turned else (step.out, features)
        computed = step.made in ("normed", "merged")
        if step.made in ("first", "second"):
            shape = shape[0] * 2, shape[1]
        same = [i for i, w in enumerate(self.weights) if tuple(w.shape) == shape]
        parts = [same[0] if step.tied and same and not computed else self._parameter(*shape, frozen=step.frozen)]
        if step.made == "normed":
            parts.append(self._parameter(shape[0], 1))
        elif step.made == "merged":
            self.weights[parts[0]].requires_grad_(False)
            parts += [self._parameter(shape[0], 4), self._parameter(4, shape[1])]
        elif step.excluded:
            self.excluded[f"weights.{parts[0]}"] = None
        if used:
            self.used.update(parts)
        name = "(root)" if computed else f"weights.{parts[0]}"
        return "linear", name, step.form, tuple(parts), step.made, self._parameter(step.out) if step.bias else None

    def _build(self, steps: tuple[Any, ...], features: int, recipe: str = "") -> tuple[list[tuple[Any, ...]], int]:
        plan: list[tuple[Any, ...]] = []
        tokens = self.case.batch * self.case.tokens
        for step in steps:
            if isinstance(step, Linear):
                plan.append(self._linear(step, features))
                features = step.out
            elif isinstance(step, Pair):
                both = [self._linear(s, features, step.how != other) for s, other in ((step.first, "second"), (step.second, "first"))]
                plan.append((step.how, *both))
                features = step.first.out
            elif isinstance(step, Twice):
                plan.append(("twice", self._linear(step.linear, features)))
                features = step.linear.out
            elif isinstance(step, Mixer):
                plan.append(("mixer", self._linear(replace(step.linear, out=self.case.tokens), self.case.tokens)))
            elif isinstance(step, Adapter):
                down, up = Linear("F.linear", step.rank), Linear("F.linear", step.base.out)
                plan.append(("adapter", *(self._linear(s, n) for s, n in ((step.base, features), (down, features), (up, step.rank)))))
                features = step.base.out
            elif isinstance(step, Experts):
                weight = self._parameter(math.gcd(step.count, tokens), features, step.out)
                self.used.add(weight)
                plan.append(("experts", weight))
                features = step.out
            elif isinstance(step, Groups):
                if features % 8 == step.out % 8 == 0:
                    rewritten = recipe == "quartet2" or (self.case.everything and not recipe)
                    plan.append(self._groups(step if rewritten else replace(step, rest=0), features, tokens))
                    features = step.out
            elif isinstance(step, Region):
                inner, features = self._build(step.steps, features, recipe if step.kind == "checkpoint" else step.kind)
                plan.append(("region", step.kind, inner))
            else:
                plan.append((step,))
        return plan, features

    def _groups(self, step: Groups, features: int, tokens: int) -> tuple[Any, ...]:
        count, sizes = len(step.parts), list(step.parts)
        weight = self._parameter(count, *((step.out, features) if step.turned else (features, step.out)), frozen=step.frozen)
        self.used.add(weight)
        whole = sum(sizes) + step.rest
        ends = [tokens * sum(sizes[: i + 1]) // whole if whole else 0 for i in range(count)]
        if not step.rest:
            ends[-1] = tokens
        order = torch.randperm(tokens)
        for name, value in (("ends", torch.tensor(ends, dtype=torch.int32)), ("order", order), ("back", order.argsort())):
            self.register_buffer(f"{name}_{weight}", value)
        return "groups", weight, step.turned

    # -- running

    def forward(self, x: Tensor, ways: AsWritten = AS_WRITTEN) -> tuple[Tensor, ...]:
        """The outputs: x where a step is "output", and at the end."""
        outputs, start = [], x
        for step in self.plan:
            if step[0] == "output":
                outputs.append(x)
            else:
                x = self._step(step, x, start, ways)
        return *outputs, x

    def _steps(self, plan: list[tuple[Any, ...]], x: Tensor, ways: AsWritten) -> Tensor:
        start = x
        for step in plan:
            x = self._step(step, x, start, ways)
        return x

    def _multiply(self, step: tuple[Any, ...], x: Tensor, ways: AsWritten) -> Tensor:
        _, name, form, parts, made, bias = step
        w = self.weights[parts[0]]
        if made in ("first", "second"):
            w = w.chunk(2)[made == "second"]
        elif made == "normed":
            w = w * (self.weights[parts[1]] / (w * w).sum(1, keepdim=True).sqrt())
        elif made == "merged":
            w = w + ways.merged(name, self.weights[parts[1]], self.weights[parts[2]])
        return ways.linear(name, form, x, w, None if bias is None else self.weights[bias], made in ("normed", "merged"))

    def _step(self, step: tuple[Any, ...], x: Tensor, start: Tensor, ways: AsWritten) -> Tensor:
        kind, *rest = step
        if kind == "linear":
            return self._multiply(step, x, ways)
        if kind == "sum":
            return self._multiply(rest[0], x, ways) + self._multiply(rest[1], x, ways)
        if kind == "where":
            a, b = self._multiply(rest[0], x, ways), self._multiply(rest[1], x, ways)
            return torch.where(a > b, a, b)
        if kind in ("first", "second"):
            return self._multiply(rest[0] if kind == "first" else rest[1], x, ways)
        if kind == "teacher":
            y = self._multiply(rest[0], x, ways)
            with torch.no_grad():
                teacher = self._multiply(rest[1], x, ways)
            return y + teacher
        if kind == "mixer":
            return self._multiply(rest[0], x.transpose(1, 2), ways).transpose(1, 2)
        if kind == "twice":
            return self._multiply(rest[0], x, ways) + self._multiply(rest[0], x.relu(), ways)
        if kind == "adapter":
            return self._multiply(rest[0], x, ways) + self._multiply(rest[2], self._multiply(rest[1], x, ways), ways)
        if kind == "experts":
            w = self.weights[rest[0]]
            return ways.experts(f"weights.{rest[0]}", x.reshape(w.shape[0], -1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)
        if kind == "groups":
            ends, order, back = (getattr(self, f"{name}_{rest[0]}") for name in ("ends", "order", "back"))
            w = self.weights[rest[0]].transpose(1, 2) if rest[1] else self.weights[rest[0]]
            y = ways.groups(f"weights.{rest[0]}", x.flatten(0, 1).index_select(0, order), w, ends)
            return y.index_select(0, back).view(*x.shape[:-1], -1)
        if kind == "region":
            return ways.within(rest[0], lambda x: self._steps(rest[1], x, ways), x)
        if kind == "attention":
            return (x @ x.transpose(1, 2)).clamp(-1, 1) @ x / x.shape[1]
        if kind in ("tokens apart", "channels first"):
            dimensions = (0, 1) if kind == "tokens apart" else (1, 2)
            return x.transpose(*dimensions).contiguous().transpose(*dimensions)
        if kind == "residual":
            return x + start if x.shape == start.shape else x
        return x.relu() if kind == "relu" else x * x.clamp(-2, 2)
