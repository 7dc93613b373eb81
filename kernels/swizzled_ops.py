"""Operators on scales in the order that FP4 tensor cores read them.

Quantizers return scales [M, K/16] row by row, which is what the backward pass reads and what is saved. Blackwell's fast paths to its tensor
cores, Triton's descriptors and cuBLAS, want them in tiles (`format.swizzle_scales`). `passes.native` therefore rewrites products there:

``swizzle(scales)``
    float8_e4m3fn [M, G] -> the same numbers, flat [ceil(M/128)*128 * ceil(G/4)*4], zero where padded.
``matmul_swizzled(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)``
    ``matmul`` of `ops`, with flat scales and K a multiple of 32.
``quantize_grad_swizzled``, ``quantize_grad_both_swizzled``, ``requantize_swizzled``
    As those of `ops`, with flat scales, whatever stands where they are padded: operands of products that nobody saves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quartet_compile.kernels import ops
from quartet_compile.kernels.format import GROUP, swizzle_scales, swizzled_numel, unswizzle_scales

_library = torch.library.Library("quartet", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("swizzle(Tensor scales) -> Tensor", tags=_tags)
_library.define(
    "matmul_swizzled(Tensor a_codes, Tensor a_scales, Tensor a_tensor_scale, Tensor b_codes, Tensor b_scales, Tensor b_tensor_scale,"
    " Tensor? bias, float scale, ScalarType out_dtype) -> Tensor",
    tags=_tags,
)


_library.define(
    "quantize_grad_swizzled(Tensor e, Tensor seeds, int index, str rule, bool transpose) -> (Tensor, Tensor, Tensor)", tags=_tags
)
_library.define(
    "quantize_grad_both_swizzled(Tensor e, Tensor seeds, int index, int transposed_index, str rule)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_tags,
)
_library.define(
    "requantize_swizzled(Tensor codes, Tensor scales, Tensor tensor_scale, SymInt columns, Tensor seeds, int index, str rule)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)


def _check_scales(scales: Tensor) -> None:
    if scales.dim() != 2 or scales.dtype != torch.float8_e4m3fn:
        raise ValueError(f"quartet.swizzle: expected scales [M, K/16] in float8_e4m3fn, got {tuple(scales.shape)} in {scales.dtype}")


def _check_operand(codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> None:
    ops.check_packed_dtypes("matmul_swizzled", codes, scales, tensor_scale)
    if codes.dim() != 2 or scales.dim() != 1 or codes.shape[1] % GROUP:
        raise ValueError(
            f"quartet.matmul_swizzled: expected codes [M, K/2] with K a multiple of 32 and flat scales, got {tuple(codes.shape)} and"
            f" {tuple(scales.shape)}"
        )
    expected = swizzled_numel(codes.shape[0], codes.shape[1] // 8)
    if scales.shape[0] != expected:
        raise ValueError(f"quartet.matmul_swizzled: codes {tuple(codes.shape)} have {expected} swizzled scales, not {scales.shape[0]}")


def _check_product(a_codes: Tensor, b_codes: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    a, b = ((codes.shape[0], codes.shape[1] * 2) for codes in (a_codes, b_codes))
    ops.check_product("matmul_swizzled", a, b, bias, out_dtype)


@torch.library.register_fake("quartet::swizzle", lib=_library)
def _swizzle_fake(scales: Tensor) -> Tensor:
    _check_scales(scales)
    return scales.new_empty((swizzled_numel(scales.shape[0], scales.shape[1]),))


@torch.library.register_fake("quartet::matmul_swizzled", lib=_library)
def _matmul_swizzled_fake(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_operand(a_codes, a_scales, a_tensor_scale)
    _check_operand(b_codes, b_scales, b_tensor_scale)
    _check_product(a_codes, b_codes, bias, out_dtype)
    return torch.empty((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype, device=a_codes.device)


def _flat(packed: tuple[Tensor, ...], order: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Packed matrices one after the other, the scales of each in another order."""
    return tuple(order(part) if i % 3 == 1 else part for i, part in enumerate(packed))


@torch.library.register_fake("quartet::quantize_grad_swizzled", lib=_library)
def _quantize_grad_swizzled_fake(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool) -> tuple[Tensor, ...]:
    return _flat(torch.ops.quartet.quantize_grad(e, seeds, index, rule, transpose), _swizzle_fake)


@torch.library.register_fake("quartet::quantize_grad_both_swizzled", lib=_library)
def _quantize_grad_both_swizzled_fake(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str) -> tuple[Tensor, ...]:
    return _flat(torch.ops.quartet.quantize_grad_both(e, seeds, index, transposed_index, rule), _swizzle_fake)


@torch.library.register_fake("quartet::requantize_swizzled", lib=_library)
def _requantize_swizzled_fake(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str
) -> tuple[Tensor, ...]:
    return _flat(torch.ops.quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule), _swizzle_fake)


def _quantize_grad_swizzled_cpu(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool) -> tuple[Tensor, ...]:
    return _flat(torch.ops.quartet.quantize_grad(e, seeds, index, rule, transpose), swizzle_scales)


def _quantize_grad_both_swizzled_cpu(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str) -> tuple[Tensor, ...]:
    return _flat(torch.ops.quartet.quantize_grad_both(e, seeds, index, transposed_index, rule), swizzle_scales)


def _requantize_swizzled_cpu(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str
) -> tuple[Tensor, ...]:
    return _flat(torch.ops.quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule), swizzle_scales)


def _quantize_grad_swizzled_cuda(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool) -> tuple[Tensor, ...]:
    ops.check_operand("quantize_grad_swizzled", e)
    ops.check_rule("quantize_grad_swizzled", rule, ops.BACKWARD_RULES)
    return ops.triton_kernels().quantize_grad(e, seeds, index, rule, transpose, ops.rank(), swizzled=True)


def _quantize_grad_both_swizzled_cuda(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str) -> tuple[Tensor, ...]:
    ops.check_operand("quantize_grad_both_swizzled", e)
    ops.check_rule("quantize_grad_both_swizzled", rule, ops.BACKWARD_RULES)
    return ops.triton_kernels().quantize_grad_both(e, seeds, index, transposed_index, rule, ops.rank(), swizzled=True)


def _requantize_swizzled_cuda(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str
) -> tuple[Tensor, ...]:
    ops.check_packed("requantize_swizzled", codes, scales, tensor_scale)
    ops.check_columns("requantize_swizzled", codes, columns)
    ops.check_rule("requantize_swizzled", rule, ops.BACKWARD_RULES)
    return ops.triton_kernels().requantize(codes, scales, tensor_scale, columns, seeds, index, rule, ops.rank(), swizzled=True)


def _swizzle(scales: Tensor) -> Tensor:
    _check_scales(scales)
    return swizzle_scales(scales)


def _matmul_swizzled_cpu(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_operand(a_codes, a_scales, a_tensor_scale)
    _check_operand(b_codes, b_scales, b_tensor_scale)
    plain = [unswizzle_scales(s, c.shape[0], c.shape[1] // 8) for c, s in ((a_codes, a_scales), (b_codes, b_scales))]
    return torch.ops.quartet.matmul(a_codes, plain[0], a_tensor_scale, b_codes, plain[1], b_tensor_scale, bias, scale, out_dtype)


def _matmul_swizzled_cuda(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_operand(a_codes, a_scales, a_tensor_scale)
    _check_operand(b_codes, b_scales, b_tensor_scale)
    _check_product(a_codes, b_codes, bias, out_dtype)
    return ops.triton_kernels().matmul_packed(
        a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype, swizzled=True
    )


for _name, _on_cpu, _on_cuda in (
    ("quantize_grad_swizzled", _quantize_grad_swizzled_cpu, _quantize_grad_swizzled_cuda),
    ("quantize_grad_both_swizzled", _quantize_grad_both_swizzled_cpu, _quantize_grad_both_swizzled_cuda),
    ("requantize_swizzled", _requantize_swizzled_cpu, _requantize_swizzled_cuda),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    ops.ON_GPU[getattr(torch.ops.quartet, _name).default] = _on_cuda

for _device, _product in (("CPU", _matmul_swizzled_cpu), ("CUDA", _matmul_swizzled_cuda)):
    _library.impl("swizzle", _swizzle, _device)
    _library.impl("matmul_swizzled", _product, _device)
