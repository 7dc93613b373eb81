"""Sums over what was quantized and what became of it (`kernels.measure`) on a CPU: `sums.h`, or the definition where there is no compiler.

A step of a small model takes as long as a dozen passes of PyTorch over each of its operands; this is one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet_compile.kernels import measure, philox
from quartet_compile.kernels.cpu import _DTYPES, _kernels, _threads
from quartet_compile.kernels.format import Quantized


def _together(rows: Tensor, amax: Tensor, elements: int) -> Tensor:
    """float64 [n, 8], a row of sums for each that was measured -> [1, 9]."""
    return torch.cat([rows[:, :7].sum(0), amax.double().view(1), rows.new_tensor([elements])]).unsqueeze(0)


def largest(x: Tensor) -> Tensor:
    """`measure.largest`."""
    kernels = _kernels()
    if kernels is None or x.numel() == 0:
        return measure.largest(x)
    found = torch.empty((), dtype=torch.float32)
    kernels.quartet_largest(x.data_ptr(), _DTYPES[x.dtype], *x.shape, *x.stride(), found.data_ptr(), _threads(x.numel()))
    return found


def fresh_sums(x: Tensor, rows: Tensor, amax: Tensor, packed: Quantized, seed: int | None) -> Tensor:
    """`measure.fresh_sums` of a packed matrix, rotated by the signs of a seed."""
    kernels = _kernels()
    elements = len(rows) * x.shape[1]
    if kernels is None or elements == 0:
        signs = None if seed is None else philox.rotation_signs(seed)
        return measure.fresh_sums(x, rows, amax, measure.rows_of_packed(packed, rows), signs)
    codes, scales = packed.codes.contiguous(), packed.scales.contiguous()
    found = torch.empty((len(rows), 8), dtype=torch.float64)
    kernels.quartet_fresh_sums(
        x.data_ptr(), _DTYPES[x.dtype], rows.data_ptr(), len(rows), x.shape[1], *x.stride(), codes.data_ptr(), scales.data_ptr(),
        scales.shape[1], packed.tensor_scale.item(), seed is not None, seed or 0, found.data_ptr(), _threads(elements),
    )  # fmt: skip
    return _together(found, amax, elements)


def saved_sums(source: Quantized, rows: Tensor, packed: Quantized, seed: int) -> Tensor:
    """`measure.saved_sums` of a packed matrix, rotated by the signs of a seed."""
    kernels = _kernels()
    length = source.codes.shape[0]
    elements = len(rows) * length
    if kernels is None or elements == 0:
        return measure.saved_sums(source, rows, measure.rows_of_packed(packed, rows), philox.rotation_signs(seed))
    source_codes, source_scales = source.codes.contiguous(), source.scales.contiguous()
    codes, scales = packed.codes.contiguous(), packed.scales.contiguous()
    found = torch.empty((len(rows), 8), dtype=torch.float64)
    kernels.quartet_saved_sums(
        source_codes.data_ptr(), source_scales.data_ptr(), source_scales.shape[1], source.tensor_scale.item(), length,
        rows.data_ptr(), len(rows), codes.data_ptr(), scales.data_ptr(), scales.shape[1], packed.tensor_scale.item(), seed,
        found.data_ptr(), _threads(elements),
    )  # fmt: skip
    return _together(found, found[:, 7].amax(), elements)


def product_sums(result: Tensor, rows: Tensor, exact: Tensor) -> Tensor:
    """`measure.product_sums`."""
    kernels = _kernels()
    if kernels is None or exact.numel() == 0:
        return measure.product_sums(result, rows, exact)
    exact = exact.contiguous()
    found = torch.empty((len(rows), 8), dtype=torch.float64)
    kernels.quartet_product_sums(
        result.data_ptr(), _DTYPES[result.dtype], result.shape[1], *result.stride(), exact.data_ptr(), _DTYPES[exact.dtype],
        rows.data_ptr(), len(rows), found.data_ptr(), _threads(exact.numel()),
    )  # fmt: skip
    return _together(found, found[:, 7].amax(), exact.numel())
