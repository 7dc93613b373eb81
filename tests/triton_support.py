"""What the tests of the Triton kernels share: devices, matrices that are hard to quantize, the reference, and a count of differences.

The reference always runs on the CPU: on a GPU torch divides by a Python number by multiplying with its reciprocal, which is not IEEE
division.

What may differ from it, and by how much. The deterministic rules: nothing. The rotated operands: a rotation adds 128 numbers, and its
float32 result depends on the order of the additions, by about 1e-6 of the group's maximum. A code flips where that crosses one of 7
midpoints, or zero, with a density of at most 0.3 a unit each: 8 * 0.3 * 2 * 3e-6 = 1.4e-5 of the elements. A scale differs where the random
number falls into the gap of its probability, at most 16 * 1e-6, or where a code of its group flipped. Sums of small integers are exact:
there, nothing may differ at all. Signs of zeros: see `test_rotated_zeros`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import unpack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
on_devices = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=NEEDS_GPU)])

if INTERPRETED:
    import quick_interpreter

    quick_interpreter.install()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Calls:
    """A kernel that is a function: what it is launched with, it is called with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.function


def first(*values: Any, fast: int = 1) -> list[Any]:
    """Parameters of which the first `fast` are tested always, the others with ``-m slow``: the interpreter takes seconds for each."""
    return [*values[:fast], *(pytest.param(value, marks=pytest.mark.slow) for value in values[fast:])]


def selected(cases: Sequence[tuple[int, str, str]], fast: Sequence[tuple[int, str, str]]) -> list[Any]:
    """(capability, dtype, name) as parameters: the fast ones are tested always, the others with ``-m slow``; with ``-m exhaustive`` those
    of a dtype beside bfloat16 on the younger GPU of a family, where the compiler writes what it writes for the older one."""
    found = []
    for case in cases:
        younger = case[0] in (89, 103) and case[1] != "bf16"
        marks = [] if case in fast else [pytest.mark.slow, *[pytest.mark.exhaustive] * younger]
        found.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return found


BFLOAT16_FIRST = first(torch.bfloat16, torch.float32, torch.float16)
SHAPES = ((37, 70), (1, 16), (16, 1), (130, 257), (128, 128))
SEEDS = (12345, -(2**62) - 977, 2**63 - 1)

Packed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Differences:
    codes: int
    """Nibbles that differ, signs of zeros included."""
    scales: int
    """Scale bytes that differ."""
    tensor_scale: bool
    elements: int
    groups: int

    def __str__(self) -> str:
        tensor_scale = "differs" if self.tensor_scale else "equal"
        return f"{self.codes}/{self.elements} codes, {self.scales}/{self.groups} scales, tensor scale {tensor_scale}"


def differences(ours: Packed, expected: Packed) -> Differences:
    """Compare byte by byte, on the CPU."""
    codes, scales, g = (t.cpu() for t in ours)
    expected_codes, expected_scales, expected_g = (t.cpu() for t in expected)
    for mine, theirs in zip((codes, scales, g), (expected_codes, expected_scales, expected_g), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    return Differences(
        codes=int((unpack(codes) != unpack(expected_codes)).sum()),
        scales=int((scales.view(torch.uint8) != expected_scales.view(torch.uint8)).sum()),
        tensor_scale=not torch.equal(g.view(torch.int32), expected_g.view(torch.int32)) and not bool(g.isnan() & expected_g.isnan()),
        elements=codes.numel() * 2,
        groups=scales.numel(),
    )


def _gauss(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _outliers(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    x = _gauss(shape, generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, x * 300, x)


def _wide(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Magnitudes over twenty binades in one tensor: group scales in E4M3's subnormal range, and groups whose scale is 0."""
    return _gauss(shape, generator) * torch.exp2(-20 * torch.rand((shape[0], 1), generator=generator))


def _ties(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Small integers with a maximum of 6 or 12: every midpoint of the E2M1 grid occurs, and sums are exact in any order."""
    return torch.randint(-12, 13, shape, generator=generator).float() * torch.randint(0, 2, (shape[0], 1), generator=generator).add(1) / 4


def _sparse(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Zero groups, zero rows, and zeros of both signs between small integers."""
    x = torch.randint(-8, 9, shape, generator=generator).float()
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, x, x * 0.0)
    x[:, 16:32] = 0
    x[: shape[0] // 3] *= 0.0
    return x


def _zero(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


MATRICES = {"gauss": _gauss, "outliers": _outliers, "wide": _wide, "ties": _ties, "sparse": _sparse, "zero": _zero}
EXACT_SUMS = ("ties", "sparse", "zero")
"""Matrices of small integers (or halves), whose rotation is exact in any order."""


def matrix(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """A matrix of MATRICES, the same on every device."""
    return MATRICES[kind](shape, torch.Generator().manual_seed(seed)).to(dtype).to(device)


def quiet_rows(device: str) -> Tensor:
    """Most rows so small that their scales are subnormal E4M3 numbers or zero, in some tiles only; and rows of zeros.

    The last tile of a row is ragged; the interpreter, which takes a second for a tile, has one before it, a GPU two.
    """
    e = matrix("gauss", (400, 150 if device == "cpu" else 300), torch.bfloat16, device)
    e[:128] *= 2.0**-16
    e[128:140] *= 2.0**-24
    e[140:150] = 0
    e[260] *= 2.0**-120
    return e


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


def unsigned_zeros(packed: Packed) -> Packed:
    """Code 8, minus zero, replaced by 0."""
    low, high = packed[0] & 15, packed[0] >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4), *packed[1:]
