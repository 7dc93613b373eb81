"""Products of bfloat16 values: cuBLAS, or with max-autotune Inductor's own Triton templates, into which what follows is fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.ir import FixedLayout
from torch._inductor.kernel.mm import mm_template, persistent_tma_mm_template
from torch._inductor.kernel.mm_common import mm_args
from torch._inductor.kernel_inputs import MMKernelInputs
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import ExternKernelChoice, realize_inputs
from torch._inductor.utils import use_triton_template, use_triton_tma_template
from torch._inductor.virtualized import V

from quartet_compile.kernels import value_ops  # noqa: F401  (registers the operator)
from quartet_compile.kernels.lowerings.common import add_bias, aten, autotunes, best, lowering
from quartet_compile.kernels.triton_kernels.matmul import full_precision_sums


def quartet_product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """bfloat16 a [M, K] @ b [K, N] -> out, bfloat16 or float32, from float32 sums."""
    if 0 in (*a.shape, *b.shape):  # torch.mm with another dtype as its result refuses them
        return out.zero_()
    with full_precision_sums():
        return torch.mm(a, b, out=out) if out.dtype == a.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def quartet_product_with_bias(bias: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """As `quartet_product`, plus bfloat16 bias [N]: cuBLAS adds it to the float32 sums."""
    with full_precision_sums():
        return torch.addmm(bias, a, b, out=out)


PRODUCT = ExternKernelChoice(quartet_product)
PRODUCT_WITH_BIAS = ExternKernelChoice(quartet_product_with_bias)


@lowering(torch.ops.quartet.matmul_values.default, when=lambda a, *_: a.get_device().type == "cuda")
def matmul_values(a: Any, b: Any, bias: Any, out_dtype: torch.dtype) -> Any:
    """a [M, K] times b [N, K] transposed."""
    b = lowerings[aten.permute.default](b, [1, 0])
    in_library = out_dtype == torch.bfloat16 and bias is not None and bias.get_dtype() == torch.bfloat16
    if out_dtype == torch.bfloat16 and (bias is None or in_library):
        return _product(a, b, bias, out_dtype)
    return add_bias(_product(a, b, None, torch.float32), bias, out_dtype)


def _product(a: Any, b: Any, bias: Any, out_dtype: torch.dtype) -> Any:
    """a [M, K] @ b [K, N], plus bfloat16 bias [N] if there is one."""
    biases = [] if bias is None else [bias]
    _, _, _, layout, a, b, *expanded = mm_args(a, b, *biases, out_dtype=out_dtype)
    layout = FixedLayout(layout.device, layout.dtype, layout.size)
    inputs = [*expanded, a, b]
    choices: list[Any] = []
    library = PRODUCT if bias is None else PRODUCT_WITH_BIAS
    library.maybe_append_choice(choices, input_nodes=[*map(realize_inputs, biases), a, b], layout=layout)
    if autotunes() and use_triton_template(layout):
        templates: list[Any] = [mm_template]
        if use_triton_tma_template(a, b, output_layout=layout, add_guards=True):
            templates.append(persistent_tma_mm_template)
        name, scalars = ("mm", None) if bias is None else ("addmm", dict[str, float | int](alpha=1, beta=1))
        choices += V.choices.get_template_configs(MMKernelInputs(inputs, scalars, out_dtype), templates, name)
    return best("quartet_product", choices, inputs, layout)
