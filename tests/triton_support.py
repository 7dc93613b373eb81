"""Matrices that are hard to quantize, and a count of what two packed matrices differ in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quartet_compile.kernels.format import unpack

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
