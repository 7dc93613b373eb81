"""Operators on the numbers that NVFP4 codes stand for: how GPUs without FP4 tensor cores multiply packed matrices.

A code times its scales has at most six significant bits, and tensor scales are powers of two, so bfloat16 holds the product exactly. These
*values*, not the codes, are what such a GPU multiplies. `passes.emulate` therefore replaces the operators of `ops`, once the graphs are
split and it is settled what is saved, by ones that write values beside the packed matrix or in its place:

``quantize_with_values(x, rule)``
    x [M, K] -> codes, scales and tensor scale of ``quantize(x, rule)``, and values bfloat16 [M, ceil(K/16)*16].
``quantize_values(x, rule)``
    The values alone, for a product whose operand nothing else reads.
``rotations(seeds)``
    The matrices of each rotation of a step, signs included: bfloat16 [n, 2, 64, 64]. The operators below read it.
``grad_values(e, rotations, seeds, index, rule, transpose, scale)``
    e [M, N] -> the values of ``quantize_grad`` times `scale`: [M, ceil(N/128)*128], transposed [N, ceil(M/128)*128].
``grad_values_both(e, rotations, seeds, index, transposed_index, rule, scale)``
    The same in both orientations, from one read of e.
``requantize_values(codes, scales, tensor_scale, columns, rotations, seeds, index, rule)``
    The values of ``requantize``: [columns, ceil(M/128)*128].
``matmul_values(a, b, bias, out_dtype)``
    a [M, K] times b [N, K] transposed, accumulated in float32, plus bias [N], rounded once.

Rotated operands are multiplied with each other only, so the order of their columns is free as long as it is the same: within each 128 they
stand in `product_order`, in which a GPU's threads write what they hold without passing it around.

`scale` is a power of two: the 1/128 that undoes two rotations. Values beyond the range of bfloat16 are rounded to it, those of subnormal
size too. A number that is not finite makes all values of its matrix NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quartet_compile.kernels import ops, philox, reference
from quartet_compile.kernels.format import GROUP, ROTATION, Quantized, ceil_to

_library = torch.library.Library("quartet", "FRAGMENT")
for _schema in (
    "quantize_with_values(Tensor x, str rule) -> (Tensor, Tensor, Tensor, Tensor)",
    "quantize_values(Tensor x, str rule) -> Tensor",
    "rotations(Tensor seeds) -> Tensor",
    "grad_values(Tensor e, Tensor rotations, Tensor seeds, int index, str rule, bool transpose, float scale) -> Tensor",
    "grad_values_both(Tensor e, Tensor rotations, Tensor seeds, int index, int transposed_index, str rule, float scale)"
    " -> (Tensor, Tensor)",
    "requantize_values(Tensor codes, Tensor scales, Tensor tensor_scale, SymInt columns, Tensor rotations, Tensor seeds, int index,"
    " str rule) -> Tensor",
    "matmul_values(Tensor a, Tensor b, Tensor? bias, ScalarType out_dtype) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _check_scale(op: str, scale: float) -> None:
    if scale <= 0 or math.frexp(scale)[0] != 0.5:
        raise ValueError(f"quartet.{op}: the scale must be a power of two, not {scale}")


def _check_values(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise TypeError(f"quartet.matmul_values: values are bfloat16, got {a.dtype} and {b.dtype}")
    ops.check_product("matmul_values", (a.shape[0], a.shape[1]), (b.shape[0], b.shape[1]), bias, out_dtype)


def values_of(codes: Tensor, scales: Tensor, tensor_scale: Tensor, *, scale: float = 1.0) -> Tensor:
    """What a packed matrix stands for, times a power of two: bfloat16 [M, K]. The definition that kernels are held to."""
    return (Quantized(codes, scales, tensor_scale).dequantize_unscaled(torch.float32) * (tensor_scale * scale)).bfloat16()


def product_order(values: Tensor) -> Tensor:
    """[M, 128 n] with the columns of each 64 reordered: their eight chunks of eight as a 4 x 2 matrix, transposed."""
    return values.unflatten(1, (values.shape[1] // 64, 4, 2, 8)).transpose(2, 3).flatten(1)


def rotation_matrices(seed: int) -> Tensor:
    """float32 [2, 64, 64], F and B: x rotated is [f F + b B, f F - b B] for the halves f and b of x.

    Columns are in the order in which tensor cores hand a thread whole groups of 16.
    """
    matrix = reference.rotate(torch.eye(ROTATION), philox.rotation_signs(seed))[:, :64]
    return matrix.unflatten(1, (4, 8, 2)).transpose(1, 2).flatten(1).unflatten(0, (2, 64))


# ---------------------------------------------------------------- shapes


@torch.library.register_fake("quartet::quantize_with_values", lib=_library)
def _quantize_with_values_fake(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops.check_operand("quantize_with_values", x)
    ops.check_rule("quantize_with_values", rule, ops.FORWARD_RULES)
    columns = ceil_to(x.shape[1], GROUP)
    return *ops.packed_like(x, x.shape[0], columns), torch.empty((x.shape[0], columns), dtype=torch.bfloat16, device=x.device)


@torch.library.register_fake("quartet::quantize_values", lib=_library)
def _quantize_values_fake(x: Tensor, rule: str) -> Tensor:
    ops.check_operand("quantize_values", x)
    ops.check_rule("quantize_values", rule, ops.FORWARD_RULES)
    return torch.empty((x.shape[0], ceil_to(x.shape[1], GROUP)), dtype=torch.bfloat16, device=x.device)


@torch.library.register_fake("quartet::rotations", lib=_library)
def _rotations_fake(seeds: Tensor) -> Tensor:
    return torch.empty((seeds.shape[0], 2, ROTATION // 2, ROTATION // 2), dtype=torch.bfloat16, device=seeds.device)


@torch.library.register_fake("quartet::grad_values", lib=_library)
def _grad_values_fake(e: Tensor, rotations: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, scale: float) -> Tensor:
    ops.check_operand("grad_values", e)
    ops.check_rule("grad_values", rule, ops.BACKWARD_RULES)
    _check_scale("grad_values", scale)
    rows, columns = (e.shape[1], e.shape[0]) if transpose else (e.shape[0], e.shape[1])
    return torch.empty((rows, ceil_to(columns, ROTATION)), dtype=torch.bfloat16, device=e.device)


@torch.library.register_fake("quartet::grad_values_both", lib=_library)
def _grad_values_both_fake(
    e: Tensor, rotations: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str, scale: float
) -> tuple[Tensor, Tensor]:
    row = _grad_values_fake(e, rotations, seeds, index, rule, False, scale)
    return row, _grad_values_fake(e, rotations, seeds, transposed_index, rule, True, scale)


@torch.library.register_fake("quartet::requantize_values", lib=_library)
def _requantize_values_fake(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, rotations: Tensor, seeds: Tensor, index: int, rule: str
) -> Tensor:
    ops.check_packed("requantize_values", codes, scales, tensor_scale)
    ops.check_columns("requantize_values", codes, columns)
    ops.check_rule("requantize_values", rule, ops.BACKWARD_RULES)
    return torch.empty((columns, ceil_to(codes.shape[0], ROTATION)), dtype=torch.bfloat16, device=codes.device)


@torch.library.register_fake("quartet::matmul_values", lib=_library)
def _matmul_values_fake(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    _check_values(a, b, bias, out_dtype)
    return torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)


# ---------------------------------------------------------------- CPU: in terms of the packed operators, for tests; rules without kernels


def _quantize_with_values_cpu(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = torch.ops.quartet.quantize(x, rule)
    return *packed, values_of(*packed)


def _quantize_values_cpu(x: Tensor, rule: str) -> Tensor:
    return values_of(*torch.ops.quartet.quantize(x, rule))


def _rotations_cpu(seeds: Tensor) -> Tensor:
    return torch.stack([rotation_matrices(philox.seed_for_rank(seed, ops.rank())) for seed in seeds.tolist()]).bfloat16()


def _grad_values_cpu(e: Tensor, rotations: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, scale: float) -> Tensor:
    _check_scale("grad_values", scale)
    return product_order(values_of(*torch.ops.quartet.quantize_grad(e, seeds, index, rule, transpose), scale=scale))


def _grad_values_both_cpu(
    e: Tensor, rotations: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str, scale: float
) -> tuple[Tensor, Tensor]:
    row = _grad_values_cpu(e, rotations, seeds, index, rule, False, scale)
    return row, _grad_values_cpu(e, rotations, seeds, transposed_index, rule, True, scale)


def _requantize_values_cpu(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, rotations: Tensor, seeds: Tensor, index: int, rule: str
) -> Tensor:
    return product_order(values_of(*torch.ops.quartet.requantize(codes, scales, tensor_scale, columns, seeds, index, rule)))


def _matmul_values_cpu(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    _check_values(a, b, bias, out_dtype)
    with torch.autocast("cpu", enabled=False):
        y = a.float() @ b.float().t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


# ---------------------------------------------------------------- CUDA


def _quantize_with_values_cuda(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops.check_operand("quantize_with_values", x)
    ops.check_rule("quantize_with_values", rule, ops.FORWARD_RULES)
    if rule in ops.WITHOUT_KERNELS:
        return _quantize_with_values_cpu(x, rule)
    return ops.triton_kernels().quantize_with_values(x, rule)


def _quantize_values_cuda(x: Tensor, rule: str) -> Tensor:
    ops.check_operand("quantize_values", x)
    ops.check_rule("quantize_values", rule, ops.FORWARD_RULES)
    if rule in ops.WITHOUT_KERNELS:
        return _quantize_values_cpu(x, rule)
    return ops.triton_kernels().quantize_values(x, rule)


def _rotations_cuda(seeds: Tensor) -> Tensor:
    return ops.triton_kernels().rotations(seeds, ops.rank())


def _grad_values_cuda(e: Tensor, rotations: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool, scale: float) -> Tensor:
    straight, turned = (None, index) if transpose else (index, None)
    row, column = _grad_values_on_gpu("grad_values", e, rotations, seeds, straight, turned, rule, scale)
    return column if transpose else row


def _grad_values_both_cuda(
    e: Tensor, rotations: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str, scale: float
) -> tuple[Tensor, Tensor]:
    return _grad_values_on_gpu("grad_values_both", e, rotations, seeds, index, transposed_index, rule, scale)


def _grad_values_on_gpu(
    op: str, e: Tensor, rotations: Tensor, seeds: Tensor, index: int | None, transposed_index: int | None, rule: str, scale: float
) -> tuple[Tensor, Tensor]:
    ops.check_operand(op, e)
    ops.check_rule(op, rule, ops.BACKWARD_RULES)
    _check_scale(op, scale)
    return ops.triton_kernels().grad_values(e, rotations, seeds, index, transposed_index, rule, scale, ops.rank())


def _requantize_values_cuda(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, rotations: Tensor, seeds: Tensor, index: int, rule: str
) -> Tensor:
    ops.check_packed("requantize_values", codes, scales, tensor_scale)
    ops.check_columns("requantize_values", codes, columns)
    ops.check_rule("requantize_values", rule, ops.BACKWARD_RULES)
    return ops.triton_kernels().requantize_values(codes, scales, tensor_scale, columns, rotations, seeds, index, rule, ops.rank())


def _matmul_values_cuda(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    _check_values(a, b, bias, out_dtype)
    with torch.autocast("cuda", enabled=False):
        return ops.triton_kernels().matmul_values(a, b, bias, out_dtype)


for _name, _on_cpu, _on_cuda in (
    ("quantize_with_values", _quantize_with_values_cpu, _quantize_with_values_cuda),
    ("quantize_values", _quantize_values_cpu, _quantize_values_cuda),
    ("rotations", _rotations_cpu, _rotations_cuda),
    ("grad_values", _grad_values_cpu, _grad_values_cuda),
    ("grad_values_both", _grad_values_both_cpu, _grad_values_both_cuda),
    ("requantize_values", _requantize_values_cpu, _requantize_values_cuda),
    ("matmul_values", _matmul_values_cpu, _matmul_values_cuda),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    if _name != "matmul_values":
        ops.ON_GPU[getattr(torch.ops.quartet, _name).default] = _on_cuda
