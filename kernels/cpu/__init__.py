"""The operators on a CPU."""

from quartet_compile.kernels.reference_ops import matmul, requantize
from quartet_compile.kernels.reference_ops import quantize as quantize
from quartet_compile.kernels.reference_ops import quantize_grad

__all__ = ["matmul", "quantize", "quantize_grad", "requantize"]
