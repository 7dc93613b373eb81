"""How results of operators are compared with what should come out: what differs, of how much, and how much of it may."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import quartet_compile.backend  # noqa: F401  (registers every operator)
from quartet_compile.kernels.format import ceil_div, unpack

FLIPPED_CODES, FLIPPED_SCALES = 1.4e-5, 1.6e-5
"""Shares of codes and scales that lie so near a midpoint; a few more are allowed, because the matrices are small."""


class Difference(NamedTuple):
    """differ: how many of `of` things do; allowed: how many may."""

    what: str
    differ: int
    of: int
    allowed: int = 0


# ---------------------------------------------------------------- comparing


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def elements(what: str, ours: Tensor, expected: Tensor) -> Difference:
    """Numbers that differ in value, or all of them if shape or dtype do."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return Difference(what, expected.numel(), expected.numel())
    return Difference(what, int((ours.cpu() != expected).sum()), expected.numel())


def matrices(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], near_ties: bool) -> list[Difference]:
    """Packed matrices one after the other."""
    found = []
    for i in range(0, len(expected), 3):
        (codes, scales, g), (codes_, scales_, g_) = ours[i : i + 3], expected[i : i + 3]
        c = elements("codes", unpack(codes.cpu()), unpack(codes_))
        s = elements("scales", bits(scales), bits(scales_))
        if near_ties:
            c = c._replace(allowed=2 + int(FLIPPED_CODES * c.of))
            s = s._replace(allowed=1 + c.differ + int(FLIPPED_SCALES * s.of))
        found += [c, s, elements("tensor scales", g, g_)]
    return found


def values(ours: Tensor, expected: Tensor, near_ties: bool) -> list[Difference]:
    """Values, by the eight: a flipped code shows in one, a flipped scale in two."""
    wrong = elements("values", ours, expected)
    if wrong.differ and ours.shape == expected.shape:
        eights = (ours.cpu() != expected).unflatten(1, (-1, 8)).any(2)
        allowed = 2 + 2 * 3 + int((8 * FLIPPED_CODES + 2 * FLIPPED_SCALES) * eights.numel())
        return [Difference("eights of values", int(eights.sum()), eights.numel(), allowed if near_ties else 0)]
    return [wrong]


def swizzled_places(rows: int, groups: int) -> Tensor:
    """Where the tensor cores look for the scale of a row and a group: int64 [rows, groups]."""
    row, group = torch.arange(rows).unsqueeze(1), torch.arange(groups).unsqueeze(0)
    return ((row // 128) * ceil_div(groups, 4) + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4


def row_by_row(packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Packed matrices one after the other, with scales [M, K/16] read from swizzled ones."""
    parts = list(packed)
    for i in range(0, len(parts), 3):
        rows, groups = parts[i].shape[0], parts[i].shape[1] // 8
        parts[i + 1] = bits(parts[i + 1])[swizzled_places(rows, groups)].view(torch.float8_e4m3fn)
    return tuple(parts)


def product(a: Tensor, b: Tensor, *, scale: float = 1.0, bias: Tensor | None = None, dtype: torch.dtype) -> Tensor:
    """a times b transposed, times `scale`, plus bias, in float64 and rounded to float32, then to `dtype`."""
    y = a.double() @ b.double().t() * scale
    return (y if bias is None else y + bias.double()).float().to(dtype)
