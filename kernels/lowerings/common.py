"""What the lowerings share: calls of operators as they are, and epilogues in Inductor's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import autotune_select_algorithm
from torch._inductor.virtualized import V
from torch._ops import OpOverload

from quartet_compile.kernels import chosen

aten = torch.ops.aten
prims = torch.ops.prims


def lowering(op: OpOverload, when: Callable[..., bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the lowering of an operator for those arguments of which `when` holds; others are a call of the operator."""
    call = fallback_handler(op, add_to_fallback_set=False)

    def register(lower: Callable[..., Any]) -> Callable[..., Any]:
        def lowered(*args: Any) -> Any:
            # A C++ wrapper knows torch's own library calls only.
            return lower(*args) if when(*args) and not V.graph.cpp_wrapper else call(*args)

        register_lowering(op, type_promotion_kind=None)(lowered)
        return lower

    return register


def autotunes() -> bool:
    """Whether the user asked Inductor to measure the choices for products."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def best(name: str, choices: list[Any], inputs: list[Any], layout: ir.Layout) -> Any:
    """The node of the choice that is fastest, or of the only one."""
    selected: Any = autotune_select_algorithm(name, choices, inputs, layout)
    result = selected[0] if isinstance(selected, tuple) else selected  # with the choice itself from 2.13 on
    chosen.note(result, choices)
    return result


def add_bias(y: Any, bias: Any, out_dtype: torch.dtype) -> Any:
    """float32 y [M, N] plus bias [N] or None, rounded once to `out_dtype`: pointwise, for Inductor to fuse with what surrounds it."""
    if bias is not None:
        y = lowerings[aten.add.Tensor](y, lowerings[prims.convert_element_type.default](bias, torch.float32))
    return y if out_dtype == torch.float32 else lowerings[prims.convert_element_type.default](y, out_dtype)
