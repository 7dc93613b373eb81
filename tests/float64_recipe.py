"""Quartet II in float64 NumPy, written from its definition and not from the package: what the tests compare with.

Nothing here imports quartet_compile. Grids are searched, the Hadamard matrix is multiplied, Philox runs on Python integers.
"""

from __future__ import annotations

import math

import numpy as np

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(sorted({m * 2.0**-9 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0}))


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The nearest grid point, ties to the even index, saturating."""
    hi = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    lo = hi - 1
    below, above = values - grid[lo], grid[hi] - values
    return np.where((below < above) | ((below == above) & (lo % 2 == 0)), grid[lo], grid[hi])


def power_of_two(g: float) -> float:
    return 2.0 ** math.ceil(math.log2(g)) if g > 0 else 1.0


def pad(x: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


def four_over_six(x: np.ndarray) -> np.ndarray:
    """x [M, K] -> its quantized values [M, ceil(K/16)*16]."""
    groups = pad(x, 16).reshape(x.shape[0], -1, 16)
    a = np.abs(groups)
    g = power_of_two(a.max() / 256 / 6)
    best, best_error = None, None
    for stretch in (1.0, 1.5):
        s = nearest(stretch * a.max(-1, keepdims=True) / 6 / g, E4M3)
        s = np.where(s == 0, 1.0, s)
        value = nearest(a / (s * g), GRID) * s * g
        error = ((value - a) ** 2).sum(-1, keepdims=True)
        if best is None:
            best, best_error = value, error
        else:
            best = np.where(error < best_error, value, best)
    return (np.sign(groups) * best).reshape(x.shape[0], -1)


def philox(seed: int, c0: int, c1: int, stream: int) -> list[int]:
    """Philox4x32-10 at counter (c0, c1, stream, 0)."""
    c, k = [c0, c1, stream, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform(seed: int, group: int, row: int, stream: int) -> float:
    """The draw of a group: a call is for groups k, k + 4 of eight at rows r, r + 8 of sixteen, first (r, k), then (r, k + 4)."""
    (eight, k), (sixteen, r) = divmod(group, 8), divmod(row, 16)
    words = philox(seed, 4 * eight + k % 4, 16 * sixteen + r % 8, stream)
    return (words[2 * (r // 8) + k // 4] >> 8) * 2.0**-24


def hadamard(d: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < d:
        h = np.block([[h, h], [h, -h]])
    return h


def rotate(x: np.ndarray, seed: int) -> np.ndarray:
    """Randomized Hadamard transform of blocks of 128 along the rows, entries +1 and -1."""
    words = philox(seed, 0, 0, 0)
    signs = np.array([-1.0 if words[j // 32] >> (j % 32) & 1 else 1.0 for j in range(128)])
    blocks = pad(x, 128).reshape(x.shape[0], -1, 128)
    return ((blocks * signs) @ hadamard(128)).reshape(x.shape[0], -1)


def ms_eden(x: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Rotate x [M, K] and quantize it: the values [M, ceil(K/128)*128], in the units of `rotate`."""
    groups = rotate(x, seed).reshape(x.shape[0], -1, 16)
    a = np.abs(groups)
    m = a.max(-1) / (6 / (17 / 16 * 0.93))
    v = a / np.where(m == 0, 1, m)[..., None]
    c = nearest(v, GRID)
    numerator, denominator = (v * v).sum(-1), (v * c).sum(-1)
    t = m * np.where(denominator == 0, 1, numerator / np.where(denominator == 0, 1, denominator))
    g = power_of_two(t.max() / 256)
    u = np.array([[uniform(seed, k, r, stream) for k in range(t.shape[1])] for r in range(t.shape[0])])
    lo = np.searchsorted(E4M3, t / g, side="right") - 1
    low, high = E4M3[lo], E4M3[np.minimum(lo + 1, len(E4M3) - 1)]
    s = np.where(u < (t / g - low) / np.where(high > low, high - low, 1), high, low)
    return (np.sign(groups) * c * s[..., None] * g).reshape(x.shape[0], -1)


def linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y = x w^T of the recipe."""
    return four_over_six(x) @ four_over_six(w).T


def dgrad(e: np.ndarray, w: np.ndarray, seed: int) -> np.ndarray:
    """dx of the recipe, with w [O, I] quantized in the forward pass and again."""
    wq = four_over_six(w)[:, : w.shape[1]]
    return ms_eden(e, seed, 1) @ ms_eden(wq.T, seed, 2).T / 128


def wgrad(e: np.ndarray, x: np.ndarray, seed: int) -> np.ndarray:
    """dw of the recipe, with x [T, I] quantized in the forward pass and again."""
    xq = four_over_six(x)[:, : x.shape[1]]
    return ms_eden(e.T, seed, 1) @ ms_eden(xq.T, seed, 2).T / 128
