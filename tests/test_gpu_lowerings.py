"""The products as Inductor compiles them, on a GPU: equal to the reference where sums are exact, rounded once, whatever is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_support import DTYPES, NEEDS_GPU, matrix, packed_on

import quartet_compile.kernels.value_ops  # noqa: F401  (registers the operators)
from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import Quantized, swizzle_scales

pytestmark = [*NEEDS_GPU]

quartet = torch.ops.quartet
BIASES = (None, torch.bfloat16, torch.float32)
SHAPES = ((37, 21, 96), (1, 1, 32), (130, 140, 288), (256, 512, 128))


@pytest.fixture(autouse=True)
def _lowerings() -> None:
    import quartet_compile.kernels.lowerings  # noqa: F401  (registers them)

    torch._dynamo.reset()


def inputs(shape: tuple[int, int, int], bias: torch.dtype | None) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor]:
    """Two packed matrices of small integers, a bias, and a residual, on the GPU."""
    m, n, k = shape
    a, b = (list(packed_on(matrix("ties", (rows, k), torch.float32, "cuda", seed=rows), "cuda")) for rows in (m, n))
    row = None if bias is None else matrix("gauss", (1, n), bias, "cuda")[0]
    return a, b, row, matrix("gauss", (m, n), torch.bfloat16, "cuda", seed=3)


def on_cpu(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.cpu() for t in tensors]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_template_of_packed_products(shape: tuple[int, int, int], out_dtype: torch.dtype, bias: torch.dtype | None) -> None:
    """The template with swizzled scales through TMA; where there are no FP4 tensor cores, it decodes its operands."""
    a, b, row, _ = inputs(shape, bias)
    expected = reference_ops.matmul(*on_cpu(*a, *b, row), 1 / 128, out_dtype)
    a[1], b[1] = swizzle_scales(a[1]), swizzle_scales(b[1])
    product = torch.compile(lambda *args: quartet.matmul_swizzled(*args, row, 1 / 128, out_dtype))
    assert torch.equal(product(*a, *b).cpu(), expected)


def test_template_swizzles_scales_itself() -> None:
    a, b, row, _ = inputs((130, 140, 288), torch.bfloat16)
    expected = reference_ops.matmul(*on_cpu(*a, *b, row), 1.0, torch.bfloat16)

    def product(a: Tensor, s: Tensor, g: Tensor, b: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return quartet.matmul_swizzled(a, quartet.swizzle(s), g, b, quartet.swizzle(t), h, row, 1.0, torch.bfloat16)

    assert torch.equal(torch.compile(product)(*a, *b).cpu(), expected)


@pytest.mark.parametrize("autotune", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_products_of_values(out_dtype: torch.dtype, bias: torch.dtype | None, autotune: bool) -> None:
    for shape in SHAPES[2:] if autotune else SHAPES:
        a, b, row, _ = inputs(shape, bias)
        expected = reference_ops.matmul(*on_cpu(*a, *b, row), 1.0, out_dtype)
        left, right = (Quantized(*on_cpu(*x)).dequantize(torch.float32).bfloat16().cuda() for x in (a, b))

        def product(x: Tensor, y: Tensor, row: Tensor | None = row) -> Tensor:
            return quartet.matmul_values(x, y, row, out_dtype)

        ours = torch.compile(product, options={"max_autotune": autotune}, dynamic=False)(left, right).cpu()
        if autotune and row is not None and out_dtype == torch.float32:
            # Where K is a single step, Triton starts the sum with the bias: tensor cores drop what is below the largest term's last bit.
            assert ((ours - expected).abs() <= 2.0**-22 * expected.abs().clamp(min=64)).all()
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("autotune", [False, True])
def test_what_follows_is_fused_or_not_with_the_same_result(autotune: bool) -> None:
    """relu(y) * 2 + residual on integers: exact in bfloat16 at each step, so that fusion must not change a bit."""
    a, b = (matrix("ties", (rows, 96), torch.bfloat16, "cuda", seed=rows) for rows in (130, 140))
    residual = torch.randint(-8, 8, (130, 140), device="cuda").bfloat16()

    def layer(a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(quartet.matmul_values(a, b, None, torch.bfloat16)) * 2 + residual

    compiled = torch.compile(layer, options={"max_autotune": autotune})(a, b)
    y = (a.double() @ b.double().t()).float()
    once = (torch.relu(y) * 2 + residual.float()).bfloat16()  # the sum stays in float32 if all is one kernel
    stepwise = (torch.relu(y.bfloat16()).float() * 2 + residual.float()).bfloat16()
    assert torch.equal(compiled, once) or torch.equal(compiled, stepwise)


def test_dynamic_sizes() -> None:
    product = torch.compile(lambda a, b: quartet.matmul_values(a, b, None, torch.bfloat16), dynamic=True)
    for rows in (5, 64, 1000):
        a, b = (matrix("ties", (n, 96), torch.bfloat16, "cuda", seed=n) for n in (rows, 140))
        assert torch.equal(product(a, b), (a.double() @ b.double().t()).bfloat16())
