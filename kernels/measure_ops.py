"""Operators that measure what quantization made of tensors, on observed steps: each returns sums (`measure.SUMS`) and waits for nobody.

``largest(x)``
    The largest magnitude of a matrix, float32 []; NaN if one of its numbers is.
``measure_fresh(x, amax, transposed, codes, scales, tensor_scale, seeds, index, elements)``
    x [M, K], or with `transposed` [K, M], whose largest magnitude is amax, and what ``quantize`` made of it, or with seeds
    ``quantize_grad``.
``measure_saved(source_codes, source_scales, source_tensor_scale, columns, codes, scales, tensor_scale, seeds, index, elements)``
    A packed matrix and what ``requantize`` made of it.
``measure_fresh_values(x, amax, transposed, values, scale, seeds, index, rule, elements)``
``measure_saved_values(source_codes, source_scales, source_tensor_scale, columns, values, seeds, index, rule, elements)``
    The same of operands of which the values were made (`value_ops`), times `scale`, and no packed matrix.
``measure_product(result, swapped, e, transposed, saved, elements)``
    A product of quantized operands, result [R, N], or with `swapped` [N, R]; and what the operands were: e [R, C], or with `transposed`
    [C, R], and saved [C, N].

All but the first return float64 [1, 9], on a GPU [128, 9], of which the rows belong together. elements: numbers to be measured at most,
in rows of the operand or of [R, N] that `measure.chosen_rows` names; 0: all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet_compile.kernels import measure, ops, philox
from quartet_compile.kernels.cpu import sums
from quartet_compile.kernels.format import Quantized

PARTS_ON_GPU = 128
"""Rows of sums that a kernel writes: the programs that it runs in."""

_library = torch.library.Library("quartet", "FRAGMENT")
_packed = "Tensor codes, Tensor scales, Tensor tensor_scale"
for _schema in (
    "largest(Tensor x) -> Tensor",
    f"measure_fresh(Tensor x, Tensor amax, bool transposed, {_packed}, Tensor? seeds, int index, int elements) -> Tensor",
    "measure_saved(Tensor source_codes, Tensor source_scales, Tensor source_tensor_scale, SymInt columns,"
    f" {_packed}, Tensor seeds, int index, int elements) -> Tensor",
    "measure_fresh_values(Tensor x, Tensor amax, bool transposed, Tensor values, float scale, Tensor seeds, int index, str rule,"
    " int elements) -> Tensor",
    "measure_saved_values(Tensor source_codes, Tensor source_scales, Tensor source_tensor_scale, SymInt columns,"
    " Tensor values, Tensor seeds, int index, str rule, int elements) -> Tensor",
    "measure_product(Tensor result, bool swapped, Tensor e, bool transposed, Tensor saved, int elements) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


# ---------------------------------------------------------------- CPU


def _seed(seeds: Tensor, index: int) -> int:
    return philox.seed_for_rank(int(seeds[index]), ops.rank())


def _measure_fresh_cpu(
    x: Tensor, amax: Tensor, transposed: bool, codes: Tensor, scales: Tensor, tensor_scale: Tensor,
    seeds: Tensor | None, index: int, elements: int,
) -> Tensor:  # fmt: skip
    x = x.t() if transposed else x
    rows = measure.chosen_rows(x.shape[0], measure.chosen(x.shape, elements))
    seed = None if seeds is None else _seed(seeds, index)
    return sums.fresh_sums(x, rows, amax, Quantized(codes, scales, tensor_scale), seed)


def _measure_saved_cpu(
    source_codes: Tensor, source_scales: Tensor, source_tensor_scale: Tensor, columns: int,
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, seeds: Tensor, index: int, elements: int,
) -> Tensor:  # fmt: skip
    rows = measure.chosen_rows(columns, measure.chosen((columns, source_codes.shape[0]), elements))
    source, packed = Quantized(source_codes, source_scales, source_tensor_scale), Quantized(codes, scales, tensor_scale)
    return sums.saved_sums(source, rows, packed, _seed(seeds, index))


def _measure_fresh_values_cpu(
    x: Tensor, amax: Tensor, transposed: bool, values: Tensor, scale: float, seeds: Tensor, index: int, rule: str, elements: int
) -> Tensor:
    x = x.t() if transposed else x
    rows = measure.chosen_rows(x.shape[0], measure.chosen(x.shape, elements))
    signs = philox.rotation_signs(_seed(seeds, index))
    return measure.fresh_sums(x, rows, amax, measure.rows_of_values(values, rows, scale), signs)


def _measure_saved_values_cpu(
    source_codes: Tensor, source_scales: Tensor, source_tensor_scale: Tensor, columns: int,
    values: Tensor, seeds: Tensor, index: int, rule: str, elements: int,
) -> Tensor:  # fmt: skip
    rows = measure.chosen_rows(columns, measure.chosen((columns, source_codes.shape[0]), elements))
    source, signs = Quantized(source_codes, source_scales, source_tensor_scale), philox.rotation_signs(_seed(seeds, index))
    return measure.saved_sums(source, rows, measure.rows_of_values(values, rows, 1.0), signs)


def _measure_product_cpu(result: Tensor, swapped: bool, e: Tensor, transposed: bool, saved: Tensor, elements: int) -> Tensor:
    result, e = (result.t() if swapped else result), (e.t() if transposed else e)
    rows = measure.chosen_rows(result.shape[0], measure.chosen(result.shape, elements))
    with torch.autocast("cpu", enabled=False):
        # In float32: many CPUs have no product of bfloat16 numbers that is worth the name.
        exact = (e.index_select(0, rows).float() @ saved.float()).to(saved.dtype)
    return sums.product_sums(result, rows, exact)


# ---------------------------------------------------------------- CUDA


def _measure_fresh_cuda(
    x: Tensor, amax: Tensor, transposed: bool, codes: Tensor, scales: Tensor, tensor_scale: Tensor,
    seeds: Tensor | None, index: int, elements: int,
) -> Tensor:  # fmt: skip
    x = x.t() if transposed else x
    few, out = measure.chosen(x.shape, elements), _room(x)
    ops.triton_kernels().fresh_sums(x, few, amax, (codes, scales, tensor_scale), 1.0, seeds, index, ops.rank(), out)
    return out


def _measure_fresh_values_cuda(
    x: Tensor, amax: Tensor, transposed: bool, values: Tensor, scale: float, seeds: Tensor, index: int, rule: str, elements: int
) -> Tensor:
    x = x.t() if transposed else x
    few, out = measure.chosen(x.shape, elements), _room(x)
    ops.triton_kernels().fresh_sums(x, few, amax, values, scale, seeds, index, ops.rank(), out)
    return out


def _measure_saved_cuda(
    source_codes: Tensor, source_scales: Tensor, source_tensor_scale: Tensor, columns: int,
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, seeds: Tensor, index: int, elements: int,
) -> Tensor:  # fmt: skip
    few, out = measure.chosen((columns, source_codes.shape[0]), elements), _room(codes)
    source, coded = (source_codes, source_scales, source_tensor_scale), (codes, scales, tensor_scale)
    ops.triton_kernels().saved_sums(source, columns, few, coded, seeds, index, ops.rank(), out)
    return out


def _measure_saved_values_cuda(
    source_codes: Tensor, source_scales: Tensor, source_tensor_scale: Tensor, columns: int,
    values: Tensor, seeds: Tensor, index: int, rule: str, elements: int,
) -> Tensor:  # fmt: skip
    few, out = measure.chosen((columns, source_codes.shape[0]), elements), _room(values)
    source = source_codes, source_scales, source_tensor_scale
    ops.triton_kernels().saved_sums(source, columns, few, values, seeds, index, ops.rank(), out)
    return out


def _measure_product_cuda(result: Tensor, swapped: bool, e: Tensor, transposed: bool, saved: Tensor, elements: int) -> Tensor:
    result, e = (result.t() if swapped else result), (e.t() if transposed else e)
    few, out = measure.chosen(result.shape, elements), _room(result)
    kernels = ops.triton_kernels()
    with torch.autocast("cuda", enabled=False):
        kernels.product_sums(result, kernels.some_rows(e, few, saved.dtype) @ saved, out)
    return out


def _room(like: Tensor) -> Tensor:
    return torch.empty((PARTS_ON_GPU, measure.SUMS), dtype=torch.float64, device=like.device)


for _name, _on_cpu, _on_cuda in (
    ("largest", sums.largest, measure.largest),
    ("measure_fresh", _measure_fresh_cpu, _measure_fresh_cuda),
    ("measure_fresh_values", _measure_fresh_values_cpu, _measure_fresh_values_cuda),
    ("measure_saved", _measure_saved_cpu, _measure_saved_cuda),
    ("measure_saved_values", _measure_saved_values_cpu, _measure_saved_values_cuda),
    ("measure_product", _measure_product_cpu, _measure_product_cuda),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    if _name != "largest":
        ops.ON_GPU[getattr(torch.ops.quartet, _name).default] = _on_cuda


# ---------------------------------------------------------------- shapes


def _sums_like(like: Tensor) -> Tensor:
    parts = PARTS_ON_GPU if like.device.type == "cuda" else 1
    return torch.empty((parts, measure.SUMS), dtype=torch.float64, device=like.device)


@torch.library.register_fake("quartet::largest", lib=_library)
def _largest_fake(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=x.device)


@torch.library.register_fake("quartet::measure_fresh", lib=_library)
def _measure_fresh_fake(
    x: Tensor, amax: Tensor, transposed: bool, codes: Tensor, scales: Tensor, tensor_scale: Tensor,
    seeds: Tensor | None, index: int, elements: int,
) -> Tensor:  # fmt: skip
    ops.check_operand("measure_fresh", x)
    ops.check_packed("measure_fresh", codes, scales, tensor_scale)
    return _sums_like(x)


@torch.library.register_fake("quartet::measure_saved", lib=_library)
def _measure_saved_fake(
    source_codes: Tensor, source_scales: Tensor, source_tensor_scale: Tensor, columns: int,
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, seeds: Tensor, index: int, elements: int,
) -> Tensor:  # fmt: skip
    ops.check_packed("measure_saved", source_codes, source_scales, source_tensor_scale)
    ops.check_columns("measure_saved", source_codes, columns)
    ops.check_packed("measure_saved", codes, scales, tensor_scale)
    return _sums_like(codes)


@torch.library.register_fake("quartet::measure_fresh_values", lib=_library)
def _measure_fresh_values_fake(
    x: Tensor, amax: Tensor, transposed: bool, values: Tensor, scale: float, seeds: Tensor, index: int, rule: str, elements: int
) -> Tensor:
    ops.check_operand("measure_fresh_values", x)
    ops.check_rule("measure_fresh_values", rule, ops.FILL_THE_RANGE)
    return _sums_like(x)


@torch.library.register_fake("quartet::measure_saved_values", lib=_library)
def _measure_saved_values_fake(
    source_codes: Tensor, source_scales: Tensor, source_tensor_scale: Tensor, columns: int,
    values: Tensor, seeds: Tensor, index: int, rule: str, elements: int,
) -> Tensor:  # fmt: skip
    ops.check_packed("measure_saved_values", source_codes, source_scales, source_tensor_scale)
    ops.check_columns("measure_saved_values", source_codes, columns)
    ops.check_rule("measure_saved_values", rule, ops.FILL_THE_RANGE)
    return _sums_like(values)


@torch.library.register_fake("quartet::measure_product", lib=_library)
def _measure_product_fake(result: Tensor, swapped: bool, e: Tensor, transposed: bool, saved: Tensor, elements: int) -> Tensor:
    return _sums_like(result)
