"""`cases` of the operators of observed steps (`kernels.observed_ops`, `kernels.measure_ops`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quartet_compile.cli.cases import BACKWARD, COLUMNS, FORWARD, ROWS, SEEDS, A, B, gauss, gradient, packed, saved
from quartet_compile.cli.comparing import Difference, elements, matrices, product
from quartet_compile.kernels import measure, philox, reference_ops
from quartet_compile.kernels.format import Quantized
from quartet_compile.kernels.observed_ops import heard_by
from quartet_compile.kernels.value_ops import product_order, values_of

quartet = torch.ops.quartet


# ---------------------------------------------------------------- operators that are heard of


class _Ear:
    """Hears of everything."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.sums: list[Tensor] = []

    def take(self, labels: Sequence[str], sums: Tensor) -> None:
        self.labels += labels
        self.sums += sums.unbind()


def _observed(device: torch.device, run: Callable[[Tensor], list[Difference]]) -> list[Difference]:
    """What `run` finds for the number of a call, and that whoever listens hears of it once."""
    ear = _Ear()
    with heard_by(ear):
        found = run(quartet.observed_call(torch.empty(0, device=device)))
    return [*found, Difference("heard of", abs(len(ear.labels) - 1), 1)]


def _observed_call(device: torch.device) -> list[Difference]:
    """Another number in each call, 0 outside of all; on the CPU."""
    like, numbers = torch.empty(0, device=device), [quartet.observed_call(torch.empty(0, device=device))]
    for _ in range(2):
        with heard_by(_Ear()):
            numbers.append(quartet.observed_call(like))
    first, *others = numbers
    wrong = [first.item() != 0, len({n.item() for n in numbers}) != 3, any(n.device.type != "cpu" for n in others)]
    return [Difference("numbers of calls", sum(wrong), 3)]


def _show(device: torch.device) -> list[Difference]:
    """What is shown arrives with its labels, and is a copy."""
    ear, sums = _Ear(), [torch.full((1, measure.SUMS), float(i), device=device, dtype=torch.float64) for i in range(2)]
    with heard_by(ear):
        quartet.show(torch.empty(0), quartet.observed_call(sums[0]), sums, ["a", "b"])
    sums[0].fill_(9)
    wrong = [ear.labels != ["a", "b"], [s.mean().item() for s in ear.sums] != [0, 1]]
    return [Difference("what is shown", sum(wrong), 2)]


def _quantize_observed(device: torch.device) -> list[Difference]:
    x = gauss(ROWS, COLUMNS)
    return _observed(
        device,
        lambda call: matrices(
            quartet.quantize_observed(x.to(device), FORWARD, 0, call, ["y x"]), reference_ops.quantize(x, FORWARD), near_ties=False
        ),
    )


def _quantize_grad_observed(device: torch.device) -> list[Difference]:
    e, seeds, near = gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), device.type != "cpu"
    return _observed(
        device,
        lambda call: matrices(quartet.quantize_grad_observed(e, seeds, 1, BACKWARD, True, 0, call, ["dw e"]), gradient(True, 1), near),
    )


def _requantize_observed(device: torch.device) -> list[Difference]:
    source, expected = saved()
    ours, seeds = [t.to(device) for t in source], SEEDS.to(device)
    return _observed(
        device,
        lambda call: matrices(
            quartet.requantize_observed(*ours, COLUMNS, seeds, 2, BACKWARD, 0, call, ["dx w"]), expected, device.type != "cpu"
        ),
    )


def _matmul_observed(device: torch.device) -> list[Difference]:
    e, right = (q.dequantize(torch.bfloat16).to(device) for q in (A, B))

    def run(call: Tensor) -> list[Difference]:
        ours = quartet.matmul_observed(
            *packed(A, device), *packed(B, device), None, 2.0**-7, torch.bfloat16, e, False, right.t(), False, 0, call, ["dx -"]
        )
        expected = product(A.dequantize(torch.float64), B.dequantize(torch.float64), scale=2.0**-7, dtype=torch.bfloat16)
        return [elements("numbers", ours, expected)]

    return _observed(device, run)


# ---------------------------------------------------------------- operators that measure


def _sums(ours: Tensor, expected: Tensor) -> list[Difference]:
    """Sums beside those of the definition; counts may differ where a rotation in float32 moves a number over a bound."""
    totals = torch.cat([ours.cpu()[:, :7].sum(0), ours.cpu()[:, 7:8].amax(0), ours.cpu()[:, 8:].sum(0)])
    off = (totals - expected[0]).abs() / expected[0].abs().clamp(min=1e-300)
    wrong = [*(off[[0, 1, 2, 3, 7, 8]] > 1e-4), *((totals - expected[0])[4:7].abs() > 2 + 2e-3 * expected[0, 8])]
    return [Difference("sums", int(sum(wrong)), measure.SUMS)]


def _largest(device: torch.device) -> list[Difference]:
    x = gauss(ROWS, COLUMNS)
    return [Difference("largest magnitude", int(quartet.largest(x.to(device)).item() != x.abs().max().item()), 1)]


def _fresh() -> tuple[Tensor, Tensor, Quantized, Tensor]:
    """A gradient, its packed transpose, and the sums of them."""
    e, transposed = gauss(ROWS, COLUMNS), Quantized(*gradient(True, 1))
    rows, signs, amax = torch.arange(COLUMNS), philox.rotation_signs(int(SEEDS[1])), e.abs().max().float()
    return e, amax, transposed, measure.fresh_sums(e.t(), rows, amax, measure.rows_of_packed(transposed, rows), signs)


def _measure_fresh(device: torch.device) -> list[Difference]:
    e, amax, transposed, expected = _fresh()
    ours = quartet.measure_fresh(e.to(device), amax.to(device), True, *packed(transposed, device), SEEDS.to(device), 1, 0)
    plain, rows = Quantized(*reference_ops.quantize(e, FORWARD)), torch.arange(ROWS)
    as_it_is = quartet.measure_fresh(e.to(device), amax.to(device), False, *packed(plain, device), None, 0, 0)
    return [
        *_sums(ours, expected),
        *_sums(as_it_is, measure.fresh_sums(e, rows, amax, measure.rows_of_packed(plain, rows), None)),
    ]


def _measure_fresh_values(device: torch.device) -> list[Difference]:
    e, amax, transposed, expected = _fresh()
    values = product_order(values_of(*packed(transposed, torch.device("cpu")), scale=2.0**-7)).to(device)
    ours = quartet.measure_fresh_values(e.to(device), amax.to(device), True, values, 2.0**-7, SEEDS.to(device), 1, BACKWARD, 0)
    return _sums(ours, expected)


def _again() -> tuple[tuple[Tensor, ...], Quantized, Tensor]:
    """A saved operand, what it becomes, and the sums of them."""
    source, again = saved()
    rows, signs = torch.arange(COLUMNS), philox.rotation_signs(int(SEEDS[2]))
    return source, Quantized(*again), measure.saved_sums(Quantized(*source), rows, measure.rows_of_packed(Quantized(*again), rows), signs)


def _measure_saved(device: torch.device) -> list[Difference]:
    source, again, expected = _again()
    ours = quartet.measure_saved(*(t.to(device) for t in source), COLUMNS, *packed(again, device), SEEDS.to(device), 2, 0)
    return _sums(ours, expected)


def _measure_saved_values(device: torch.device) -> list[Difference]:
    source, again, expected = _again()
    values = product_order(values_of(*packed(again, torch.device("cpu")))).to(device)
    ours = quartet.measure_saved_values(*(t.to(device) for t in source), COLUMNS, values, SEEDS.to(device), 2, BACKWARD, 0)
    return _sums(ours, expected)


def _measure_product(device: torch.device) -> list[Difference]:
    """Of a product with itself, whose operands are exact in bfloat16."""
    left, right = (q.dequantize(torch.bfloat16) for q in (A, B))
    result = product(left.double(), right.double(), dtype=torch.bfloat16)
    ours = quartet.measure_product(result.to(device), False, left.to(device), False, right.t().to(device), 0)
    return _sums(ours, measure.product_sums(result, torch.arange(ROWS), result))


CASES: dict[str, Callable[[torch.device], list[Difference]]] = {
    case.__name__.removeprefix("_"): case
    for case in (
        _observed_call, _show, _quantize_observed, _quantize_grad_observed, _requantize_observed, _matmul_observed, _largest,
        _measure_fresh, _measure_fresh_values, _measure_saved, _measure_saved_values, _measure_product,
    )
}  # fmt: skip
"""Operator -> its self-test."""
