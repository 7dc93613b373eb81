"""Every quantization rule as plain PyTorch, formula first: the definition that all kernels are held to.

The functions take a matrix [M, K] whose groups of 16 run along K, compute in float32 (float64 for a float64 input) and return a
`Quantized`. A K that is no multiple of 16 is padded with zeros. They are written to be read and tested, not to be fast.

Notation: ``A`` the largest magnitude of the tensor, ``g`` the tensor scale, ``s`` a group's scale, ``b`` the scale that would map the
group's maximum exactly to ``V``. Sources: "Quartet II" (arXiv 2601.22813); NVFP4 pretraining (arXiv 2509.25149).

Three details look redundant and are not:

* Sums over a group are taken pairwise, in one fixed order, so that a kernel can repeat them bit for bit.
* Errors of the four-over-six choice are compared after dividing by ``g``: squares of raw float32 values leave the range of float32
  below 1e-19 and above 1e19.
* Divisors are replaced by 1 where they are zero. A division by a number that flushes to zero is how a NaN enters a long run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quartet_compile.kernels.format import E2M1_GRID, E2M1_MAX, E4M3_MAX, GROUP, ROTATION, Quantized, ceil_to, pack

SR_OVERRIDE = 17 / 16
"""E4M3 rounding shrinks a scale by at most 16/17; with this head room stochastic rounding never clips."""

MS_EDEN_OVERRIDE = SR_OVERRIDE * 0.93
"""MS-EDEN maps the group maximum to 6 / 0.988125 = 6.072: a little clipping, on purpose, lowers the error."""

SCALE_CEILING = {
    "nearest": 448.0,
    "nearest_16x16": 447.99,
    "four_over_six": 256.0,
    "stochastic": 448.0,
    "ms_eden": 256.0,
    "ms_eden_paper": 255.99,
}
"""Largest group scale, in units of the tensor scale, that each rule aims at."""

_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


# ---------------------------------------------------------------- rounding to the two grids


def round_e2m1(magnitude: Tensor, ties: str = "even") -> Tensor:
    """Nearest E2M1 magnitude, saturating at 6. `ties`: "even" goes to the even code, as the hardware does; "away" goes up."""
    a = magnitude.clamp(max=E2M1_MAX)
    if ties == "away":
        midpoints = torch.tensor(_E2M1_MIDPOINTS, dtype=a.dtype, device=a.device)
        return torch.tensor(E2M1_GRID, dtype=a.dtype, device=a.device)[torch.bucketize(a, midpoints, right=True)]
    if ties != "even":
        raise ValueError(f"ties must be 'even' or 'away', not {ties!r}")
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0)).to(a.dtype)
    return torch.round(a / step) * step


def round_e2m1_stochastic(magnitude: Tensor, uniforms: Tensor) -> Tensor:
    """One of the two neighbouring E2M1 magnitudes: the upper one iff ``u < (a - lo) / (hi - lo)``; 6 from 6 on."""
    a = magnitude.clamp(max=E2M1_MAX)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0)).to(a.dtype)
    lo = torch.floor(a / step) * step
    return torch.where(uniforms < (a - lo) / step, lo + step, lo)


def _e4m3_step(c: Tensor) -> Tensor:
    """Distance between the E4M3 numbers around c >= 0: 2^(floor(log2 c) - 3), and 2^-9 in the subnormal range."""
    exponent = torch.frexp(c).exponent - 1
    return torch.ldexp(torch.ones_like(c), exponent.clamp(min=-6) - 3)


def round_e4m3(c: Tensor) -> Tensor:
    """Nearest E4M3 number to c >= 0, ties to even, saturating at 448."""
    step = _e4m3_step(c)
    return (torch.round(c / step) * step).clamp(max=E4M3_MAX)


def round_e4m3_stochastic(c: Tensor, uniforms: Tensor) -> Tensor:
    """One of the two E4M3 numbers around c in [0, 448], the upper one iff ``u < (c - lo) / (hi - lo)``; grid points stay."""
    step = _e4m3_step(c)
    lo = torch.floor(c / step) * step
    return torch.where(uniforms < (c - lo) / step, lo + step, lo).clamp(max=E4M3_MAX)


# ---------------------------------------------------------------- scales


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def power_of_two_at_least(g: Tensor) -> Tensor:
    """2^ceil(log2 g) for g > 0, not below 2^-126 so that it never is a subnormal number, which some devices flush to zero."""
    mantissa, exponent = torch.frexp(g)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
    return torch.ldexp(torch.ones_like(g), exponent)


def _tensor_scale(amax: Tensor, ceiling: float, top: float, kind: str) -> Tensor:
    """g = A / ceiling / top, 1 for a zero tensor; or the power of two at or above it. NaN where A is not finite."""
    if kind not in ("power_of_two", "exact"):
        raise ValueError(f"tensor_scale must be 'power_of_two' or 'exact', not {kind!r}")
    finite = torch.isfinite(amax)
    g = _or_one((torch.where(finite, amax, 0.0) / ceiling / top).float()).to(amax.dtype)
    if kind == "power_of_two":
        g = power_of_two_at_least(g)
    return torch.where(finite, g, torch.full_like(g, torch.nan))


def _group_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two, by halves: ((x0 + x8) + (x4 + x12)) + ..."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _working_copy(x: Tensor) -> Tensor:
    """[M, K] -> float32 or float64 [M, ceil(K/16)*16], zeros behind."""
    if x.dim() != 2:
        raise ValueError(f"expected a matrix [M, K], got shape {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    return torch.nn.functional.pad(x, (0, ceil_to(x.shape[1], GROUP) - x.shape[1]))


def _amax(x: Tensor) -> Tensor:
    """Largest magnitude, NaN if any element is NaN; 0 for an empty tensor."""
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _to_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[M, K] -> the elements of one scale in the last dimension: [M, K/16, 16] or [ceil(M/16), K/16, 256]."""
    if tile == (1, GROUP):
        return x.unflatten(1, (-1, GROUP))
    if tile != (GROUP, GROUP):
        raise ValueError(f"tile must be (1, 16) or (16, 16), not {tile}")
    x = torch.nn.functional.pad(x, (0, 0, 0, ceil_to(x.shape[0], GROUP) - x.shape[0]))
    return x.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP)).transpose(1, 2).flatten(2)


def _from_tiles(tiles: Tensor, tile: tuple[int, int], rows: int) -> Tensor:
    """The inverse of `_to_tiles`, without the rows that were padded."""
    if tile == (1, GROUP):
        return tiles.flatten(1)
    return tiles.unflatten(2, (GROUP, GROUP)).transpose(1, 2).flatten(2).flatten(0, 1)[:rows]


def _assemble(x: Tensor, magnitudes: Tensor, scales: Tensor, g: Tensor, tile: tuple[int, int]) -> Quantized:
    """Nibbles from magnitudes and the signs of x, everything 0 in zero groups and, where g is NaN, everywhere."""
    tiles = _to_tiles(x, tile)
    grid = torch.tensor(E2M1_GRID, dtype=magnitudes.dtype, device=x.device)
    nibbles = torch.searchsorted(grid, magnitudes.contiguous()).to(torch.uint8) | (torch.signbit(tiles).to(torch.uint8) << 3)
    valid = torch.isfinite(g)
    nibbles = torch.where((tiles.abs().amax(-1, keepdim=True) > 0) & valid, nibbles, 0)
    scales = torch.where(valid, scales, 0.0)
    return Quantized(pack(_from_tiles(nibbles, tile, x.shape[0])), scales.float().to(torch.float8_e4m3fn), g.float())


# ---------------------------------------------------------------- the rules


def _nearest_candidate(tiles: Tensor, s: Tensor, g: Tensor, ties: str) -> Tensor:
    """E2M1 magnitudes of x / (s * g)."""
    return round_e2m1(tiles.abs() / (s * g).unsqueeze(-1), ties)


def round_to_nearest(x: Tensor, *, tile: tuple[int, int] = (1, 16), ties: str = "even", tensor_scale: str = "power_of_two") -> Quantized:
    """Round to nearest: the group maximum is mapped to 6, ``s = E4M3(max|group| / 6 / g)``, ``code = E2M1(x / (s * g))``.

    x: [M, K]. tile: (1, 16) or (16, 16). ties: "even" or "away". tensor_scale: "power_of_two" or "exact" (g = A / 448 / 6).
    """
    x = _working_copy(x)
    tiles = _to_tiles(x, tile)
    g = _tensor_scale(_amax(x), SCALE_CEILING["nearest" if tile == (1, GROUP) else "nearest_16x16"], E2M1_MAX, tensor_scale)
    s = _or_one(round_e4m3(tiles.abs().amax(-1) / E2M1_MAX / g))
    return _assemble(x, _nearest_candidate(tiles, s, g, ties), s, g, tile)


def four_over_six(
    x: Tensor, *, tile: tuple[int, int] = (1, 16), ties: str = "even", tensor_scale: str = "power_of_two", error: str = "scaled"
) -> Quantized:
    """Four-over-six: round each group with its maximum at 6 and with its maximum at 4, keep the one with the smaller squared error.

    The E2M1 grid is coarse between 4 and 6, so a group whose large members fall there is better off with a scale 1.5 times as large.
    x: [M, K]. tile, ties, tensor_scale: see `round_to_nearest` (exact: g = A / 256 / 6). error: "scaled" compares errors in units of g;
    "raw" squares the errors of the values themselves, as the paper's code does, which loses the choice for very small and large values.
    """
    x = _working_copy(x)
    tiles = _to_tiles(x, tile)
    g = _tensor_scale(_amax(x), SCALE_CEILING["four_over_six"], E2M1_MAX, tensor_scale)
    base = tiles.abs().amax(-1) / E2M1_MAX / g
    candidates = []
    for stretch in (1.0, 1.5):
        s = _or_one(round_e4m3(stretch * base))
        q = _nearest_candidate(tiles, s, g, ties)
        if error == "scaled":
            difference = q * s.unsqueeze(-1) - tiles.abs() / g
        elif error == "raw":
            difference = q * (s * g).unsqueeze(-1) - tiles.abs()
        else:
            raise ValueError(f"error must be 'scaled' or 'raw', not {error!r}")
        candidates.append((q, s, _group_sum(difference * difference)))
    (q6, s6, e6), (q4, s4, e4) = candidates
    four = e4 < e6
    return _assemble(x, torch.where(four.unsqueeze(-1), q4, q6), torch.where(four, s4, s6), g, tile)


FORWARD_FORMULAS: dict[str, Callable[[Tensor], Quantized]] = {
    "four_over_six": four_over_six,
    "nearest": round_to_nearest,
}
"""Deterministic rules by name."""


def stochastic_round(x: Tensor, uniforms: Tensor, *, override: float = SR_OVERRIDE, tensor_scale: str = "power_of_two") -> Quantized:
    """Stochastic rounding of each element, unbiased for given scales.

    x: [M, K]. uniforms: [M, K] in [0, 1). override: the group maximum is mapped to 6 / override.
    """
    x = _working_copy(x)
    tile = (1, GROUP)
    tiles = _to_tiles(x, tile)
    u = _to_tiles(_working_copy(uniforms).to(x.dtype), tile)
    top = E2M1_MAX / override
    g = _tensor_scale(_amax(x), SCALE_CEILING["stochastic"], top, tensor_scale)
    s = _or_one(round_e4m3(tiles.abs().amax(-1) / top / g))
    q = round_e2m1_stochastic(tiles.abs() / (s * g).unsqueeze(-1), u)
    return _assemble(x, q, s, g, tile)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Randomized Hadamard transform of each block of ``d = len(signs)`` elements: ``H (signs * x)`` with H of +1 and -1 (Sylvester).

    x: [M, K] -> float32 (float64 for a float64 input) [M, ceil(K/d)*d], zeros behind. The factor 1/sqrt(d) that would make it orthogonal
    is left out: it belongs into the output scale of the product, as 1/d for both operands. Butterflies from the distance 1 upwards.
    """
    d = signs.shape[0]
    if d & (d - 1):
        raise ValueError(f"the rotation's length must be a power of two, not {d}")
    x = x if x.dtype == torch.float64 else x.float()
    x = torch.nn.functional.pad(x, (0, ceil_to(x.shape[1], d) - x.shape[1]))
    y = x.unflatten(1, (-1, d)) * signs.to(x.dtype)
    distance = 1
    while distance < d:
        pairs = y.unflatten(2, (-1, 2, distance))
        a, b = pairs[:, :, :, 0], pairs[:, :, :, 1]
        y = torch.stack((a + b, a - b), dim=3).flatten(2)
        distance *= 2
    return y.flatten(1) + 0.0  # butterflies can give -0 where a sum of products gives +0


def ms_eden(rotated: Tensor, uniforms: Tensor, *, form: str = "posthoc", tensor_scale: str | None = None) -> Quantized:
    """MS-EDEN: round to nearest, then undo the shrinkage in the scale, and round the scale stochastically.

    rotated: [M, K], already rotated, K a multiple of 128. uniforms: [M, K/16] in [0, 1).

    form="posthoc" (this project's): per group ``m = max / V``, ``v = y / m``, ``c = E2M1(v)``, ``t = m * sum(v v) / sum(v c)``;
    then ``g = max(t) / 256`` as a power of two and ``scale = E4M3_stochastic(t / g)``. form="paper": two-level scaling first, the
    correction over blocks of 128, ties away, exact g. `tensor_scale` overrides the form's own kind.
    """
    if form not in ("posthoc", "paper"):
        raise ValueError(f"form must be 'posthoc' or 'paper', not {form!r}")
    if rotated.shape[1] % ROTATION:
        raise ValueError(f"a rotated operand has a multiple of {ROTATION} columns, not {rotated.shape[1]}")
    x = _working_copy(rotated)
    tile = (1, GROUP)
    tiles = _to_tiles(x, tile)
    magnitude, top = tiles.abs(), E2M1_MAX / MS_EDEN_OVERRIDE
    u = uniforms.to(x.dtype)
    if form == "paper":
        g = _tensor_scale(_amax(x), SCALE_CEILING["ms_eden_paper"], top, tensor_scale or "exact")
        s = _or_one(round_e4m3(magnitude.amax(-1) / top / g))
        v = magnitude / (s * g).unsqueeze(-1)
        c = round_e2m1(v, "away")
        block = (v.flatten(1).unflatten(1, (-1, ROTATION)), c.flatten(1).unflatten(1, (-1, ROTATION)))
        correction = _ratio(_group_sum(block[0] * block[0]), _group_sum(block[0] * block[1])).repeat_interleave(ROTATION // GROUP, dim=1)
        return _assemble(x, c, round_e4m3_stochastic(_finite_or_zero(s * correction, g), u), g, tile)
    m = magnitude.amax(-1) / top
    v = magnitude / _or_one(m).unsqueeze(-1)
    c = round_e2m1(v)
    t = m * _ratio(_group_sum(v * v), _group_sum(v * c))
    g = _tensor_scale(_amax(t), SCALE_CEILING["ms_eden"], 1.0, tensor_scale or "power_of_two")
    return _assemble(x, c, round_e4m3_stochastic(_finite_or_zero(t / g, g), u), g, tile)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 1 where the denominator is 0."""
    return torch.where(denominator == 0, torch.ones_like(numerator), numerator / _or_one(denominator))


def _finite_or_zero(x: Tensor, g: Tensor) -> Tensor:
    return torch.where(torch.isfinite(g), x, 0.0)


def requantize(q: Quantized, columns: int, signs: Tensor, uniforms: Tensor, *, dtype: torch.dtype = torch.float32) -> Quantized:
    """A packed operand as the operand of a backward product: dequantize, transpose, rotate, MS-EDEN.

    q: [M, K] packed, of which the first `columns` columns are real. signs: [128]. uniforms: [columns, ceil(M/128)*8].
    Returns [columns, ceil(M/128)*128] packed; the tensor scale of `q` carries over.
    """
    values = q.dequantize_unscaled(dtype)[:, :columns]
    again = ms_eden(rotate(values.t(), signs), uniforms)
    return Quantized(again.codes, again.scales, again.tensor_scale * q.tensor_scale)


def matmul(a: Quantized, b: Quantized, scale: float = 1.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """a [M, K] times b [N, K] transposed, times `scale`: [M, N], accumulated and returned in `dtype`."""
    return (a.dequantize_unscaled(dtype) @ b.dequantize_unscaled(dtype).t()) * scale * a.tensor_scale.to(dtype) * b.tensor_scale.to(dtype)
