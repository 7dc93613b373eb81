"""The operators of `quartet_compile.kernels.ops` on NVIDIA GPUs, in Triton: sm_80 and newer, with FP4 instructions where the GPU has them.

`forward` quantizes by a deterministic rule, `backward` makes the rotated operands of the backward products, `matmul` multiplies;
`numbers`, `random`, `rotation` and `ms_eden` are what they are made of, `launch` what they ask of the GPU. All of it equals
`quartet_compile.kernels.reference_ops` bit for bit, but for near-ties decided by the order of float32 additions in rotations and products.
"""

from quartet_compile.kernels.triton_kernels.backward import quantize_grad, requantize
from quartet_compile.kernels.triton_kernels.forward import quantize
from quartet_compile.kernels.triton_kernels.matmul import matmul

__all__ = ["matmul", "quantize", "quantize_grad", "requantize"]
