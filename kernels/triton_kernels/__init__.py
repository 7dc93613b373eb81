"""The operators of `quartet_compile.kernels.ops` on NVIDIA GPUs, in Triton: sm_80 and newer, with FP4 instructions where the GPU has them.

`forward` quantizes by a deterministic rule, `gradient_codes` and `saved_codes` make the rotated operands of the backward products, `matmul`
multiplies; `gradient_values` and `saved_values` make those operands in bfloat16, for GPUs without FP4 tensor cores; `sums` measures what
was quantized. `forward_*`, `eden_*`, `ms_eden`, `gradient_tiles`, `numbers`, `words`, `four_bytes`, `random` and `rotation` are what they
are made of, `overlap` and `launch` what they ask of the GPU.
All of it equals `quartet_compile.kernels.reference_ops` bit for bit, but for near-ties decided by the order of float32 additions in
rotations and products.
"""

import sys

from quartet_compile.kernels.triton_kernels.forward import quantize, quantize_values, quantize_with_values
from quartet_compile.kernels.triton_kernels.gradient_codes import quantize_grad, quantize_grad_both
from quartet_compile.kernels.triton_kernels.gradient_values import grad_values
from quartet_compile.kernels.triton_kernels.launch import hash_in_order
from quartet_compile.kernels.triton_kernels.matmul import matmul, matmul_values
from quartet_compile.kernels.triton_kernels.packed_product import matmul_packed
from quartet_compile.kernels.triton_kernels.rotation import rotations
from quartet_compile.kernels.triton_kernels.saved_codes import requantize
from quartet_compile.kernels.triton_kernels.saved_values import requantize_values
from quartet_compile.kernels.triton_kernels.sums import fresh_sums, product_sums, saved_sums, some_rows

__all__ = [
    "fresh_sums", "grad_values", "matmul", "matmul_packed", "matmul_values", "product_sums", "quantize", "quantize_grad",
    "quantize_grad_both", "quantize_values", "quantize_with_values", "requantize", "requantize_values", "rotations", "saved_sums",
    "some_rows",
]  # fmt: skip

hash_in_order(module for name, module in sorted(sys.modules.items()) if name.startswith(f"{__name__}."))
