"""Launches every Triton kernel at sizes that fill no tile; a program for compute-sanitizer (`test_sanitizer`).

Its argument is one of MATRICES, on which every operator is called, or an error for the checker to find: "overrun", a kernel that reads
behind the end of a tensor, or "race", one whose threads overwrite each other in shared memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

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


def broken() -> Tensor:
    x = matrix("gauss", (40, 64), torch.bfloat16, "cuda")
    x[3, 5] = float("inf")
    return x


MATRICES: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: matrix("outliers", (1, 16), torch.bfloat16, "cuda"),
    "odd": lambda: matrix("outliers", (129, 144), torch.bfloat16, "cuda"),
    "ragged": lambda: matrix("outliers", (257, 100), torch.bfloat16, "cuda"),
    "transposed": lambda: matrix("gauss", (150, 133), torch.bfloat16, "cuda").t(),
    "scales that are made again": lambda: quiet_rows("cuda"),
    "not finite": broken,
    "float16": lambda: matrix("wide", (130, 150), torch.float16, "cuda"),
    "float32": lambda: matrix("wide", (130, 150), torch.float32, "cuda"),
}


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


def main(what: str) -> None:
    if what == "overrun":
        _overrun_kernel[(1,)](torch.zeros(1000, device="cuda"), torch.zeros(1024, device="cuda"))
    elif what == "race":
        _race_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
    else:
        print(launch_all(MATRICES[what]()), "operators were called")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
