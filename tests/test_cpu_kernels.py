"""The C++ kernels equal `reference_ops` bit for bit: codes, scale bytes and tensor scale, for every value, shape, stride and dtype.

There is no tolerance in this file but for the order in which a product is summed (`test_matmul_precision_setting_is_harmless`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quartet_compile.kernels import cpu, philox, reference_ops
from quartet_compile.kernels.cpu import build
from quartet_compile.kernels.format import Quantized

COMPILER = build.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

SHAPES = [(1, 1), (1, 16), (16, 1), (37, 70), (130, 257), (300, 128), (17, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = torch.tensor([7, -1, 2**62 + 12345, -(2**63)])

Packed = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUARTET_CPU_KERNELS", raising=False)


def assert_same(ours: Packed, expected: Packed) -> None:
    for name, a, b in zip(("codes", "scales", "tensor_scale"), ours, expected, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        if name == "tensor_scale":
            assert torch.equal(a, b) or (a.isnan() and b.isnan()), f"tensor_scale {a.item()!r}, expected {b.item()!r}"
        else:
            wrong = a.view(torch.uint8) != b.view(torch.uint8)
            assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} {name} differ, first at {wrong.nonzero()[0].tolist()}"


def check_all(x: Tensor, index: int = 0, rank: int = 0) -> None:
    """All three quantizers on x, in both orientations."""
    for operand in (x, x.t()):
        packed = reference_ops.quantize(operand, "four_over_six")
        assert_same(cpu.quantize(operand, "four_over_six"), packed)
        columns = operand.shape[1]
        assert_same(
            cpu.requantize(*packed, columns, SEEDS, index, "ms_eden", rank),
            reference_ops.requantize(*packed, columns, SEEDS, index, "ms_eden", rank),
        )
    for transpose in (False, True):
        assert_same(
            cpu.quantize_grad(x, SEEDS, index, "ms_eden", transpose, rank),
            reference_ops.quantize_grad(x, SEEDS, index, "ms_eden", transpose, rank),
        )


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _outliers(x: Tensor) -> Tensor:
    return torch.where(x > 1.5, x * 1e5, x)


def _zero_groups(x: Tensor) -> Tensor:
    groups = torch.arange(x.shape[1]) // 16 % 2 == 0
    return torch.where(groups, torch.where(x > 0, 0.0, -0.0), x)


def _ties(x: Tensor) -> Tensor:
    """Multiples of 1/8 up to 6: with a group scale of 1 every midpoint of the grid is among them."""
    return (x * 16).round().clamp(-48, 48) / 8


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "zero": torch.zeros_like,
    "minus_zero": lambda x: -torch.zeros_like(x),
    "all_equal": lambda x: torch.full_like(x, -0.3),
    "zero_groups": _zero_groups,
    "outliers": _outliers,
    "ties": _ties,
    "wide": lambda x: torch.sign(x) * 10.0 ** (x * 8),
    "very_wide": lambda x: torch.sign(x) * 10.0 ** (x * 16).clamp(-45, 38),
    "1e38": lambda x: x.clamp(-3, 3) * 1e38,
    "3e38": lambda x: torch.where(x > 0, 3e38, -3e38),
    "1e36": lambda x: x * 1e36,
    "1e-30": lambda x: x * 1e-30,
    "1e-38": lambda x: x * 1e-38,
    "subnormal": lambda x: x * 1e-42,
    "smallest": lambda x: torch.sign(x) * (x.abs() * 2).floor() * 2.0**-149,
    "one_smallest": lambda x: torch.zeros_like(x).index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(2.0**-149)),
}


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_and_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_all(normal(*shape).to(dtype))


@needs_compiler
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 70), (48, 260)], ids=str)
def test_every_kind_of_value(values: str, shape: tuple[int, int]) -> None:
    check_all(VALUES[values](normal(*shape)))


@needs_compiler
@pytest.mark.parametrize("values", ["zero_groups", "outliers", "wide", "1e-38", "1e38", "ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kinds_of_values_in_16_bits(values: str, dtype: torch.dtype) -> None:
    """In float16 most of these over- or underflow: a NaN tensor scale or zeros."""
    check_all(VALUES[values](normal(37, 70)).to(dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """All 65536 bit patterns but the non-finite, sorted in groups of like size, then one group a matrix so that each is seen in full."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.where(torch.isfinite(x), x, torch.zeros((), dtype=dtype)).view(-1, 16)
    check_all(x)
    for first in range(0, 4096, 16):
        block = x[first : first + 16]
        assert_same(cpu.quantize(block, "four_over_six"), reference_ops.quantize(block, "four_over_six"))


@needs_compiler
def test_numbers_beside_every_rounding_threshold() -> None:
    """A group of maximum 6 and elements one unit in the last place around the midpoints and grid points, in many binades."""
    points = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6])
    near = torch.stack((points, torch.nextafter(points, points * 0), torch.nextafter(points, points * 0 + 6)), dim=1).flatten()
    # Group maxima beside the E4M3 midpoints: 6 * (8 + n / 2) / 8 and one unit around it.
    tops = 6 * (8 + torch.arange(17) / 2) / 8
    tops = torch.stack((tops, torch.nextafter(tops, tops * 0), torch.nextafter(tops, tops * 9)), dim=1).flatten()
    rows = []
    for top in tops:
        for chunk in near.split(15):
            scaled = chunk * top / 6
            rows.append(torch.cat((top.view(1), scaled, torch.zeros(15 - len(chunk)))))
    x = torch.stack(rows)
    for exponent in (-150, -130, -126, -40, -12, -9, -6, -3, 0, 5, 60, 120):
        scaled = x * 2.0 ** max(exponent, -120) * 2.0 ** min(exponent + 120, 0)
        check_all(scaled)
        check_all(torch.cat((scaled, torch.full((1, 16), 1000.0))))  # another tensor scale: group scales go subnormal and to zero


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_makes_the_tensor_scale_nan(bad: float, dtype: torch.dtype) -> None:
    for row, column in [(0, 0), (36, 69), (36, 0), (0, 69), (17, 33)]:
        x = normal(37, 70).to(dtype)
        x[row, column] = bad
        for result in (
            cpu.quantize(x, "four_over_six"),
            cpu.quantize_grad(x, SEEDS, 0, "ms_eden", False, 0),
            cpu.quantize_grad(x, SEEDS, 0, "ms_eden", True, 0),
        ):
            assert result[2].isnan()
            assert not result[0].any()
            assert not result[1].view(torch.uint8).any()
        check_all(x)


@needs_compiler
def test_negative_nan_and_a_matrix_of_nan() -> None:
    x = normal(20, 40)
    x[3, 5] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    check_all(x)
    check_all(torch.full((20, 40), float("nan")))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_stride(dtype: torch.dtype) -> None:
    big = normal(300, 410).to(dtype)
    views = {
        "slice of columns": big[:, 3:140],
        "slice of rows": big[5:70],
        "steps": big[::2, 1::3],
        "transposed steps": big.t()[2::5, ::3],
        "one row for all": big[:1, :70].expand(40, 70),
        "one column for all": big[:40, :1].expand(40, 70),
        "one number for all": big[0, 0].expand(40, 70),
        "overlapping windows": big.flatten().as_strided((40, 70), (2, 3), 1),
        "middle of a batch": big.view(3, 100, 410)[:, 1],
    }
    for view in views.values():
        check_all(view)


@needs_compiler
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("rank", [0, 1, 1000])
def test_every_seed_and_rank(index: int, rank: int) -> None:
    check_all(normal(50, 150), index, rank)


@needs_compiler
def test_a_scale_on_the_grid_stays_for_the_smallest_random_number() -> None:
    """With these seeds the first group draws u = 0 (found by search): rounding up iff u < 0 must leave the scale of zeros at zero."""
    seeds = torch.tensor([2210430, 14091733, 17152140])
    for index in range(3):
        assert philox.uniforms(int(seeds[index]), 1, 1, philox.STREAM_GRADIENT).item() == 0
        for x in (torch.zeros(1, 128), torch.zeros(1, 128).index_fill(1, torch.tensor(0), 1.0)):
            expected = reference_ops.quantize_grad(x, seeds, index, "ms_eden", False, 0)
            assert_same(cpu.quantize_grad(x, seeds, index, "ms_eden", False, 0), expected)


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    assert_same(cpu.quantize(x, "four_over_six"), reference_ops.quantize(x, "four_over_six"))
    for transpose in (False, True):
        assert_same(
            cpu.quantize_grad(x, SEEDS, 0, "ms_eden", transpose, 0), reference_ops.quantize_grad(x, SEEDS, 0, "ms_eden", transpose, 0)
        )


@needs_compiler
def test_threads_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    x = normal(130, 257)
    product = reference_ops.quantize(x, "four_over_six")
    expected = Quantized(*product).dequantize_unscaled(torch.float32)
    kernels = build.load()
    assert kernels is not None
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert cpu._threads(x.numel()) == threads
            check_all(x)
            check_all(normal(1, 3))  # fewer tiles than threads
            assert torch.equal(cpu._dequantize(kernels, product[0], product[1], 1.0), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_requantize_and_matmul_take_strided_packed_matrices() -> None:
    codes, scales, g = reference_ops.quantize(normal(40, 70), "four_over_six")
    strided = (codes.t().contiguous().t(), scales.t().contiguous().t(), g)
    assert not strided[0].is_contiguous()
    assert_same(
        cpu.requantize(*strided, 70, SEEDS, 0, "ms_eden", 0), reference_ops.requantize(codes, scales, g, 70, SEEDS, 0, "ms_eden", 0)
    )
    b = reference_ops.quantize(normal(30, 70), "four_over_six")
    assert torch.equal(
        cpu.matmul(*strided, *b, None, 1.0, torch.float32), reference_ops.matmul(codes, scales, g, *b, None, 1.0, torch.float32)
    )


# ---------------------------------------------------------------- the product


@needs_compiler
def test_every_code_and_scale_byte_dequantizes() -> None:
    """Each of the 256 scale bytes, NaN and negative ones included, with each of the 16 codes at each of the 16 places."""
    nibbles = (torch.arange(16).view(16, 1) + torch.arange(16)) % 16
    codes = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256).repeat_interleave(16).to(torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    kernels = build.load()
    assert kernels is not None
    for factor in (1.0, 2.0**-140, 2.0**120, float("nan")):
        expected = Quantized(codes, scales, torch.tensor(1.0)).dequantize_unscaled(torch.float32) * factor
        result = cpu._dequantize(kernels, codes, scales, factor)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(), expected.nan_to_num())
        assert torch.equal(torch.signbit(result)[~expected.isnan()], torch.signbit(expected)[~expected.isnan()])


@needs_compiler
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_matmul(bias_dtype: torch.dtype | None, out_dtype: torch.dtype) -> None:
    for m, n, k in [(1, 1, 1), (37, 70, 130), (16, 300, 257), (0, 5, 16), (5, 0, 16)]:
        a, b = (reference_ops.quantize(x, "four_over_six") for x in (normal(m, k), normal(n, k)))
        bias = None if bias_dtype is None else normal(n).to(bias_dtype)
        for scale in (1.0, 1 / 128):
            result = cpu.matmul(*a, *b, bias, scale, out_dtype)
            assert result.dtype == out_dtype
            assert torch.equal(result, reference_ops.matmul(*a, *b, bias, scale, out_dtype))


@needs_compiler
@pytest.mark.parametrize("scale", [1.0, 1 / 128])
def test_matmul_folds_every_pair_of_tensor_scales(scale: float) -> None:
    extremes = [0.0, 2.0**-149, 2.0**-140, 2.0**-126, 2.0**-63, 2.0**-11, 1.0, 2.0**60, 2.0**120]
    extremes += [float("nan"), float("inf")]
    codes, scales, _ = reference_ops.quantize(normal(6, 20), "four_over_six")
    for first in extremes:
        for second in extremes:
            operands = (codes, scales, torch.tensor(first), codes, scales, torch.tensor(second))
            result = cpu.matmul(*operands, None, scale, torch.float32)
            expected = reference_ops.matmul(*operands, None, scale, torch.float32)
            assert torch.equal(result.isnan(), expected.isnan()), (first, second)
            assert torch.equal(result.nan_to_num(), expected.nan_to_num()), (first, second)


@needs_compiler
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_setting_is_harmless(precision: str) -> None:
    """Operands fit bfloat16: only the order of the float32 sum may change, whose error is at most K units of 2^-24 of sum |a||b|."""
    k = 400
    a, b = (reference_ops.quantize(normal(n, k), "four_over_six") for n in (60, 70))
    exact_a, exact_b = (Quantized(*x).dequantize(torch.float64) for x in (a, b))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        result = cpu.matmul(*a, *b, None, 1.0, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    bound = k * 2.0**-24 * (exact_a.abs() @ exact_b.abs().t())
    assert ((result - exact_a @ exact_b.t()).abs() <= bound).all()
