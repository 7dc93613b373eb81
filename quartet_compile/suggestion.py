"""What `suggest` found out, as data and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from quartet_compile.text import _table, bytes_text

By = Literal["linear", "kind", "block"]
Measure = Literal["alone", "left out"]

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09)
"""Student's t for 1, 2, ... degrees of freedom: a mean without an effect is within so many standard errors 95 times of 100."""


@dataclass(frozen=True)
class Mean:
    """A mean over batches and its standard error."""

    value: float
    error: float
    batches: int

    @property
    def clear(self) -> bool:
        """Whether it differs from 0 by more than chance allows 95 times of 100."""
        return abs(self.value) > STUDENT[min(self.batches - 1, len(STUDENT)) - 1] * self.error

    def __format__(self, spec: str) -> str:
        """"0.0123 +- 0.0004" under a format of numbers, such as ".4f"."""
        return f"{self.value:{spec}} +- {self.error:{spec.lstrip('+')}}"


def mean(values: Sequence[float]) -> Mean:
    """Of at least two values, independent of each other."""
    return Mean(fmean(values), stdev(values) / math.sqrt(len(values)), len(values))


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Mean:
    """Mean of the parts over the mean of the wholes, pair by pair; its error to first order (the delta method)."""
    whole = fmean(wholes)
    share = fmean(parts) / whole
    left = mean([part - share * of for part, of in zip(parts, wholes, strict=True)])
    return Mean(share, left.error / abs(whole), left.batches)


@dataclass(frozen=True)
class Candidate:
    """A linear, or a group of them.

    name: its name, or a glob over those of a group. linears: their names in the model. loss: what quantizing it costs. flops: its share of
    the floating point operations in NVFP4. bytes: what is kept for the backward pass in addition if it is left out, less if negative.
    """

    name: str
    linears: tuple[str, ...]
    loss: Mean
    flops: float
    bytes: int


@dataclass(frozen=True)
class Exclusion:
    """Candidates left out together, and what that was seen to do: the share of the gap that it recovers, and the same costs as for one."""

    candidates: tuple[str, ...]
    linears: tuple[str, ...]
    recovered: Mean
    flops: float
    bytes: int


@dataclass(frozen=True)
class Suggestion:
    """What NVFP4 costs in loss, which linears cause it, and which to leave out. `print(suggestion)` shows it.

    plain, quantized: mean losses of all batches without and with quantization. gap: their difference. candidates: the most expensive
    first; empty if the gap is not clear of noise. exclusions: sets in the order in which they buy most for least, each contains the one
    before. chosen: the one suggested. exclude: globs for the option quartet.exclude, `given` ones not included; only: the same for
    `quartet.set_recipe`. Either is empty if it cannot be said that way. notes: what a reader should know beside the figures.
    """

    by: By
    measure: Measure
    budget: float
    plain: float
    quantized: float
    gap: Mean
    candidates: tuple[Candidate, ...]
    exclusions: tuple[Exclusion, ...]
    chosen: Exclusion | None
    exclude: tuple[str, ...]
    only: tuple[str, ...]
    given: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"quartet: NVFP4 costs {self.gap:.5f} of loss, {self.plain:.5f} -> {self.quantized:.5f}, over {self.gap.batches} batches"]
        if self.candidates:
            lines += ["", *self._ranked()]
        if self.exclusions:
            lines += ["", *self._left_out()]
        if self.chosen is not None:
            lines += ["", *self._suggested()]
        return "\n".join([*lines, "", *(f"note: {note}" for note in self.notes)])

    def _ranked(self) -> list[str]:
        what = "quantizing each alone costs" if self.measure == "alone" else "leaving each out of the quantized model takes away"
        lines = [f"loss that {what}, on {self.candidates[0].loss.batches} of the batches:"]
        clear = [c for c in self.candidates if c.loss.clear]
        if clear:
            header = (self.by, "linears", "loss", "FLOPs", "kept bytes")
            rows = [(c.name, str(len(c.linears)), f"{c.loss:+.5f}", f"{c.flops:.1%}", _signed_bytes(c.bytes)) for c in clear]
            lines += ["", *_table([header, *rows])]
        if noise := [c for c in self.candidates if not c.loss.clear]:
            limit = max(abs(c.loss.value) for c in noise)
            lines.append(f"  not clear of noise ({limit:.5f} at most): {_listed([c.name for c in noise])}")
        if chance := round(len(self.candidates) / 20):
            lines.append(f"  of {len(self.candidates)} that cost nothing, about {chance} would look clear of noise")
        return lines

    def _left_out(self) -> list[str]:
        header = ("left out", "the last one", "recovers of the gap", "costs of NVFP4's FLOPs", "kept bytes", "")
        rows = [
            (str(len(e.candidates)), e.candidates[-1], f"{e.recovered:.0%}", f"{e.flops:.1%}", _signed_bytes(e.bytes),
             "<- suggested" if e is self.chosen else "")
            for e in self.exclusions
        ]  # fmt: skip
        others = self.exclusions[0].recovered.batches
        return [f"left out together, most loss for its FLOPs first ({others} other batches):", "", *_table([header, *rows])]

    def _suggested(self) -> list[str]:
        lines = [f"suggested, at most {self.budget:.0%} of the FLOPs in NVFP4:"]
        if self.exclude:
            lines.append(f'  options={{"quartet.exclude": {[*self.given, *self.exclude]!r}}}')
        if self.only:
            lines.append(f'  quartet.set_recipe(model, "bf16", only={list(self.only)!r})')
        return lines


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"


def _signed_bytes(n: int) -> str:
    return ("-" if n < 0 else "+") + bytes_text(abs(n))
