"""What `observe` recorded: as data, as lines of JSON, as a table and as plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers that JSON does not have, written as strings."""

_ENCODER = json.JSONEncoder(allow_nan=False)


@dataclass(frozen=True)
class Observation:
    """One operand of one product of a linear, or one gradient, in one observed call.

    call: of the model's forward in training, counted from 0. rank: of the process. linear: its name in the model. product: "y", "dx" or
    "dw". operand: "x", "w" or "e", the gradient of y; "" for the result of a product, dx or dw. rule: how the operand is quantized, "" for
    a result. The figures compare what the product is computed with, q, with what came in, x: of an operand the tensor, or the packed
    operand that is quantized again; of a gradient the product of the operands in the model's dtype, before they were quantized.

    error: |q - x|^2 / |x|^2. gain: <q, x> / <x, x>. cosine: <q, x> / |q| |x|. saturated: share of the numbers in x, zeros left out, beyond
    the largest that their group can hold, 6 times its scale. underflowed: share of them that is zero in q; all of a group may be, whose
    scale is too small for E4M3, and these are not saturated. amax: largest magnitude, of a fresh operand that of the whole tensor, of
    others that of the measured numbers of x. elements: how many numbers were measured. None: not defined, since x is zero, or of no
    meaning for a gradient. NaN: q or x is not finite.
    """

    call: int
    rank: int
    linear: str
    product: str
    operand: str
    rule: str
    error: float | None
    gain: float | None
    cosine: float | None
    saturated: float | None
    underflowed: float | None
    amax: float
    elements: int

    def to_json(self) -> str:
        """One line, valid JSON: what is not finite is the string "NaN", "Infinity" or "-Infinity"."""
        return _ENCODER.encode({key: _writable(value) for key, value in vars(self).items()})

    @classmethod
    def from_json(cls, line: str) -> Observation:
        fields = json.loads(line)
        for name in ("error", "gain", "cosine", "saturated", "underflowed", "amax"):
            fields[name] = _NON_FINITE.get(fields[name], fields[name])
        return cls(**fields)


def _writable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Observations(Sequence[Observation]):
    """Observations in the order in which they were made."""

    def __init__(self, records: Iterable[Observation] = ()) -> None:
        self._all = list(records)

    @property
    def records(self) -> list[Observation]:
        return self._all

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def of(self, linear: str = "*", *, product: str | None = None, operand: str | None = None, call: int | None = None) -> Observations:
        """Those of linears whose names match a glob, of one product, operand or call."""
        return Observations(
            r
            for r in self.records
            if fnmatchcase(r.linear, linear)
            and (product is None or r.product == product)
            and (operand is None or r.operand == operand)
            and (call is None or r.call == call)
        )

    def table(self, linear: str = "*", *, call: int | None = None) -> str:
        """One line a linear, for one call: the last one that is complete if none is named, which is the last one with a gradient.

        linear: a glob over names. Errors in units of 1e-3; saturated and underflowed in percent, the largest of a linear's six operands;
        of several ranks the worst of each.
        """
        if call is None:
            calls = [r.call for r in self.records if r.product != "y"] or [r.call for r in self.records]
            if not calls:
                return f"quartet: {self._nothing()}"
            call = max(calls)
        chosen = self.of(linear, call=call)
        if not len(chosen):
            calls = sorted({r.call for r in self.of(linear)})
            there = f"it was in calls {', '.join(map(str, calls))}" if calls else f"linears are {', '.join({r.linear: 0 for r in self})}"
            return f"quartet: nothing observed of {linear!r} in call {call}; {there}"
        linears: dict[str, list[Observation]] = {}
        for record in chosen:
            linears.setdefault(record.linear, []).append(record)
        rows = [[name, *(cell(own) for _, cell in _COLUMNS)] for name, own in linears.items()]
        header = ["linear", *(title for title, _ in _COLUMNS)]
        ranks = len({r.rank for r in chosen})
        first = f"quartet: call {call}, {len(rows)} linear{'s' * (len(rows) != 1)}" + (f", the worst of {ranks} ranks" if ranks > 1 else "")
        return "\n".join((first, "", _aligned([header, *rows]), "", _LEGEND))

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        calls, linears = len({r.call for r in self}), len({r.linear for r in self})
        return f"<{type(self).__name__} of {linears} linears in {calls} calls: {len(self)} records>"

    def _nothing(self) -> str:
        """That there are no records, in words."""
        return "no observations"

    def plot(self, path: str | Path, linear: str = "*") -> None:
        """Draw the figures over the calls into a file: a thin line for each linear, a thick one for their median.

        linear: a glob over names. Raises RuntimeError where matplotlib is not installed, ValueError where there is nothing to draw.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise RuntimeError("quartet: plots need matplotlib, which is not installed: pip install matplotlib") from error
        chosen = self.of(linear)
        if not len(chosen):
            raise ValueError(f"quartet: nothing observed of linears that match {linear!r}")
        figure = Figure(figsize=(15, 8), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, logarithmic, lines) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
            for position, (label, value, product, operand) in enumerate(lines):
                _draw(axes, chosen.of(product=product, operand=operand), value, f"C{position}", label)
            axes.set_title(title)
            axes.set_xlabel("call")
            if logarithmic and any(y > 0 for line in axes.lines for y in line.get_ydata()):
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path)


def read_observations(*paths: str | Path) -> Observations:
    """What `observe` wrote to these files, such as those of all ranks. Raises ValueError for a line that it did not write."""
    return Observations(_read(path, i, line) for path in paths for i, line in enumerate(_lines(path), 1) if line)


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def _read(path: str | Path, number: int, line: str) -> Observation:
    try:
        return Observation.from_json(line)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, line {number}, is not what quartet.observe writes: {line[:60]!r} ({error})") from error


# ---------------------------------------------------------------- the table


def _worst(values: Iterable[float | None], largest: Callable[..., float] = max) -> float | None:
    """The largest (or smallest) one, NaN if there is one; None where there are none."""
    there = [v for v in values if v is not None]
    if any(math.isnan(v) for v in there):
        return math.nan
    return largest(there, default=None)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(product: str, operand: str) -> Callable[[list[Observation]], str]:
    def cell(own: list[Observation]) -> str:
        worst = _worst(r.error for r in own if (r.product, r.operand) == (product, operand))
        return _cell(None if worst is None else worst * 1e3, ".2f")

    return cell


def _result(product: str, figure: str) -> Callable[[list[Observation]], str]:
    def cell(own: list[Observation]) -> str:
        found = [getattr(r, figure) for r in own if (r.product, r.operand) == (product, "")]
        return _cell(_worst(found, min), ".4f")

    return cell


def _share(figure: str) -> Callable[[list[Observation]], str]:
    def cell(own: list[Observation]) -> str:
        worst = _worst(getattr(r, figure) for r in own)
        return _cell(None if worst is None else worst * 100, ".2f")

    return cell


def _amax(product: str, operand: str) -> Callable[[list[Observation]], str]:
    return lambda own: _cell(_worst(r.amax for r in own if (r.product, r.operand) == (product, operand)), ".2g")


_COLUMNS: list[tuple[str, Callable[[list[Observation]], str]]] = [
    ("y:x", _error("y", "x")), ("y:w", _error("y", "w")),
    ("dx:e", _error("dx", "e")), ("dx:w", _error("dx", "w")), ("dw:e", _error("dw", "e")), ("dw:x", _error("dw", "x")),
    ("cos dx", _result("dx", "cosine")), ("gain dx", _result("dx", "gain")),
    ("cos dw", _result("dw", "cosine")), ("gain dw", _result("dw", "gain")),
    ("sat%", _share("saturated")), ("zero%", _share("underflowed")),
    ("max x", _amax("y", "x")), ("max w", _amax("y", "w")), ("max e", _amax("dw", "e")),
]  # fmt: skip
_LEGEND = """\
y:x to dw:x   relative squared error x 1e-3 of both operands of y, dx and dw
cos, gain     of the gradients, against the product of unquantized operands
sat%, zero%   numbers that saturate, or become zero: the largest share among the operands
max           largest magnitudes"""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------- the plots


_PANELS: list[tuple[str, bool, list[tuple[str, str, str, str]]]] = [
    ("relative squared error, forward", True, [("x", "error", "y", "x"), ("w", "error", "y", "w")]),
    ("relative squared error, backward", True, [
        ("e for dx", "error", "dx", "e"), ("w for dx", "error", "dx", "w"),
        ("e for dw", "error", "dw", "e"), ("x for dw", "error", "dw", "x"),
    ]),
    ("cosine with the unquantized gradient", False, [("dX", "cosine", "dx", ""), ("dW", "cosine", "dw", "")]),
    ("gain against the unquantized gradient", False, [("dX", "gain", "dx", ""), ("dW", "gain", "dw", "")]),
    ("share that becomes zero", True, [
        ("x", "underflowed", "y", "x"), ("w", "underflowed", "y", "w"), ("e for dx", "underflowed", "dx", "e"),
        ("e for dw", "underflowed", "dw", "e"),
    ]),
    ("largest magnitude", True, [("x", "amax", "y", "x"), ("w", "amax", "y", "w"), ("e", "amax", "dw", "e")]),
]  # fmt: skip
"""Title, whether the axis is logarithmic, and (label, figure, product, operand) of each line."""


def _draw(axes: Any, records: Iterable[Observation], figure: str, color: str, label: str) -> None:
    by_linear: dict[str, dict[int, list[float]]] = {}
    by_call: dict[int, list[float]] = {}
    for record in records:
        value = getattr(record, figure)
        if value is not None:
            by_linear.setdefault(record.linear, {}).setdefault(record.call, []).append(value)
            by_call.setdefault(record.call, []).append(value)
    for line in by_linear.values():
        axes.plot(*_points(line), color=color, linewidth=0.5, alpha=0.4)
    axes.plot(*_points(by_call), color=color, linewidth=2, marker="o", markersize=3, label=label)


def _points(values: dict[int, list[float]]) -> Iterator[list[float]]:
    calls = sorted(values)
    yield list(map(float, calls))
    yield [statistics.median(values[call]) for call in calls]
