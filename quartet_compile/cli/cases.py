"""What `quartet doctor` computes with each operator of the namespace ``quartet``, and what should come out.

A case computes an operator on small matrices that fill no tile, and what it should give, on the CPU: by `reference_ops`, by the formula of
its docstring or in float64. Products multiply numbers of few bits, whose sums are exact in any order. What may differ is stated: nothing on
a CPU, nothing where nothing is rotated; on a GPU a rotation adds 128 numbers in another order, so that a number that lies within 3e-6 of a
midpoint, or of its draw, may be rounded to the other side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import quartet_compile.backend  # noqa: F401  (registers every operator)
from quartet_compile.cli.comparing import Difference, bits, elements, matrices, product, row_by_row, swizzled_places, values
from quartet_compile.kernels import philox, reference, reference_ops
from quartet_compile.kernels.format import ROTATION, Quantized, ceil_to
from quartet_compile.kernels.grouped_ops import padded_rows
from quartet_compile.kernels.value_ops import product_order, values_of

quartet = torch.ops.quartet

FORWARD, BACKWARD = "four_over_six", "ms_eden"
SEEDS = torch.tensor([12345, -(2**62) - 977, 2**63 - 1])
ROWS, COLUMNS = 130, 150


# ---------------------------------------------------------------- matrices


def gauss(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in bfloat16, one of a hundred 300 times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, x * 300, x).bfloat16()


def exact(rows: int, columns: int, exponent: int, seed: int) -> Quantized:
    """A packed matrix of any codes, scales 1/2, 1 and 2, and the tensor scale 2^exponent: sums of 4096 products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = torch.tensor([0.5, 1, 2])[torch.randint(0, 3, (rows, columns // 16), generator=generator)]
    return Quantized(codes, scales.to(torch.float8_e4m3fn), torch.tensor(2.0**exponent))


def packed(q: Quantized, device: torch.device) -> list[Tensor]:
    return [t.to(device) for t in (q.codes, q.scales, q.tensor_scale)]


# ---------------------------------------------------------------- cases: quantizers


def _quantize(device: torch.device) -> list[Difference]:
    x = gauss(ROWS, COLUMNS)
    return matrices(quartet.quantize(x.to(device), FORWARD), reference_ops.quantize(x, FORWARD), near_ties=False)


def _quantize_with_values(device: torch.device) -> list[Difference]:
    x = gauss(ROWS, COLUMNS)
    *ours, numbers = quartet.quantize_with_values(x.to(device), FORWARD)
    expected = reference_ops.quantize(x, FORWARD)
    return [*matrices(tuple(ours), expected, near_ties=False), *values(numbers, values_of(*expected), near_ties=False)]


def _quantize_values(device: torch.device) -> list[Difference]:
    x = gauss(ROWS, COLUMNS)
    return values(quartet.quantize_values(x.to(device), FORWARD), values_of(*reference_ops.quantize(x, FORWARD)), near_ties=False)


def gradient(transpose: bool, index: int) -> tuple[Tensor, ...]:
    return reference_ops.quantize_grad(gauss(ROWS, COLUMNS), SEEDS, index, BACKWARD, transpose, 0)


def _quantize_grad(device: torch.device) -> list[Difference]:
    e, seeds, near = gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), device.type != "cpu"
    straight, turned = (quartet.quantize_grad(e, seeds, index, BACKWARD, turn) for index, turn in ((0, False), (1, True)))
    return [*matrices(straight, gradient(False, 0), near), *matrices(turned, gradient(True, 1), near)]


def _quantize_grad_both(device: torch.device) -> list[Difference]:
    ours = quartet.quantize_grad_both(gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), 0, 1, BACKWARD)
    return matrices(ours, (*gradient(False, 0), *gradient(True, 1)), device.type != "cpu")


def _quantize_grad_swizzled(device: torch.device) -> list[Difference]:
    ours = quartet.quantize_grad_swizzled(gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), 0, BACKWARD, False)
    return matrices(row_by_row(ours), gradient(False, 0), device.type != "cpu")


def _quantize_grad_both_swizzled(device: torch.device) -> list[Difference]:
    ours = quartet.quantize_grad_both_swizzled(gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), 0, 1, BACKWARD)
    return matrices(row_by_row(ours), (*gradient(False, 0), *gradient(True, 1)), device.type != "cpu")


def saved() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(a packed matrix, what it should be requantized to)"""
    forward = reference_ops.quantize(gauss(ROWS, COLUMNS), FORWARD)
    return forward, reference_ops.requantize(*forward, COLUMNS, SEEDS, 2, BACKWARD, 0)


def _requantize(device: torch.device) -> list[Difference]:
    source, expected = saved()
    ours = quartet.requantize(*(t.to(device) for t in source), COLUMNS, SEEDS.to(device), 2, BACKWARD)
    return matrices(ours, expected, device.type != "cpu")


def _requantize_swizzled(device: torch.device) -> list[Difference]:
    source, expected = saved()
    ours = quartet.requantize_swizzled(*(t.to(device) for t in source), COLUMNS, SEEDS.to(device), 2, BACKWARD)
    return matrices(row_by_row(ours), expected, device.type != "cpu")


def _rotations(device: torch.device) -> list[Difference]:
    """By what they are for: x rotated is [f F + b B, f F - b B] for the halves f and b of x, columns in the order of the tensor cores."""
    x = torch.randint(-8, 9, (5, ROTATION), generator=torch.Generator().manual_seed(0)).float()
    found = []
    for seed, matrix in zip(SEEDS.tolist(), quartet.rotations(SEEDS.to(device)).cpu().float(), strict=True):
        front, back = x[:, :64] @ matrix[0], x[:, 64:] @ matrix[1]
        rotated = reference.rotate(x, philox.rotation_signs(philox.seed_for_rank(seed, 0))).unflatten(1, (2, 4, 8, 2))
        expected = rotated.transpose(2, 3).flatten(2)
        found.append(elements("rotated numbers", torch.stack((front + back, front - back), 1), expected))
    return found


def _grad_values(device: torch.device) -> list[Difference]:
    e, seeds, near = gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), device.type != "cpu"
    found = []
    for index, transpose in ((0, False), (1, True)):
        ours = quartet.grad_values(e, quartet.rotations(seeds), seeds, index, BACKWARD, transpose, 2.0**-7)
        found += values(ours, product_order(values_of(*gradient(transpose, index), scale=2.0**-7)), near)
    return found


def _grad_values_both(device: torch.device) -> list[Difference]:
    e, seeds, near = gauss(ROWS, COLUMNS).to(device), SEEDS.to(device), device.type != "cpu"
    both = quartet.grad_values_both(e, quartet.rotations(seeds), seeds, 0, 1, BACKWARD, 2.0**-7)
    expected = (product_order(values_of(*gradient(turn, index), scale=2.0**-7)) for index, turn in ((0, False), (1, True)))
    return [d for ours, theirs in zip(both, expected, strict=True) for d in values(ours, theirs, near)]


def _requantize_values(device: torch.device) -> list[Difference]:
    (source, expected), seeds = saved(), SEEDS.to(device)
    ours = quartet.requantize_values(*(t.to(device) for t in source), COLUMNS, quartet.rotations(seeds), seeds, 2, BACKWARD)
    return values(ours, product_order(values_of(*expected)), device.type != "cpu")


def _swizzle(device: torch.device) -> list[Difference]:
    scales = exact(ROWS, 160, 0, seed=1).scales
    expected = torch.zeros(ceil_to(ROWS, 128) * ceil_to(scales.shape[1], 4), dtype=torch.uint8)
    expected[swizzled_places(*scales.shape)] = bits(scales)
    return [elements("scales", bits(quartet.swizzle(scales.to(device))), expected)]


# ---------------------------------------------------------------- cases: products


A, B = exact(ROWS, 160, -3, seed=1), exact(72, 160, -2, seed=2)
BIAS = torch.arange(-36, 36) / 16


def _products(device: torch.device, a: list[Tensor], b: list[Tensor], run: Callable[..., Tensor]) -> list[Difference]:
    left, right, found = A.dequantize(torch.float64), B.dequantize(torch.float64), []
    for dtype, bias in ((torch.float32, BIAS), (torch.bfloat16, None)):
        ours = run(*a, *b, None if bias is None else bias.to(device), 2.0**-7, dtype)
        expected = product(left, right, scale=2.0**-7, bias=bias, dtype=dtype)
        found.append(elements(f"{dtype} numbers".removeprefix("torch."), ours, expected))
    return found


def _matmul(device: torch.device) -> list[Difference]:
    return _products(device, packed(A, device), packed(B, device), quartet.matmul)


def _matmul_swizzled(device: torch.device) -> list[Difference]:
    a, b = packed(A, device), packed(B, device)
    for each in (a, b):
        each[1] = quartet.swizzle(each[1])
    return _products(device, a, b, quartet.matmul_swizzled)


def _matmul_values(device: torch.device) -> list[Difference]:
    a, b = (q.dequantize(torch.bfloat16) for q in (A, B))
    found = []
    for dtype, bias in ((torch.float32, BIAS), (torch.bfloat16, None)):
        ours = quartet.matmul_values(a.to(device), b.to(device), None if bias is None else bias.to(device), dtype)
        found.append(elements(f"{dtype} numbers".removeprefix("torch."), ours, product(a, b, bias=bias, dtype=dtype)))
    return found


# ---------------------------------------------------------------- cases: products of groups

TOKENS, ENDS = 230, [40, 40, 168, 200]
"""A ragged group, an empty one, one of exactly 128 tokens, another ragged one, and tokens behind the last end."""


def _grouped() -> tuple[list[int], list[int], list[int]]:
    """padded ends, sources and places of `group_rows`, one token at a time."""
    ends, sources, places = [], [-1] * padded_rows(TOKENS, len(ENDS)), [-1] * TOKENS
    row = 0
    for start, end in itertools.pairwise([0, *ENDS]):
        for token in range(start, end):
            sources[row], places[token] = token, row
            row += 1
        row += -row % ROTATION
        ends.append(row)
    return ends, sources, places


def _group_rows(device: torch.device) -> list[Difference]:
    ours = quartet.group_rows(torch.tensor(ENDS, dtype=torch.int32, device=device), TOKENS)
    expected = [torch.tensor(t, dtype=torch.int32) for t in _grouped()]
    return [elements("rows", *pair) for pair in zip(ours, expected, strict=True)]


def _take_rows(device: torch.device) -> list[Difference]:
    x, (_, sources, _) = gauss(TOKENS, 48), _grouped()
    rows = [x[source] if source >= 0 else torch.zeros(48, dtype=x.dtype) for source in sources]
    ours = quartet.take_rows(x.to(device), torch.tensor(sources, dtype=torch.int32, device=device))
    return [elements("numbers", ours, torch.stack(rows))]


def _grouped_matmul(device: torch.device) -> list[Difference]:
    (ends, sources, _), outs, ins, found = _grouped(), 48, 64, []
    a = exact(len(sources), ins, -3, seed=3)
    for across in (False, True):
        b = exact(*((outs, len(ends) * ins) if across else (len(ends) * outs, ins)), -2, seed=4)
        place = torch.tensor(ends, dtype=torch.int32, device=device)
        ours = quartet.grouped_matmul(*packed(a, device), *packed(b, device), place, across, 0.5)
        left, right = a.dequantize(torch.float64), b.dequantize(torch.float64)
        for group, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            matrix = right[:, group * ins : (group + 1) * ins] if across else right[group * outs : (group + 1) * outs]
            expected = product(left[start:end], matrix, scale=0.5, dtype=torch.bfloat16)
            found.append(elements("numbers", ours[start:end], expected))
    return found


def _grouped_outer(device: torch.device) -> list[Difference]:
    ends, sources, _ = _grouped()
    a, b = exact(64, len(sources), -3, seed=5), exact(48, len(sources), -2, seed=6)
    left, right = a.dequantize(torch.float64), b.dequantize(torch.float64)
    spans = list(itertools.pairwise([0, *ends]))
    expected = torch.stack([product(left[:, s:e], right[:, s:e], scale=0.5, dtype=torch.bfloat16) for s, e in spans])
    place = torch.tensor(ends, dtype=torch.int32, device=device)
    return [elements("numbers", quartet.grouped_outer(*packed(a, device), *packed(b, device), place, 0.5), expected)]


CASES: dict[str, Callable[[torch.device], list[Difference]]] = {
    case.__name__.removeprefix("_"): case
    for case in (
        _quantize, _quantize_with_values, _quantize_values, _quantize_grad, _quantize_grad_both, _quantize_grad_swizzled,
        _quantize_grad_both_swizzled, _requantize, _requantize_swizzled, _requantize_values, _rotations, _grad_values, _grad_values_both,
        _swizzle, _matmul, _matmul_swizzled, _matmul_values, _group_rows, _take_rows, _grouped_matmul, _grouped_outer,
    )
}  # fmt: skip
"""Operator -> its self-test. Those of observed steps are in `observed_cases`."""
