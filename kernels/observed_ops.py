"""Operators of observed steps: those of `ops`, with their results, which besides show a sample of what they saw to whoever listens.

``observed_call(like)``
    The number of the call that is running, int64 [] on the CPU. Taken in the forward pass, kept for the backward pass, and handed to all
    others, it tells which call of which layers a graph works for at the moment: one graph may serve many.
``quantize_observed(..., call, uses)``, ``quantize_grad_observed``, ``requantize_observed``
    The quantizers of `ops`. uses: what the packed operand is for, such as ["y x layers.0.q", "y x layers.0.k"].
``matmul_observed(..., e, transposed, saved, swapped, call, uses)``
    `ops.matmul` as the product of a backward pass. e, saved: its operands before they were quantized: [R, C], with `transposed` [C, R], and
    [C, N]. swapped: the result is [N, R].

A sample is a copy: what an operator is given may be overwritten before somebody measures it. No operator waits for a GPU.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quartet_compile.kernels import ops, philox
from quartet_compile.kernels.format import GROUP
from quartet_compile.kernels.measure import Again, Fresh, Gradient, Sample

_library = torch.library.Library("quartet", "FRAGMENT")
_a, _b = (f"Tensor {name}_codes, Tensor {name}_scales, Tensor {name}_tensor_scale" for name in "ab")
for _schema in (
    "observed_call(Tensor like) -> Tensor",
    "quantize_observed(Tensor x, str rule, Tensor call, str[] uses) -> (Tensor, Tensor, Tensor)",
    "quantize_grad_observed(Tensor e, Tensor seeds, int index, str rule, bool transpose, Tensor call, str[] uses)"
    " -> (Tensor, Tensor, Tensor)",
    "requantize_observed(Tensor codes, Tensor scales, Tensor tensor_scale, SymInt columns, Tensor seeds, int index, str rule,"
    " Tensor call, str[] uses) -> (Tensor, Tensor, Tensor)",
    f"matmul_observed({_a}, {_b}, Tensor? bias, float scale, ScalarType out_dtype,"
    " Tensor e, bool transposed, Tensor saved, bool swapped, Tensor call, str[] uses) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

quartet = torch.ops.quartet
Packed = tuple[Tensor, Tensor, Tensor]


# ---------------------------------------------------------------- who listens


class Listener(Protocol):
    """What hears of one call of a graph. elements: numbers of a tensor that it wants to see at most, None for all."""

    elements: int | None

    def wants(self, uses: Sequence[str]) -> bool:
        """Whether a sample of a tensor with these uses is new: what checkpointing computes again is not."""

    def take(self, uses: Sequence[str], rule: str, sample: Sample) -> None:
        """rule: of the quantizer, "" for a product."""


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


def _listener(call: Tensor, uses: Sequence[str]) -> Listener | None:
    found = _listeners.get(int(call))
    return found if found is not None and found.wants(uses) else None


# ---------------------------------------------------------------- samples


@functools.lru_cache(maxsize=1024)
def _chosen(count: int, columns: int, elements: int | None, device: torch.device) -> Tensor | None:
    """int64 indices of rows, in order, that hold about this many elements; None for all. The same ones each time."""
    wanted = count if elements is None else max(1, elements // max(1, columns))
    if wanted >= count:
        return None
    generator = torch.Generator("cpu").manual_seed(count)
    return torch.randperm(count, generator=generator, device="cpu")[:wanted].sort().values.to(device)


def _take(x: Tensor, dimension: int, indices: Tensor | None) -> Tensor:
    """A contiguous copy of what is at these indices of a dimension."""
    return x.clone(memory_format=torch.contiguous_format) if indices is None else x.index_select(dimension, indices)


def _bits(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8)  # which can be indexed everywhere


def _seed(seeds: Tensor, index: int) -> Tensor:
    return philox.signed_seeds(seeds[index], ops.rank())


def _fresh(x: Tensor, packed: Packed, elements: int | None, seed: Tensor | None) -> Fresh:
    rows = _chosen(*x.shape, elements, x.device)
    codes, scales, tensor_scale = packed
    amax = torch.linalg.vector_norm(x, ord=torch.inf, dtype=torch.float32) if x.numel() else tensor_scale.new_zeros(())
    return Fresh(_take(x, 0, rows), _take(codes, 0, rows), _take(_bits(scales), 0, rows), tensor_scale.clone(), amax, seed)


def _again(source: Packed, packed: Packed, columns: int, elements: int | None, seed: Tensor) -> Again:
    count, device = source[0].shape[0], source[0].device
    rows = _chosen(columns, count, elements, device)
    every = torch.arange(columns, device=device) if rows is None else rows
    codes, scales, tensor_scale = packed
    return Again(
        source[0].index_select(1, every // 2), every % 2 == 1, _bits(source[1]).index_select(1, every // GROUP), source[2].clone(),
        _take(codes, 0, rows), _take(_bits(scales), 0, rows), tensor_scale.clone(), seed,
    )  # fmt: skip


def _gradient(result: Tensor, left: Tensor, right: Tensor, elements: int | None) -> Gradient:
    """result [R, N]; left [R, C] and right [C, N] as they were before they were quantized."""
    rows = _chosen(*result.shape, elements, result.device)
    few = left if rows is None else left.index_select(0, rows)
    with torch.autocast(result.device.type, enabled=False):
        # On a CPU the same sums: many have no product of bfloat16 numbers that is worth the name.
        product = few.to(right.dtype) @ right if result.is_cuda else (few.float() @ right.float()).to(right.dtype)
    return Gradient(_take(result, 0, rows), product)


# ---------------------------------------------------------------- operators


def _observed_call(like: Tensor) -> Tensor:
    return torch.tensor(getattr(_running, "number", 0), device="cpu")


def _quantize_observed(x: Tensor, rule: str, call: Tensor, uses: list[str]) -> Packed:
    packed = quartet.quantize(x, rule)
    if (listener := _listener(call, uses)) is not None:
        listener.take(uses, rule, _fresh(x, packed, listener.elements, None))
    return packed


def _quantize_grad_observed(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, call: Tensor, uses: list[str]) -> Packed:
    packed = quartet.quantize_grad(e, seeds, index, rule, transpose)
    if (listener := _listener(call, uses)) is not None:
        listener.take(uses, rule, _fresh(e.t() if transpose else e, packed, listener.elements, _seed(seeds, index)))
    return packed


def _requantize_observed(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str, call: Tensor, uses: list[str]
) -> Packed:
    packed = quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule)
    if (listener := _listener(call, uses)) is not None:
        listener.take(uses, rule, _again((codes, scales, tensor_scale), packed, columns, listener.elements, _seed(seeds, index)))
    return packed


def _matmul_observed(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
    e: Tensor, transposed: bool, saved: Tensor, swapped: bool, call: Tensor, uses: list[str],
) -> Tensor:  # fmt: skip
    result = quartet.matmul(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)
    if (listener := _listener(call, uses)) is not None:
        sample = _gradient(result.t() if swapped else result, e.t() if transposed else e, saved, listener.elements)
        listener.take(uses, "", sample)
    return result


# ---------------------------------------------------------------- shapes: those of the operators without "_observed"


@torch.library.register_fake("quartet::observed_call", lib=_library)
def _observed_call_fake(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("quartet::quantize_observed", lib=_library)
def _quantize_observed_fake(x: Tensor, rule: str, call: Tensor, uses: list[str]) -> Packed:
    return quartet.quantize(x, rule)


@torch.library.register_fake("quartet::quantize_grad_observed", lib=_library)
def _quantize_grad_observed_fake(
    e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, call: Tensor, uses: list[str]
) -> Packed:
    return quartet.quantize_grad(e, seeds, index, rule, transpose)


@torch.library.register_fake("quartet::requantize_observed", lib=_library)
def _requantize_observed_fake(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str, call: Tensor, uses: list[str]
) -> Packed:
    return quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule)


@torch.library.register_fake("quartet::matmul_observed", lib=_library)
def _matmul_observed_fake(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
    e: Tensor, transposed: bool, saved: Tensor, swapped: bool, call: Tensor, uses: list[str],
) -> Tensor:  # fmt: skip
    return quartet.matmul(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)


for _function in (_observed_call, _quantize_observed, _quantize_grad_observed, _requantize_observed, _matmul_observed):
    for _device in ("CPU", "CUDA"):
        _library.impl(_function.__name__.removeprefix("_"), _function, _device)
