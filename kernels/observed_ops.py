"""Operators of observed steps: those of `ops`, with their results, which besides are measured, and one that shows what was measured.

``observed_call(like)``
    The number of the call that is running, int64 [] on the CPU. Taken in the forward pass, kept for the backward pass, and handed to all
    others, it tells which call of which layers a graph works for at the moment: one graph may serve many.
``quantize_observed(..., elements, call, uses)``, ``quantize_grad_observed``, ``requantize_observed``
    The quantizers of `ops`. uses: what the packed operand is for, such as ["y x layers.0.q", "y x layers.0.k"]. elements: numbers to be
    measured at most, 0 for all.
``matmul_observed(..., e, transposed, saved, swapped, elements, call, uses)``
    `ops.matmul` as the product of a backward pass. e, saved: its operands before they were quantized: [R, C], with `transposed` [C, R], and
    [C, N]. swapped: the result is [N, R].
``show(seen, call, sums, labels)``
    Give whoever listens to this call the sums that an operator of `measure_ops` returned, each with its label (`label`). seen: any tensor;
    written to, as far as compilers know, so that they do not leave the operator out.

The first four stand for what `passes.show` writes in place of them once the graphs are split: the plain operator, one of `measure_ops`, and
one `show` at the end of the graph. That is also what they do where nobody compiles. A `show` copies what it is given and does not wait for
a GPU. It and `observed_call` are no part of CUDA graphs; all others may be.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quartet_compile.kernels import measure_ops, ops  # noqa: F401  (register the operators)

_library = torch.library.Library("quartet", "FRAGMENT")
_a, _b = (f"Tensor {name}_codes, Tensor {name}_scales, Tensor {name}_tensor_scale" for name in "ab")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
for _schema in (
    "observed_call(Tensor like) -> Tensor",
    "show(Tensor(a!) seen, Tensor call, Tensor[] sums, str[] labels) -> ()",
):
    _library.define(_schema, tags=(*_TAGS, torch.Tag.cudagraph_unsafe))  # a replay runs no Python
for _schema in (
    "quantize_observed(Tensor x, str rule, int elements, Tensor call, str[] uses) -> (Tensor, Tensor, Tensor)",
    "quantize_grad_observed(Tensor e, Tensor seeds, int index, str rule, bool transpose, int elements, Tensor call, str[] uses)"
    " -> (Tensor, Tensor, Tensor)",
    "requantize_observed(Tensor codes, Tensor scales, Tensor tensor_scale, SymInt columns, Tensor seeds, int index, str rule,"
    " int elements, Tensor call, str[] uses) -> (Tensor, Tensor, Tensor)",
    f"matmul_observed({_a}, {_b}, Tensor? bias, float scale, ScalarType out_dtype,"
    " Tensor e, bool transposed, Tensor saved, bool swapped, int elements, Tensor call, str[] uses) -> Tensor",
):
    _library.define(_schema, tags=_TAGS)

quartet = torch.ops.quartet
Packed = tuple[Tensor, Tensor, Tensor]


# ---------------------------------------------------------------- who listens


def label(rule: str, uses: Sequence[str]) -> str:
    """What sums are of, in one string. rule: of the quantizer, "" for a product."""
    return "\n".join((rule, *uses))


class Listener(Protocol):
    """What hears of one call of a graph."""

    def take(self, labels: Sequence[str], sums: Tensor) -> None:
        """sums: float64 [n, parts, 9], n of them, on the device that they were made on."""


_listeners: WeakValueDictionary[int, Listener] = WeakValueDictionary()
_numbers = itertools.count(1)
_running = threading.local()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Give the call of a compiled graph inside a number under which its operators, those of its backward pass too, find the listener. They
    find nobody once it is gone."""
    number, before = next(_numbers), getattr(_running, "number", 0)
    _listeners[number], _running.number = listener, number
    try:
        yield
    finally:
        _running.number = before


# ---------------------------------------------------------------- operators


def _show(seen: Tensor, call: Tensor, sums: list[Tensor], labels: list[str]) -> None:
    listener = _listeners.get(int(call))
    if listener is not None:
        listener.take(labels, torch.stack(sums))


def _show_one(call: Tensor, sums: Tensor, rule: str, uses: list[str]) -> None:
    _show(call, call, [sums], [label(rule, uses)])


def _observed_call(like: Tensor) -> Tensor:
    return torch.tensor(getattr(_running, "number", 0), device="cpu")


def _quantize_observed(x: Tensor, rule: str, elements: int, call: Tensor, uses: list[str]) -> Packed:
    packed = quartet.quantize(x, rule)
    _show_one(call, quartet.measure_fresh(x, quartet.largest(x), False, *packed, None, 0, elements), rule, uses)
    return packed


def _quantize_grad_observed(
    e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, elements: int, call: Tensor, uses: list[str]
) -> Packed:
    packed = quartet.quantize_grad(e, seeds, index, rule, transpose)
    _show_one(call, quartet.measure_fresh(e, quartet.largest(e), transpose, *packed, seeds, index, elements), rule, uses)
    return packed


def _requantize_observed(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str,
    elements: int, call: Tensor, uses: list[str],
) -> Packed:  # fmt: skip
    packed = quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule)
    sums = quartet.measure_saved(codes, scales, tensor_scale, columns, *packed, seeds, index, elements)
    _show_one(call, sums, rule, uses)
    return packed


def _matmul_observed(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
    e: Tensor, transposed: bool, saved: Tensor, swapped: bool, elements: int, call: Tensor, uses: list[str],
) -> Tensor:  # fmt: skip
    result = quartet.matmul(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)
    _show_one(call, quartet.measure_product(result, swapped, e, transposed, saved, elements), "", uses)
    return result


# ---------------------------------------------------------------- shapes: those of the operators without "_observed"


@torch.library.register_fake("quartet::show", lib=_library)
def _show_fake(seen: Tensor, call: Tensor, sums: list[Tensor], labels: list[str]) -> None:
    if len(sums) != len(labels):
        raise ValueError(f"quartet.show: {len(sums)} sums and {len(labels)} labels")


@torch.library.register_fake("quartet::observed_call", lib=_library)
def _observed_call_fake(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("quartet::quantize_observed", lib=_library)
def _quantize_observed_fake(x: Tensor, rule: str, elements: int, call: Tensor, uses: list[str]) -> Packed:
    return quartet.quantize(x, rule)


@torch.library.register_fake("quartet::quantize_grad_observed", lib=_library)
def _quantize_grad_observed_fake(
    e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, elements: int, call: Tensor, uses: list[str]
) -> Packed:
    return quartet.quantize_grad(e, seeds, index, rule, transpose)


@torch.library.register_fake("quartet::requantize_observed", lib=_library)
def _requantize_observed_fake(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str,
    elements: int, call: Tensor, uses: list[str],
) -> Packed:  # fmt: skip
    return quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule)


@torch.library.register_fake("quartet::matmul_observed", lib=_library)
def _matmul_observed_fake(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
    e: Tensor, transposed: bool, saved: Tensor, swapped: bool, elements: int, call: Tensor, uses: list[str],
) -> Tensor:  # fmt: skip
    return quartet.matmul(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)


for _function in (_show, _observed_call, _quantize_observed, _quantize_grad_observed, _requantize_observed, _matmul_observed):
    for _device in ("CPU", "CUDA"):
        _library.impl(_function.__name__.removeprefix("_"), _function, _device)
