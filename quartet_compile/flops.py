"""Floating point operations of a product: of a linear, of attention, of whatever torch has a formula for, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


def _grouped(left: Any, right: Any, *_: Any, out_val: Any, **__: Any) -> Any:
    """2 an element of the result and of the sum; where the sum is over the tokens of a group, 2 T I O in all."""
    *_, rows, inner = left.shape
    return 2 * rows * inner * right.shape[-1]


MISSING: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val, **__: sdpa_flop_count(*map(_shape, (q, k, v))),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dy, q, k, v, *_, out_val, **__: sdpa_backward_flop_count(*map(_shape, (dy, q, k, v)))
    ),
}
"""Formulas that `torch.utils.flop_counter` has not, in some versions."""


def has_formula(node: Node) -> bool:
    """Whether torch counts the operations of a node: products, convolutions and attention."""
    return _formula(node) is not None


def flops_of(node: Node) -> int:
    """Of one node; 0 where there is no formula."""
    formula = _formula(node)
    if formula is None:
        return 0
    args: Any = map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda n: n.meta["val"])
    return hint(formula(*args, **kwargs, out_val=node.meta["val"]))


def _formula(node: Node) -> Callable[..., Any] | None:
    packet = getattr(node.target, "overloadpacket", None)
    return flop_registry.get(packet) or MISSING.get(packet) if node.op == "call_function" else None


def hint(n: int | torch.SymInt) -> int:
    """The size of this example; 0 where it depends on data and is not known before running."""
    return n if isinstance(n, int) else int(n.node.hint or 0)
