"""What quantization made of a tensor: figures of samples, in float64.

An operand is compared with what its quantizer was given: with the tensor itself, or, where it is quantized again, with the packed one. A
rotated one is compared in rotated space; a rotation keeps lengths and angles, so the figures are those of the tensor. A gradient is
compared with the product of the operands before they were quantized.

Samples of one form are measured together: a step of a hundred layers then takes a few hundred launches on a GPU, not tens of thousands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quartet_compile.kernels import philox, reference
from quartet_compile.kernels.format import E2M1_MAX, GROUP, ROTATION, Quantized, ceil_to, decode_e2m1

ELEMENTS_AT_ONCE = 2**23
"""Numbers of a batch of samples, which takes some ten times as many float64 numbers at once."""


class Fresh(NamedTuple):
    """Rows of an operand that is quantized from a tensor.

    rows: [n, K] before. codes uint8, scales uint8 (bits of E4M3), tensor_scale: those rows, packed. amax: [], of the whole tensor.
    rotation: its seed, int64 [], with the rank in it; None if there is none.
    """

    rows: Tensor
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    amax: Tensor
    rotation: Tensor | None


class Again(NamedTuple):
    """Rows of an operand that is quantized again, rotated, from the columns of a packed one.

    source_codes: uint8 [K, n], the bytes that hold the columns' codes. odd: bool [n], whether a column is in the high half. source_scales:
    uint8 [K, n]. source_scale: its tensor scale. The others: as in `Fresh`.
    """

    source_codes: Tensor
    odd: Tensor
    source_scales: Tensor
    source_scale: Tensor
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    rotation: Tensor


class Gradient(NamedTuple):
    """Rows [n, K] of a product of quantized operands, and of the same product without quantization."""

    rows: Tensor
    reference: Tensor


Sample = Fresh | Again | Gradient


class Figures(NamedTuple):
    """What became of a tensor x that is q now. None: not defined, since x is zero, or of no meaning for a gradient. NaN: q or x is not
    finite.

    error: |q - x|^2 / |x|^2. gain: <q, x> / <x, x>. cosine: <q, x> / |q| |x|. saturated: share of the numbers in x, zeros left out, beyond
    the largest that their group can hold. underflowed: share of them that is zero in q; all of a group may be, whose scale is too small for
    E4M3, and these are not saturated. amax: largest magnitude, of a fresh operand that of the whole tensor, before any rotation; otherwise
    that of what was measured of x, before rotation. elements: numbers measured.
    """

    error: float | None
    gain: float | None
    cosine: float | None
    saturated: float | None
    underflowed: float | None
    amax: float
    elements: int


def measure(samples: Sequence[Sample]) -> list[Figures]:
    """The figures of samples, in their order. Waits once for the device that they are on."""
    samples = _with_signs(samples)
    alike: dict[Any, list[int]] = {}
    for i, sample in enumerate(samples):
        form = (type(sample), *((t.shape, t.dtype, t.device) if t is not None else None for t in sample))
        alike.setdefault(form, []).append(i)
    order: list[int] = []
    sums: list[Tensor] = []
    for positions in alike.values():
        for part in _portions(positions, samples[positions[0]]):
            order += part
            sums.append(_sums([samples[i] for i in part]))
    rows = [row for each in sums for row in each.tolist()]  # the first of them waits, when all is launched
    figures = {i: _figures(samples[i], row) for i, row in zip(order, rows, strict=True)}
    return [figures[i] for i in range(len(samples))]


def _with_signs(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the signs of their rotations, float32 [128], in place of the seeds: Philox is many small steps, so once for all."""
    by_device: dict[torch.device, list[int]] = {}
    for i, sample in enumerate(samples):
        if not isinstance(sample, Gradient) and sample.rotation is not None:
            by_device.setdefault(sample.rotation.device, []).append(i)
    result = list(samples)
    for positions in by_device.values():
        seeds = torch.stack([samples[i].rotation for i in positions])  # type: ignore[union-attr, misc]
        for i, signs in zip(positions, philox.rotations_signs(seeds, torch.zeros_like(seeds)), strict=True):
            result[i] = result[i]._replace(rotation=signs)  # type: ignore[call-arg]
    return result


def _portions(positions: list[int], sample: Sample) -> Iterator[list[int]]:
    count = max(1, ELEMENTS_AT_ONCE // max(1, sample[0].numel()))
    return (positions[i : i + count] for i in range(0, len(positions), count))


def _sums(samples: Sequence[Sample]) -> Tensor:
    """[B, 7]: <x, x>, <q, q>, <q, x>, |q - x|^2, numbers of x that are not zero, saturated and underflowed ones of them, amax."""
    kind = type(samples[0])
    batch: Any = kind(*(None if ts[0] is None else torch.stack(ts) for ts in zip(*samples, strict=True)))  # type: ignore[arg-type]
    if isinstance(batch, Gradient):
        x, q = batch.reference.double(), batch.rows.double()
        nothing = x.new_full((x.shape[0],), math.nan)
        counts, amax = [nothing] * 3, _largest(x)
    else:
        if isinstance(batch, Fresh):
            x, amax = batch.rows.double(), batch.amax.double()
        else:
            x = _source(batch)
            amax = _largest(x)
        if batch.rotation is not None:
            x = rotate(x, batch.rotation)
        packed = Quantized(batch.codes, batch.scales.view(torch.float8_e4m3fn), batch.tensor_scale)
        scale = batch.tensor_scale.double().view(-1, 1, 1)
        q = packed.dequantize_unscaled(torch.float64) * scale
        x = torch.nn.functional.pad(x, (0, q.shape[-1] - x.shape[-1]))
        largest = packed.group_scales(torch.float64) * scale * E2M1_MAX
        beyond = (x.abs().unflatten(-1, (-1, GROUP)) > largest.unsqueeze(-1)).flatten(-2)
        counts = [_count(which) for which in (x != 0, beyond & (q != 0), (x != 0) & (q == 0))]
    pairs = ((x, x), (q, q), (q, x), (q - x, q - x))
    return torch.stack([*((a * b).sum((1, 2)) for a, b in pairs), *counts, amax], dim=1)


def _count(which: Tensor) -> Tensor:
    return which.flatten(1).sum(1, dtype=torch.float64)


def _largest(x: Tensor) -> Tensor:
    return x.abs().flatten(1).amax(1) if x.numel() else x.new_zeros(x.shape[0])


def _source(batch: Again) -> Tensor:
    """The columns of packed matrices, as rows: float64 [B, n, K]."""
    nibbles = torch.where(batch.odd.unsqueeze(1), batch.source_codes >> 4, batch.source_codes & 15)
    scales = batch.source_scales.view(torch.float8_e4m3fn).double()
    return (decode_e2m1(nibbles, torch.float64) * scales * batch.source_scale.double().view(-1, 1, 1)).transpose(1, 2)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """`reference.rotate` of a batch [B, n, K] with signs [B, 128]: float64 [B, n, ceil(K/128)*128]."""
    matrix = reference.rotate(torch.eye(ROTATION, dtype=torch.float64, device=x.device), x.new_ones(ROTATION))
    x = torch.nn.functional.pad(x, (0, ceil_to(x.shape[-1], ROTATION) - x.shape[-1]))
    return ((x.unflatten(-1, (-1, ROTATION)) * signs.double().view(-1, 1, 1, ROTATION)) @ matrix).flatten(-2)


def _figures(sample: Sample, sums: Sequence[float]) -> Figures:
    xx, qq, qx, ee, numbers, saturated, underflowed, amax = sums
    elements = sample[0].numel()
    if xx == 0:
        return Figures(None, None, None, None, None, amax, elements)
    cosine = None if qq == 0 else qx / math.sqrt(xx * qq)
    if isinstance(sample, Gradient):
        return Figures(ee / xx, qx / xx, cosine, None, None, amax, elements)
    shares = (saturated / numbers, underflowed / numbers) if math.isfinite(qq) else (math.nan, math.nan)
    return Figures(ee / xx, qx / xx, cosine, *shares, amax, elements)
