"""Launches every Triton kernel at sizes that fill no tile; a program for compute-sanitizer (`test_sanitizer`).

    python tests/every_kernel.py               every operator on the GPU
    python tests/every_kernel.py overrun       a kernel that reads behind the end of a tensor: what the checker must find
    python tests/every_kernel.py race          a kernel whose threads overwrite each other in shared memory, likewise
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_support import matrix, quiet_rows, seeds_on

from quartet_compile.kernels import ops, swizzled_ops, triton_kernels, value_ops  # noqa: F401  (they register torch.ops.quartet)

quartet = torch.ops.quartet

FORWARD, BACKWARD = "four_over_six", "ms_eden"


def launch_all(x: Tensor) -> int:
    """Every operator on x [M, K], as the products of a linear would call it; returns how many calls there were."""
    seeds = seeds_on("cuda")
    rotations = quartet.rotations(seeds)
    packed = quartet.quantize(x, FORWARD)
    columns = packed[0].shape[1] * 2
    weight = quartet.quantize(matrix("gauss", (72, columns), x.dtype, "cuda"), FORWARD)
    bias = torch.randn(72, device="cuda", dtype=x.dtype)
    out = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    results = [
        quartet.quantize_with_values(x, FORWARD),
        quartet.quantize_values(x, FORWARD),
        quartet.quantize_grad(x, seeds, 0, BACKWARD, False),
        quartet.quantize_grad(x, seeds, 1, BACKWARD, True),
        quartet.quantize_grad_both(x, seeds, 0, 1, BACKWARD),
        quartet.quantize_grad_both_swizzled(x, seeds, 0, 1, BACKWARD),
        quartet.requantize(*packed, columns, seeds, 1, BACKWARD),
        quartet.requantize_swizzled(*packed, columns, seeds, 1, BACKWARD),
        quartet.grad_values(x, rotations, seeds, 0, BACKWARD, False, 1.0),
        quartet.grad_values(x, rotations, seeds, 1, BACKWARD, True, 1.0),
        quartet.grad_values_both(x, rotations, seeds, 0, 1, BACKWARD, 1.0),
        quartet.requantize_values(*packed, columns, rotations, seeds, 1, BACKWARD),
        quartet.matmul(*packed, *weight, bias, 1.0, out),
        triton_kernels.matmul_packed(*packed, *weight, bias, 1.0, out),
    ]
    torch.cuda.synchronize()
    return len(results)


def inputs() -> list[Tensor]:
    """Odd sizes, one row, a row that is no whole group, strides, scales that are made again, numbers that are not finite."""
    bf16 = torch.bfloat16
    odd = [matrix("outliers", shape, bf16, "cuda") for shape in ((1, 16), (3, 40), (129, 144), (257, 100))]
    turned = matrix("gauss", (150, 133), bf16, "cuda").t()
    broken = matrix("gauss", (40, 64), bf16, "cuda")
    broken[3, 5] = float("inf")
    others = [matrix("wide", (130, 150), dtype, "cuda") for dtype in (torch.float16, torch.float32)]
    return [*odd, turned, quiet_rows("cuda"), broken, *others]


@triton.jit
def _overrun_kernel(x, out):
    i = tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def _race_kernel(out):
    tl.inline_asm_elementwise(
        """
        {
        .shared .align 4 .b32 cell; .reg .b32 thread;
        mov.u32 thread, %tid.x; st.shared.b32 [cell], thread; ld.shared.b32 $0, [cell];
        }
        """,
        "=r,r",
        [tl.arange(0, 128)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out, 1)


def main() -> None:
    if "overrun" in sys.argv:
        _overrun_kernel[(1,)](torch.zeros(1000, device="cuda"), torch.zeros(1024, device="cuda"))
    elif "race" in sys.argv:
        _race_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
    else:
        for x in inputs():
            print(tuple(x.shape), x.dtype, launch_all(x), "calls", flush=True)
        print("every kernel was launched")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
