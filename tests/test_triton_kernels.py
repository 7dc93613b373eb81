"""The Triton kernels equal `reference_ops`: codes, scales and tensor scales byte for byte.

Without a GPU they run in Triton's interpreter. That must be on before triton is imported, so one test runs this file again in a process of
its own; there, and with ``-m gpu`` on a GPU, the same tests are collected with a device to run on.

The reference always runs on the CPU: on a GPU torch divides by a Python number by multiplying with its reciprocal, which is not IEEE
division.

What may differ, and by how much. The deterministic rules: nothing. The rotated operands: a rotation adds 128 numbers, and its float32
result depends on the order of the additions, by about 1e-6 of the group's maximum. A code flips where that crosses one of 7 midpoints, or
zero, with a density of at most 0.3 a unit each: 8 * 0.3 * 2 * 3e-6 = 1.4e-5 of the elements. A scale differs where the random number falls
into the gap of its probability, at most 16 * 1e-6, or where a code of its group flipped. Sums of small integers are exact: there, nothing
may differ at all. Signs of zeros: see `test_rotated_zeros`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from triton_support import EXACT_SUMS, MATRICES, Differences, Packed, differences, matrix

from quartet_compile.kernels import philox, reference, reference_ops
from quartet_compile.kernels.format import Quantized, ceil_to, unpack

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from quartet_compile.kernels import triton_kernels  # noqa: E402
from quartet_compile.kernels.triton_kernels import launch, numbers, random  # noqa: E402
from quartet_compile.kernels.triton_kernels.dequantize import dequantize  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
on_devices = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=NEEDS_GPU)])

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((37, 70), (1, 16), (16, 1), (130, 257), (128, 128))
SEEDS = (12345, -(2**62) - 977, 2**63 - 1)


def seeds_on(device: str) -> Tensor:
    return torch.tensor(SEEDS, dtype=torch.int64, device=device)


def reference_grad(e: Tensor, index: int, transpose: bool, rank: int) -> Packed:
    return reference_ops.quantize_grad(e.cpu(), seeds_on("cpu"), index, "ms_eden", transpose, rank)


def packed_on(x: Tensor, device: str) -> Packed:
    """The reference's four-over-six of x, moved to `device`."""
    codes, scales, g = reference_ops.quantize(x.cpu(), "four_over_six")
    return codes.to(device), scales.view(torch.uint8).to(device).view(torch.float8_e4m3fn), g.to(device)


def assert_equal(ours: Packed, expected: Packed) -> None:
    found = differences(ours, expected)
    assert (found.codes, found.scales, found.tensor_scale) == (0, 0, False), str(found)


def assert_near_ties_only(found: Differences) -> None:
    print(found)
    assert not found.tensor_scale, str(found)
    assert found.codes <= 1.4e-5 * found.elements + 2, str(found)
    assert found.scales <= 1.6e-5 * found.groups + found.codes + 1, str(found)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_kernels_in_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# ---------------------------------------------------------------- numbers


@triton.jit
def _round_kernel(x, uniforms, nibbles, values, nearest, nearest_values, stochastic, n, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < n, other=0.0)
    byte, value, _ = numbers.e2m1_pair(y, tl.zeros((BLOCK,), tl.float32), NATIVE)
    tl.store(nibbles + at, byte.to(tl.uint8), mask=at < n)
    tl.store(values + at, value, mask=at < n)
    bits, value = numbers.e4m3_nearest(tl.abs(y))
    tl.store(nearest + at, bits.to(tl.uint8), mask=at < n)
    tl.store(nearest_values + at, value, mask=at < n)
    u = tl.load(uniforms + at, mask=at < n, other=0.0)
    tl.store(stochastic + at, numbers.e4m3_stochastic(tl.minimum(tl.abs(y), 448.0), u).to(tl.uint8), mask=at < n)


@on_devices
def test_rounding_of_every_float16_and_every_midpoint(device):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, torch.tensor((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1e-45, 3e38))))
    midpoints = torch.cat((midpoints, midpoints.nextafter(torch.tensor(0.0)), midpoints.nextafter(torch.tensor(math.inf))))
    x = torch.cat((x[x.isfinite()], midpoints, -midpoints))
    u = torch.randint(0, 2**24, x.shape, generator=torch.Generator().manual_seed(1)).float() * 2.0**-24
    u[::7] = 0
    nibbles, nearest, stochastic = (torch.empty(x.shape, dtype=torch.uint8, device=device) for _ in range(3))
    values, nearest_values = torch.empty_like(x, device=device), torch.empty_like(x, device=device)
    native = launch.target_of(nibbles).native
    _round_kernel[(triton.cdiv(x.numel(), 1024),)](
        x.to(device), u.to(device), nibbles, values, nearest, nearest_values, stochastic, x.numel(), native, 1024
    )
    magnitude = reference.round_e2m1(x.abs())
    expected = torch.copysign(magnitude, x)
    assert torch.equal(values.cpu().view(torch.int32), expected.view(torch.int32))
    codes = torch.searchsorted(torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)), magnitude).to(torch.uint8)
    assert torch.equal(nibbles.cpu(), codes | (x.signbit().to(torch.uint8) << 3))
    expected = reference.round_e4m3(x.abs())
    assert torch.equal(nearest_values.cpu(), expected)
    assert torch.equal(nearest.cpu(), expected.to(torch.float8_e4m3fn).view(torch.uint8))
    expected = reference.round_e4m3_stochastic(x.abs().clamp(max=448), u)
    assert torch.equal(stochastic.cpu(), expected.to(torch.float8_e4m3fn).view(torch.uint8))


@triton.jit(do_not_specialize=["index", "rank"])
def _random_kernel(seeds, index, rank, out, signs, FIRST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    seed = random.seed_of_rank(seeds, index, rank)
    row = tl.arange(0, ROWS)[:, None] + tl.zeros((ROWS, GROUPS), tl.int32)
    group = tl.arange(0, GROUPS)[None, :] + tl.zeros((ROWS, GROUPS), tl.int32)
    tl.store(out + row * GROUPS + group, random.uniform(seed, group, row + FIRST, random.STREAM_SAVED))
    j = tl.arange(0, 128)
    tl.store(signs + j, random.rotation_sign_bits(seed, j))


@on_devices
@pytest.mark.parametrize("index", range(len(SEEDS)))
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_random_numbers(device, index, rank):
    out, signs = torch.empty(16, 8, device=device), torch.empty(128, dtype=torch.int32, device=device)
    _random_kernel[(1,)](seeds_on(device), index, rank, out, signs, 100, 16, 8)
    seed = philox.seed_for_rank(SEEDS[index], rank)
    assert torch.equal(out.cpu(), philox.uniforms(seed, 116, 8, philox.STREAM_SAVED)[100:])
    assert torch.equal(1.0 - 2.0 * signs.cpu().float(), philox.rotation_signs(seed))


# ---------------------------------------------------------------- deterministic rules


@on_devices
@pytest.mark.parametrize("rule", ["four_over_six", "nearest"])
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_the_reference(device, dtype, kind, rule):
    for shape in SHAPES[:3] if kind != "gauss" else SHAPES:
        x = matrix(kind, shape, dtype, device)
        assert_equal(triton_kernels.quantize(x, rule), reference_ops.quantize(x.cpu(), rule))


@on_devices
@pytest.mark.parametrize("factor", [3e38, 1e30, 1e-30, 1e-37, 1e-42, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_at_the_ends_of_the_range(device, dtype, factor):
    x = (matrix("wide", (19, 48), torch.float64, device).clamp(-1, 1) * factor).to(dtype)
    assert_equal(triton_kernels.quantize(x, "four_over_six"), reference_ops.quantize(x.cpu(), "four_over_six"))


def strided_views(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    base = matrix("gauss", (150, 144), dtype, device)
    return {
        "transposed": base[:37, :].t(),
        "every_other": base[:40, ::2],
        "inner": base[1:34, 3:74],
        "one_row_expanded": base[:1, :40].expand(21, 40),
        "one_number_expanded": base[0, 0].expand(17, 33),
    }


@on_devices
@pytest.mark.parametrize("view", strided_views(torch.float32, "cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(device, dtype, view):
    x = strided_views(dtype, device)[view]
    assert_equal(triton_kernels.quantize(x, "four_over_six"), reference_ops.quantize(x.cpu(), "four_over_six"))
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on(device), 0, "ms_eden", transpose, 0)
        assert_near_ties_only(differences(ours, reference_grad(x, 0, transpose, 0)))


# ---------------------------------------------------------------- rotated operands


@on_devices
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", ["gauss", "outliers", "wide", "ties", "zero"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_grad_equals_the_reference(device, dtype, kind, transpose):
    for rank, shape in enumerate(SHAPES if kind == "gauss" else SHAPES[:2]):
        e = matrix(kind, shape, dtype, device, seed=rank)
        ours = triton_kernels.quantize_grad(e, seeds_on(device), rank % 3, "ms_eden", transpose, rank)
        expected = reference_grad(e, rank % 3, transpose, rank)
        if kind in EXACT_SUMS:
            assert_equal(unsigned_zeros(ours), unsigned_zeros(expected))
        else:
            assert_near_ties_only(differences(ours, expected))


def unsigned_zeros(packed: Packed) -> Packed:
    """Code 8, minus zero, replaced by 0."""
    low, high = packed[0] & 15, packed[0] >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4), *packed[1:]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_zeros(device, dtype):
    """A sum that cancels exactly is +0 here. The reference's butterflies can make it -0 where the data itself has zeros: the one
    difference in signs that is not a near-tie, and it changes no value."""
    e = matrix("sparse", (37, 200), dtype, device)
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(e, seeds_on(device), 1, "ms_eden", transpose, 0)
        expected = reference_grad(e, 1, transpose, 0)
        assert_equal(unsigned_zeros(ours), unsigned_zeros(expected))
        other_sign = unpack(ours[0].cpu()) != unpack(expected[0])
        assert (unpack(ours[0].cpu())[other_sign] == 0).all()


@on_devices
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e36), (torch.float32, 1e-32), (torch.bfloat16, 1e36), (torch.bfloat16, 1e-37)]
)
def test_gradients_of_extreme_size(device, dtype, factor):
    e = (matrix("gauss", (37, 70), torch.float64, device) * factor).to(dtype)
    ours = triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", False, 0)
    assert_near_ties_only(differences(ours, reference_grad(e, 0, False, 0)))


@on_devices
@pytest.mark.parametrize("kind", ["gauss", "outliers", "wide", "ties", "sparse", "zero"])
def test_requantize_equals_the_reference(device, kind):
    for rank, shape in enumerate(SHAPES if kind == "gauss" else SHAPES[:3]):
        packed = packed_on(matrix(kind, shape, torch.float32, device), device)
        ours = triton_kernels.requantize(*packed, shape[1], seeds_on(device), rank % 3, "ms_eden", rank)
        expected = reference_ops.requantize(*(t.cpu() for t in packed), shape[1], seeds_on("cpu"), rank % 3, "ms_eden", rank)
        if kind in EXACT_SUMS:
            assert_equal(unsigned_zeros(ours), unsigned_zeros(expected))
        else:
            assert_near_ties_only(differences(ours, expected))


@on_devices
@pytest.mark.parametrize("permuted", [False, True])
def test_the_permutation_of_columns_changes_nothing(device, permuted, monkeypatch):
    if device == "cuda":
        pytest.skip("a GPU runs the one that suits it")
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target(0, native=False, permuted=permuted, processors=1))
    e = matrix("gauss", (37, 200), torch.bfloat16, device)
    ours = triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", True, 0)
    assert_near_ties_only(differences(ours, reference_grad(e, 0, True, 0)))


# ---------------------------------------------------------------- numbers that are not finite, empty matrices, wrong arguments


@on_devices
@pytest.mark.parametrize(("at", "bad"), [((17, 33), math.nan), ((0, 0), math.inf), ((36, 69), -math.inf), ((36, 0), math.nan)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_makes_everything_nan(device, dtype, at, bad):
    x = matrix("gauss", (37, 70), dtype, device)
    x[at] = bad
    results = [(triton_kernels.quantize(x, "four_over_six"), reference_ops.quantize(x.cpu(), "four_over_six"))]
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on(device), 0, "ms_eden", transpose, 0)
        results.append((ours, reference_grad(x, 0, transpose, 0)))
    for ours, expected in results:
        assert ours[2].isnan()
        assert not ours[0].any()
        assert not ours[1].view(torch.uint8).any()
        assert_equal(ours, expected)
    nan_packed = results[0][0]
    assert triton_kernels.requantize(*nan_packed, 70, seeds_on(device), 0, "ms_eden", 0)[2].isnan()
    other = packed_on(matrix("gauss", (5, 70), dtype, device), device)
    assert triton_kernels.matmul(*nan_packed, *other, None, 1.0, torch.bfloat16).isnan().all()
    assert triton_kernels.matmul(*other, *nan_packed, None, 1.0, torch.float32).isnan().all()


@on_devices
def test_infinities_of_both_signs_in_one_rotated_block(device):
    e = matrix("gauss", (3, 128), torch.bfloat16, device)
    e[1, 5], e[1, 90] = math.inf, -math.inf
    assert_equal(triton_kernels.quantize_grad(e, seeds_on(device), 0, "ms_eden", False, 0), reference_grad(e, 0, False, 0))


@on_devices
@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)])
def test_empty_matrices(device, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    packed = triton_kernels.quantize(x, "four_over_six")
    assert_equal(packed, reference_ops.quantize(x.cpu(), "four_over_six"))
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on(device), 0, "ms_eden", transpose, 0)
        assert_equal(ours, reference_grad(x, 0, transpose, 0))
    again = triton_kernels.requantize(*packed, shape[1], seeds_on(device), 0, "ms_eden", 0)
    assert again[0].shape == (shape[1], ceil_to(shape[0], 128) // 2)
    other = triton_kernels.quantize(torch.ones(3, shape[1], dtype=torch.bfloat16, device=device), "four_over_six")
    bias = torch.ones(3, device=device)
    y = triton_kernels.matmul(*packed, *other, bias, 1.0, torch.float32)
    assert y.shape == (shape[0], 3)
    assert (y == 1).all()


def test_rules_that_do_not_exist():
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="no deterministic rule"):
        triton_kernels.quantize(x, "stochastic")
    with pytest.raises(ValueError, match="no backward rule"):
        triton_kernels.quantize_grad(x, seeds_on("cpu"), 0, "nearest", False, 0)


# ---------------------------------------------------------------- products


@on_devices
@pytest.mark.parametrize(
    ("a_exponent", "b_exponent", "scale"), [(0, 0, 1.0), (-7, 3, 1 / 128), (-100, -20, 1.0), (60, 59, 1 / 128), (-126, 118, 1.0)]
)
def test_dequantized_operands_are_exact(device, a_exponent, b_exponent, scale):
    codes, scales, _ = packed_on(matrix("wide", (37, 70), torch.float32, device), device)
    ga, gb = (torch.tensor(2.0**e, device=device) for e in (a_exponent, b_exponent))
    factors = reference_ops.split_scale(ga.cpu(), gb.cpu(), scale)
    for second in (False, True):
        ours = dequantize(codes, scales, ga, gb, round(math.log2(scale)), second)
        expected = Quantized(codes.cpu(), scales.cpu(), ga.cpu()).dequantize_unscaled(torch.float64) * factors[second].double()
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours.cpu().double(), expected)


@on_devices
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32])
def test_matmul_of_exact_sums_equals_the_reference(device, out_dtype, bias_dtype):
    """Integers small enough that the float32 sum is exact: one rounding, which everyone must make alike."""
    for M, N, K in ((37, 21, 70), (1, 1, 16), (130, 140, 257)):
        a, b = (packed_on(matrix("ties", (rows, K), torch.float32, device, seed=rows), device) for rows in (M, N))
        bias = None if bias_dtype is None else matrix("gauss", (1, N), bias_dtype, device)[0]
        ours = triton_kernels.matmul(*a, *b, bias, 1 / 128, out_dtype)
        expected = reference_ops.matmul(*(t.cpu() for t in (*a, *b)), None if bias is None else bias.cpu(), 1 / 128, out_dtype)
        assert ours.dtype == out_dtype
        assert torch.equal(ours.cpu(), expected)


@on_devices
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_matmul_error_is_that_of_float32_sums(device, out_dtype):
    """Against float64. A float32 sum of K terms is off by at most K * 2^-24 of the sum of magnitudes, then comes one rounding."""
    M, N, K = (45, 67, 300) if device == "cpu" else (500, 700, 1100)
    a, b = (packed_on(matrix("gauss", (rows, K), torch.float32, device, seed=rows), device) for rows in (M, N))
    bias = matrix("gauss", (1, N), torch.bfloat16, device)[0]
    ours = triton_kernels.matmul(*a, *b, bias, 1.0, out_dtype).cpu().double()
    left, right = (Quantized(*(t.cpu() for t in q)).dequantize(torch.float64) for q in (a, b))
    expected = left @ right.t() + bias.cpu().double()
    rounding = torch.finfo(out_dtype).eps / 2
    bound = K * 2.0**-24 * (left.abs() @ right.abs().t() + bias.cpu().double().abs())
    assert ((ours - expected).abs() <= bound * (1 + rounding) + rounding * expected.abs()).all()


@on_devices
def test_matmul_leaves_the_settings_of_torch_alone(device):
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    a = packed_on(matrix("gauss", (4, 16), torch.float32, device), device)
    triton_kernels.matmul(*a, *a, None, 1.0, torch.bfloat16)
    assert settings.allow_bf16_reduced_precision_reduction == before


# ---------------------------------------------------------------- only on a GPU


gpu_only = pytest.mark.usefixtures("cuda")


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 5000)])
def test_large_matrices(dtype, shape):
    x = matrix("outliers", shape, dtype, "cuda")
    packed = triton_kernels.quantize(x, "four_over_six")
    expected = reference_ops.quantize(x.cpu(), "four_over_six")
    print(f"\n{shape} {dtype}: four_over_six", differences(packed, expected))
    assert_equal(packed, expected)
    for transpose in (False, True):
        ours = triton_kernels.quantize_grad(x, seeds_on("cuda"), 0, "ms_eden", transpose, 0)
        print(f"quantize_grad transpose={transpose}:", end=" ")
        assert_near_ties_only(differences(ours, reference_grad(x, 0, transpose, 0)))
    ours = triton_kernels.requantize(*packed, shape[1], seeds_on("cuda"), 0, "ms_eden", 0)
    print("requantize:", end=" ")
    expected = reference_ops.requantize(*(t.cpu() for t in packed), shape[1], seeds_on("cpu"), 0, "ms_eden", 0)
    assert_near_ties_only(differences(ours, expected))


@pytest.mark.gpu
@gpu_only
def test_more_than_two_to_the_31_elements():
    """A tall matrix of equal strips: so are its codes."""
    strip = matrix("gauss", (256, 8192), torch.bfloat16, "cuda")
    strips = 2**31 // strip.numel() + 2
    x = strip.repeat(strips, 1)
    codes, scales, g = triton_kernels.quantize(x, "four_over_six")
    first = triton_kernels.quantize(strip, "four_over_six")
    assert torch.equal(g, first[2])
    assert (codes.view(strips, 256, -1) == first[0]).all()
    assert (scales.view(torch.uint8).view(strips, 256, -1) == first[1].view(torch.uint8)).all()
    codes, _, _ = triton_kernels.quantize_grad(x, seeds_on("cuda"), 0, "ms_eden", False, 0)
    first = triton_kernels.quantize_grad(strip, seeds_on("cuda"), 0, "ms_eden", False, 0)
    assert (codes.view(strips, 256, -1) == first[0]).all()
    codes, _, _ = triton_kernels.quantize_grad(x, seeds_on("cuda"), 0, "ms_eden", True, 0)
    first = triton_kernels.quantize_grad(strip, seeds_on("cuda"), 0, "ms_eden", True, 0)
    assert (codes.view(8192, strips, -1) == first[0].unsqueeze(1)).all()


@pytest.mark.gpu
@gpu_only
def test_a_step_is_captured_by_a_cuda_graph_and_never_waits():
    """Seeds are read on the GPU: a replay with other seeds and data gives what an eager call gives."""
    seeds = seeds_on("cuda")
    x, e = (matrix("gauss", (256, columns), torch.bfloat16, "cuda") for columns in (384, 128))
    w = triton_kernels.quantize(matrix("gauss", (128, 384), torch.bfloat16, "cuda", 2), "four_over_six")

    def step() -> tuple[Tensor, ...]:
        packed = triton_kernels.quantize(x, "four_over_six")
        y = triton_kernels.matmul(*packed, *w, None, 1.0, torch.bfloat16)
        left = triton_kernels.quantize_grad(e, seeds, 1, "ms_eden", True, 0)
        right = triton_kernels.requantize(*packed, 384, seeds, 1, "ms_eden", 0)
        return y, triton_kernels.matmul(*left, *right, None, 1 / 128, torch.float32), left[0], right[0], left[1].view(torch.uint8)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seeds.add_(99)
    x.mul_(-3)
    e.add_(0.5)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)
