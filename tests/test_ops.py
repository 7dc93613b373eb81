"""The operators: what they refuse, that emulation rounds once, and that ranks draw different numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet_compile.kernels import ops, reference, reference_ops
from quartet_compile.kernels.format import Quantized

quartet = torch.ops.quartet
SEEDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quartet.quantize(torch.randn(4, 32).double(), "four_over_six"), TypeError, "cannot quantize torch.float64"),
        (lambda: quartet.quantize(torch.zeros(4, 32, dtype=torch.int32), "four_over_six"), TypeError, "supported are float32, bfloat16"),
        (lambda: quartet.quantize(torch.randn(32), "four_over_six"), ValueError, "expected a matrix"),
        (lambda: quartet.quantize(torch.randn(4, 32), "five"), ValueError, "no rule 'five'; valid are four_over_six"),
        (lambda: quartet.quantize_grad(torch.randn(4, 32), SEEDS, 0, "four_over_six", False), ValueError, "valid are ms_eden"),
        (lambda: quartet.quantize_grad_both(torch.randn(4, 32), SEEDS, 0, 1, "four_over_six"), ValueError, "valid are ms_eden"),
        (lambda: quartet.quantize_grad_both(torch.randn(32), SEEDS, 0, 1, "ms_eden"), ValueError, "expected a matrix"),
        (
            lambda: quartet.requantize(*(torch.zeros(4, 16) for _ in range(3)), 32, SEEDS, 0, "ms_eden"),
            TypeError,
            "codes uint8, scales float8_e4m3fn and tensor_scale float32",
        ),
        (
            lambda: quartet.requantize(*(packed(16, 32)), 16, SEEDS, 0, "ms_eden"),
            ValueError,
            "32 packed columns are not 16 real ones",
        ),
    ],
)
def test_bad_operands_are_refused_with_a_reason(call: Any, error: type[Exception], message: str, fake: bool) -> None:
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=message):
            call()
    else:
        with pytest.raises(error, match=message):
            call()


def packed(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return quartet.quantize(torch.randn(rows, columns), "four_over_six")


def test_products_of_unequal_lengths_and_wrong_biases_are_refused() -> None:
    with pytest.raises(ValueError, match="contract over 32 and 48"):
        quartet.matmul(*packed(4, 32), *packed(4, 48), None, 1.0, torch.float32)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        quartet.matmul(*packed(4, 32), *packed(4, 32), torch.zeros(3), 1.0, torch.float32)
    with pytest.raises(TypeError, match="cannot return"):
        quartet.matmul(*packed(4, 32), *packed(4, 32), None, 1.0, torch.float64)


@pytest.mark.parametrize("shape", [(5, 40), (128, 128), (1, 1), (33, 130)])
def test_fake_and_real_results_have_the_same_shapes_dtypes_and_strides(shape: tuple[int, int]) -> None:
    def run(x: torch.Tensor, seeds: torch.Tensor) -> list[torch.Tensor]:
        q = quartet.quantize(x, "four_over_six")
        plain, transposed = (quartet.quantize_grad(x, seeds, 0, "ms_eden", t) for t in (False, True))
        both = quartet.quantize_grad_both(x, seeds, 0, 1, "ms_eden")
        again = quartet.requantize(*q, x.shape[1], seeds, 1, "ms_eden")
        y = quartet.matmul(*q, *q, None, 1.0, torch.bfloat16)
        return [*q, *plain, *transposed, *both, *again, y]

    real = run(torch.randn(shape), SEEDS)
    with FakeTensorMode() as mode:
        fake = run(mode.from_tensor(torch.randn(shape)), mode.from_tensor(SEEDS))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulation_is_one_rounding_of_the_float32_sum(dtype: torch.dtype) -> None:
    """An output rounded before it is scaled, or a scale folded in inexactly, shows as 1.4 to 1.9 times the error of one rounding."""
    a, b, bias = packed(256, 512), packed(192, 512), torch.randn(192)
    y = quartet.matmul(*a, *b, bias, 1 / 128, dtype).double()
    exact = reference.matmul(Quantized(*a), Quantized(*b), 1 / 128) + bias.double()
    once = exact.to(dtype).double()
    assert float((y - exact).norm()) == pytest.approx(float((once - exact).norm()), rel=1e-3)


@pytest.mark.parametrize(("magnitude_a", "magnitude_b"), [(1e-30, 1e30), (1e-25, 1e-8), (1e18, 1e18), (1e-37, 1e37)])
def test_scales_far_from_one_neither_overflow_nor_vanish(magnitude_a: float, magnitude_b: float) -> None:
    a = quartet.quantize(torch.randn(16, 64) * magnitude_a, "four_over_six")
    b = quartet.quantize(torch.randn(16, 64) * magnitude_b, "four_over_six")
    y = quartet.matmul(*a, *b, None, 1.0, torch.float32)
    exact = reference.matmul(Quantized(*a), Quantized(*b))
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-6


def test_split_scale_halves_the_exponent_and_hands_nan_on() -> None:
    for x, y, scale in [(2.0**-100, 2.0**60, 1 / 128), (2.0**20, 2.0**21, 1.0), (2.0**-126, 2.0**-20, 1 / 128)]:
        fa, fb = reference_ops.split_scale(torch.tensor(x), torch.tensor(y), scale)
        assert float(fa.double() * fb.double()) == x * y * scale
        assert abs(torch.frexp(fa).exponent - torch.frexp(fb).exponent) <= 1
    assert reference_ops.split_scale(torch.tensor(float("nan")), torch.tensor(1.0), 1.0)[0].isnan()


def test_the_rank_changes_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    e = torch.randn(64, 64)
    alone = quartet.quantize_grad(e, SEEDS, 0, "ms_eden", False)
    monkeypatch.setattr(ops, "rank", lambda: 1)
    other = quartet.quantize_grad(e, SEEDS, 0, "ms_eden", False)
    assert not torch.equal(alone[0], other[0]), "another rotation, other codes"


def test_both_orientations_are_those_of_one_each() -> None:
    e = torch.randn(40, 130)
    expected = (*quartet.quantize_grad(e, SEEDS, 2, "ms_eden", False), *quartet.quantize_grad(e, SEEDS, 0, "ms_eden", True))
    for ours, theirs in zip(quartet.quantize_grad_both(e, SEEDS, 2, 0, "ms_eden"), expected, strict=True):
        assert torch.equal(ours.float(), theirs.float())


def test_autocast_around_a_product_changes_nothing() -> None:
    """It would round the operands and the sum of torch's own product, inside the operator, to bfloat16."""
    packed = (*quartet.quantize(torch.randn(32, 64), "four_over_six"), *quartet.quantize(torch.randn(48, 64), "four_over_six"))
    values = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    calls = (
        lambda: quartet.matmul(*packed, torch.ones(48) / 3, 1.0, torch.float32),
        lambda: quartet.matmul_values(*values, torch.ones(48) / 3, torch.float32),
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


def test_a_rule_without_kernels_is_its_formula_on_every_device(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def away_from_zero(x: torch.Tensor) -> Quantized:
        return reference.round_to_nearest(x, ties="away")

    monkeypatch.setattr(ops, "FORWARD_RULES", ("mine",))
    monkeypatch.setattr(ops, "WITHOUT_KERNELS", ("mine",))
    monkeypatch.setitem(reference.FORWARD_FORMULAS, "mine", away_from_zero)
    x = torch.randn(33, 70).mul(4).round().bfloat16()
    on_cpu = x.cpu()
    with torch.device("cpu"):
        expected = away_from_zero(on_cpu)
        assert not torch.equal(expected.codes, reference.round_to_nearest(on_cpu).codes)
    for codes, scales, tensor_scale in (quartet.quantize(x, "mine"), quartet.quantize_with_values(x, "mine")[:3]):
        assert torch.equal(codes.cpu(), expected.codes)
        assert torch.equal(scales.cpu().float(), expected.scales.float())
        assert tensor_scale.cpu() == expected.tensor_scale
    for values in (quartet.quantize_with_values(x, "mine")[3], quartet.quantize_values(x, "mine")):
        assert torch.equal(values.cpu().double(), expected.dequantize(torch.float64))


def test_an_empty_batch() -> None:
    q = quartet.quantize(torch.randn(0, 64), "four_over_six")
    w = packed(32, 64)
    assert quartet.matmul(*q, *w, None, 1.0, torch.float32).shape == (0, 32)
    left = quartet.quantize_grad(torch.randn(0, 32), SEEDS, 0, "ms_eden", True)
    right = quartet.requantize(*q, 64, SEEDS, 0, "ms_eden")
    dw = quartet.matmul(*left, *right, None, 1 / 128, torch.float32)
    assert torch.equal(dw, torch.zeros(32, 64))
