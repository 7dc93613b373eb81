"""Do two kinds of runs of the same training differ by more than runs of one kind do among themselves?

Were the m runs of the second kind more runs of the first, the difference of the means of n and m runs would have the standard deviation
s sqrt(1/n + 1/m), s being that of one run. The bound is three of these, widened for s being estimated from the n runs of the first kind:
the quantile of Student's distribution with n - 1 degrees of freedom takes the place of 3 (5.5 for six runs, 9.2 for four). A unit in the
last place of float32, in which losses are computed, comes on top: without noise, that is all that runs differ by on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

COVERAGE = math.erf(3 / math.sqrt(2))
"""0.9973, what lies within three standard deviations of a normal variable."""
ULP = 2.0**-23


def within(t: float, freedom: int) -> float:
    """Probability that a variable of Student's distribution with so many degrees of freedom lies between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(odd, freedom - 1, 2):  # powers of the cosine, with factors 1/2, 3/4, ... or 2/3, 4/5, ...
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def quantile(coverage: float, freedom: int) -> float:
    """The t for which `within(t, freedom)` is the coverage."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < coverage else (low, middle)
    return high


def judge(one: Sequence[Sequence[float]], two: Sequence[Sequence[float]], figures: Mapping[str, slice]) -> list[dict[str, Any]]:
    """For the mean of each part of a curve: where the curves of either kind are, how far apart the kinds are, and how far they may be.

    one, two: curves, at least two of the first kind. Raises StatisticsError for fewer.
    """
    rows = []
    factor = quantile(COVERAGE, max(1, len(one) - 1)) * math.sqrt(1 / len(one) + 1 / len(two))
    for name, steps in figures.items():
        ones, twos = ([mean(curve[steps]) for curve in curves] for curves in (one, two))
        deviation, bound = mean(twos) - mean(ones), factor * stdev(ones) + ULP * abs(mean(ones))
        rows.append({
            "figure": name, "one": mean(ones), "one_stdev": stdev(ones), "one_each": ones, "two": mean(twos), "two_each": twos,
            "deviation": deviation, "factor": factor, "bound": bound, "inside": abs(deviation) <= bound,
        })  # fmt: skip
    return rows
