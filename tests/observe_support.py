"""What the tests of `observe` share: observed models without code generation, and what was recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile import observer as observing
from quartet_compile.backend import active_scope, parameter_names
from quartet_compile.capture import GraphCapture
from quartet_compile.options import split_options


class Heard(GraphCapture):
    """The passes and the partitioner as `support.capture` has them, and graphs that observers hear of as the backend makes them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(split_options({f"quartet.{k}": v for k, v in options.items()})[0])

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names = parameter_names(gm, example_inputs)
        compiled = super().__call__(gm, example_inputs)
        return observing.heard(compiled, names) if active_scope().observed is not None else compiled


def observed(model: Any, every: int = 1, elements: int | None = None, file: Any = None, **options: Any) -> tuple[Any, quartet.Observer]:
    compiled = torch.compile(model, backend=Heard(**options))
    return compiled, quartet.observe(compiled, every, file, elements=elements)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


ALL = ["y x", "y w", "dx e", "dx w", "dx ", "dw e", "dw x", "dw "]
FIRST = [use for use in ALL if not use.startswith("dx")]
"""What is recorded of a linear, and of one whose input takes no gradient."""


def uses(records: Sequence[quartet.Observation]) -> dict[str, list[str]]:
    """What was recorded of each linear, in the order of `ALL`."""
    found: dict[str, list[str]] = {}
    for r in records:
        found.setdefault(r.linear, []).append(f"{r.product} {r.operand}")
    return {linear: sorted(own, key=ALL.index) for linear, own in found.items()}


def only(records: quartet.Observations, linear: str, use: str) -> quartet.Observation:
    (record,) = records.of(linear, product=use.split(" ")[0], operand=use.split(" ")[1])
    return record


def step(compiled: Any, x: Tensor, seed: int = 7) -> list[Tensor]:
    torch.manual_seed(seed)
    x.grad = None
    model = getattr(compiled, "_orig_mod", compiled)
    model.zero_grad()
    y = compiled(x)
    y.square().mean().backward()
    return [y.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
