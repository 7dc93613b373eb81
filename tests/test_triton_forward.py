"""The deterministic quantizer equals `reference_ops.quantize`, its values `value_ops.values_of`: bit for bit, whichever pass wrote them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from triton_support import BFLOAT16_FIRST, MATRICES, SHAPES, Packed, assert_equal, first, matrix, on_devices

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import decode_e2m1, unpack
from quartet_compile.kernels.reference import round_e2m1
from quartet_compile.kernels.value_ops import values_of

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from quartet_compile.kernels.triton_kernels import forward, launch  # noqa: E402
from quartet_compile.kernels.triton_kernels.forward_native import native_candidate, scaled_elements  # noqa: E402
from quartet_compile.kernels.triton_kernels.forward_words import word_candidate  # noqa: E402

BLOCK = forward.BLOCK


def assert_equals_the_reference(x: Tensor, rule: str = "four_over_six") -> Packed:
    """Both forms of the kernel. Returns the reference's result."""
    expected = reference_ops.quantize(x.cpu(), rule)
    *packed, values = forward.quantize_with_values(x, rule)
    assert_equal(packed, expected)
    assert_equal(forward.quantize(x, rule), expected)
    expected_values = values_of(*expected)
    assert values.shape == expected_values.shape
    assert values.dtype == torch.bfloat16
    assert values.is_contiguous()
    values = values.cpu()
    same = (values.view(torch.int16) == expected_values.view(torch.int16)) | (values.isnan() & expected_values.isnan())
    assert same.all(), f"{int((~same).sum())}/{same.numel()} values differ"
    return expected


# ---------------------------------------------------------------- one candidate


@triton.jit
def candidate_kernel(x, scales, q, errors, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = ()
    for j in tl.static_range(8):
        w = w + (tl.load(x + n * 8 + j),)  # noqa: RUF005
    rounded, error = word_candidate(w, -tl.load(scales + n))
    for j in tl.static_range(8):
        tl.store(q + n * 8 + j, rounded[j])
    tl.store(errors + n, error)


@triton.jit
def native_candidate_kernel(x, scales, codes, errors, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = ()
    for j in tl.static_range(8):
        w = w + (tl.load(x + n * 8 + j),)  # noqa: RUF005
    v = scaled_elements(w, tl.full((BLOCK,), 1.0, tl.float32), n >= 0)
    front, back, error = native_candidate(v, -tl.load(scales + n))
    tl.store(codes + n * 2, front)
    tl.store(codes + n * 2 + 1, back)
    tl.store(errors + n, error)


def every_number_and_every_scale(peak: float) -> tuple[Tensor, Tensor]:
    """All scales of four bits that a group's maximum in [peak, 2 * peak) leads to, and for each of them all numbers of eight bits that are
    at most 17/16 * 6 of it and not far below the smallest boundary: x [n, 16], scales [n]."""
    six = torch.arange(11, 23) / 16
    scales = torch.cat([six[(six <= 1) | (six * 8 % 1 == 0)], torch.arange(9, 17) / 8]).unique()
    assert scales.numel() == 14
    mantissas = torch.arange(128, 256) / 32
    numbers = torch.cat([mantissas * 2.0**-k for k in range(12)])
    numbers = torch.cat([numbers, -numbers, torch.tensor([0.0, -0.0, 2.0**-100, -(2.0**-133)])])
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 4096)).view(-1, 16)
    x = numbers.repeat(14, 1)
    s = scales.repeat_interleave(len(numbers))
    return torch.where(x.abs() <= 6.375 * s[:, None], x, 0.0) * (peak / 4), s * (peak / 4)


def nearest_and_error(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    magnitudes = round_e2m1(x.abs() / s[:, None])
    difference = magnitudes * s[:, None] - x.abs()
    squares = difference * difference
    while squares.shape[1] > 1:
        squares = squares[:, : squares.shape[1] // 2] + squares[:, squares.shape[1] // 2 :]
    return torch.copysign(magnitudes, x), squares.squeeze(1)


@on_devices
def test_the_reciprocal_decides_as_the_division_does(device):
    x, s = every_number_and_every_scale(4.0)
    words = x.bfloat16().to(device).view(torch.int32)
    q = torch.empty_like(words)
    errors = torch.empty(len(s), device=device)
    candidate_kernel[(len(s) // 256,)](words, s.to(device), q, errors, 256)
    nearest, squares = nearest_and_error(x, s)
    assert torch.equal(q.view(torch.bfloat16).float().cpu(), nearest)
    assert torch.equal(errors.cpu(), squares)


@on_devices
def test_so_do_the_conversions_of_a_native_candidate(device):
    """Signs of zeros included, which a native candidate keeps itself."""
    if device == "cuda" and not launch.target_of(torch.empty(0, device=device)).native:
        pytest.skip("no FP4 conversions")
    x, s = every_number_and_every_scale(2.0)
    codes = torch.empty((len(s), 2), dtype=torch.int32, device=device)
    errors = torch.empty(len(s), device=device)
    native_candidate_kernel[(len(s) // 256,)](x.bfloat16().to(device).view(torch.int32), s.to(device), codes, errors, 256)
    nearest, squares = nearest_and_error(x, s)
    assert torch.equal(decode_e2m1(unpack(codes.cpu().view(torch.uint8)), torch.float32).view(torch.int32), nearest.view(torch.int32))
    assert torch.equal(errors.cpu(), squares)


def float32_nearest(x: Fraction) -> Fraction:
    """The float32 number next to x, ties to even: of magnitude 2^-40 or more, or 0."""
    if x == 0:
        return x
    spacing = Fraction(2) ** (math.frexp(float(x))[1] - 24)
    return round(x / spacing) * spacing


def test_the_stretch_is_exact_whatever_the_neighbouring_reciprocal():
    """`forward_native._stretch` in rational numbers, with reciprocals that are up to four of their last bits away from the nearest one; and
    what its tie argument says, that v + v * h is a boundary where v / s is."""
    for s in map(Fraction, every_number_and_every_scale(2.0)[1].unique().tolist()):
        h = float32_nearest(1 / s - 1)
        for step in range(-4, 5):
            r = float32_nearest(1 / s) * (1 + Fraction(step, 2**24))
            first = float32_nearest((1 - s) * r)
            assert float32_nearest(float32_nearest(1 - s - s * first) * r + first) == h
        for boundary in map(Fraction, (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
            assert float32_nearest(boundary * s * (1 + h)) == boundary


# ---------------------------------------------------------------- whole matrices


@on_devices
@pytest.mark.parametrize("rule", first("four_over_six", "nearest"))
@pytest.mark.parametrize("kind", first(*sorted(MATRICES, key=("gauss", "wide", "sparse", "ties", "outliers", "zero").index), fast=3))
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_equals_the_reference(device, dtype, kind, rule):
    for shape in ((37, 70), (300, 64), *(SHAPES if kind == "gauss" else ())):
        assert_equals_the_reference(matrix(kind, shape, dtype, device), rule)


@on_devices
@pytest.mark.parametrize("case", first("gauss", "ties", "nan", "wide", "sparse", "zero", "huge", "tiny", fast=3))
def test_the_arithmetic_of_fp4_conversions_changes_nothing(device, case, monkeypatch):
    if device == "cuda":
        pytest.skip("a GPU runs the one that suits it")
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target(0, native=True, permuted=False, processors=1))
    factor = {"huge": 3e38, "tiny": 1e-37}.get(case, 1.0)
    x = (matrix(case if case in MATRICES else "wide", (75, 64), torch.float64, device) * factor).clamp(-3e38, 3e38).bfloat16()
    if case == "nan":
        x[17, 33] = math.nan
    for rule in ("four_over_six", "nearest"):
        assert_equals_the_reference(x, rule)


@on_devices
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_several_chunks(device, dtype, monkeypatch):
    """Programs of the second pass that look at chunk after chunk, the last one in part of a block."""
    monkeypatch.setattr(forward, "CHUNK", 2 * BLOCK)
    assert_equals_the_reference(matrix("wide", (2 * BLOCK + 21, 48), dtype, device))


@on_devices
@pytest.mark.parametrize(
    "factor", first(3e38, 2.0**-80, 1e-45, 1e38, 1e34, 2.0**111, 2.0**110, 1e30, 1e-20, 2.0**-79, 1e-30, 1e-37, 1e-42, fast=3)
)
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_ends_of_the_range(device, dtype, factor):
    x = (matrix("wide", (19, 48), torch.float64, device).clamp(-1, 1) * factor).to(dtype)
    assert_equals_the_reference(x)
    x[-1] = torch.tensor(1e-4, dtype=dtype) * x[-1]
    assert_equals_the_reference(x, "nearest")


@on_devices
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_strides_and_alignment(device, dtype):
    base = matrix("gauss", (150, 144), dtype, device)
    views = {
        "transposed": base[:48, :].t(),
        "every_other": base[:40, ::2],
        "inner": base[1:34, 3:74],
        "one_row_expanded": base[:1, :48].expand(21, 48),
        "one_number_expanded": base[0, 0].expand(17, 32),
        "not_aligned": base.flatten()[1 : 1 + 40 * 64].view(40, 64),
        "aligned_to_4_bytes": base.flatten()[2 : 2 + 40 * 64].view(40, 64),
    }
    for x in views.values():
        assert_equals_the_reference(x)


# ---------------------------------------------------------------- groups that the second pass quantizes again


@on_devices
@pytest.mark.parametrize("rule", first("four_over_six", "nearest"))
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_some_blocks_have_subnormal_scales(device, dtype, rule):
    """One group in most stretches of REPAIRED groups is small, by up to 36 binades, so that some need the second pass and others do not."""
    x = matrix("gauss", (40, BLOCK * 16 // 2), dtype, device).view(-1, 16)
    for stretch in range(len(x) // forward.REPAIRED):
        x[stretch * forward.REPAIRED + 37 * stretch % 256] *= 2.0**-stretch
    x = x.view(40, -1)
    _, scales, _ = assert_equals_the_reference(x, rule)
    small = (scales.view(torch.uint8) < 8).sum()
    assert 2 <= small < 20


@on_devices
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_around_the_smallest_normal_scale(device, dtype):
    """Every mantissa of a group's maximum, from normal scales through all subnormal ones to scales that would round to zero."""
    peaks = torch.cat([torch.arange(128, 256) / 256 * 2.0**-k for k in range(1, 9)]).to(device)
    noise = matrix("gauss", (len(peaks), 16), torch.float32, device)
    x = noise / noise.abs().amax(1, keepdim=True) * peaks[:, None]
    x[0, 3] = 250 * 6.0
    _, scales, g = assert_equals_the_reference(x.to(dtype))
    assert g == 1
    assert {*range(1, 16)} < {*scales.view(torch.uint8).flatten().tolist()}


@on_devices
@pytest.mark.slow
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_blocks_of_very_different_size(device, dtype):
    """Whole blocks far below the tensor's maximum, zero blocks, and 100 binades in one block."""
    x = matrix("gauss", (6 * BLOCK, 16), dtype, device)
    for block, factor in enumerate((1.0, 2.0**-10, 2.0**-40, 0.0, 2.0**-110)):
        x[block * BLOCK : (block + 1) * BLOCK] *= factor
    x[5 * BLOCK :] *= torch.exp2(-torch.arange(0, BLOCK, device=device).remainder(100).float()).to(dtype)[:, None]
    assert_equals_the_reference(x)
    assert_equals_the_reference(x[BLOCK:])


@on_devices
@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-75, -20, 0, 90])
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_errors_far_below_the_maximum(device, dtype, exponent):
    """Squares that float32 cannot hold in some unit: elements on the grid of both candidates beside ones that are 2^20 to 2^75 smaller."""
    generator = torch.Generator().manual_seed(exponent)
    grid = torch.tensor([0.0, 1.5, 3.0, 6.0, -3.0, -6.0])[torch.randint(0, 6, (2 * BLOCK, 16), generator=generator)]
    grid[:, 5] = 6.0
    exponents = torch.randint(20, 76, (2 * BLOCK, 16), generator=generator)
    small = torch.randn((2 * BLOCK, 16), generator=generator) * torch.exp2(-exponents.float())
    x = torch.where(torch.rand((2 * BLOCK, 16), generator=generator) < 0.5, grid, small)
    x *= torch.exp2(-torch.randint(0, 8, (2 * BLOCK, 1), generator=generator).float())
    assert_equals_the_reference((x * 2.0**exponent).to(dtype).to(device))


# ---------------------------------------------------------------- numbers that are not finite, empty matrices, wrong arguments


@on_devices
@pytest.mark.parametrize("where", first(((17, 33), math.nan), ((0, 0), math.inf), ((36, 63), -math.inf), ((36, 0), math.nan)))
@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_a_number_that_is_not_finite_makes_everything_nan(device, dtype, columns, where):
    at, bad = where
    x = matrix("gauss", (37, columns), dtype, device)
    x[at] = bad
    codes, scales, g = assert_equals_the_reference(x)
    assert g.isnan()
    assert not codes.any()
    assert not scales.view(torch.uint8).any()
    assert forward.quantize_with_values(x, "four_over_six")[3].isnan().all()


@on_devices
@pytest.mark.parametrize("kind", ["gauss", "subnormal scales", "not finite", "empty"])
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_values_alone(device, dtype, kind):
    """The same numbers as beside the codes, those that the second pass makes again, too."""
    x = matrix("gauss", (0 if kind == "empty" else 37, 70 if dtype == torch.float32 else 64), dtype, device)
    if kind == "subnormal scales":
        x[:20] *= 2.0**-14
    if kind == "not finite":
        x[3, 5] = math.inf
    expected = forward.quantize_with_values(x, "four_over_six")[3]
    assert torch.equal(forward.quantize_values(x, "four_over_six").view(torch.int16), expected.view(torch.int16))


@on_devices
@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)])
def test_empty_matrices(device, shape):
    assert_equals_the_reference(torch.empty(shape, dtype=torch.bfloat16, device=device))


def test_rules_that_do_not_exist():
    with pytest.raises(ValueError, match="no deterministic rule"):
        forward.quantize_with_values(torch.zeros(2, 16), "stochastic")
    with pytest.raises(ValueError, match="no deterministic rule"):
        forward.quantize(torch.zeros(2, 16), "ms_eden")
