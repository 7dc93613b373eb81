"""The operators that rewritten graphs call: schemas, shapes, checks, and which code runs on which device.

Namespace ``quartet``; functional, without hidden state. An NVFP4 matrix is three plain tensors (`format`): codes uint8, scales
float8_e4m3fn, tensor_scale float32 [].

``quantize(x, rule)``
    x [M, K] -> [M, ceil(K/16)*16] packed. Deterministic rules.
``quantize_grad(e, seeds, index, rule, transpose)``
    e [M, N] -> [M, ceil(N/128)*128] packed, rotated along N; with transpose, [N, ceil(M/128)*128], rotated along M.
``quantize_grad_both(e, seeds, index, transposed_index, rule)``
    Both of them, e read once: the packed matrix rotated along N by `index`, then the transposed one by `transposed_index`.
``requantize(codes, scales, tensor_scale, columns, seeds, index, rule)``
    packed [M, columns] -> [columns, ceil(M/128)*128] packed: the transposed operand, rotated along M.
``matmul(a..., b..., bias, scale, out_dtype)``
    packed [M, K] and [N, K] -> [M, N]: the float32 accumulator times scale and both tensor scales, plus bias [N], rounded once.

Tensors are strided as they come; results are contiguous. `seeds` is int64 [n] and `index` names a rotation in it: the two operands of a
product take the same index and draw their rounding from different streams (`philox`). The rank of the process is mixed in at run time.
A number that is not finite makes the tensor scale NaN, and with it the whole product.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import GROUP, ROTATION, ceil_to

FORWARD_RULES = ("four_over_six",)
BACKWARD_RULES = ("ms_eden",)
WITHOUT_KERNELS: tuple[str, ...] = ()
"""Forward rules that every device computes by their formulas: the same numbers, in dozens of passes over the operand instead of one."""
FILL_THE_RANGE = ("ms_eden",)
"""Rules that give the largest number of each group the code 6, or all of it scale 0: six times the scale can be read off the values."""
OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("quartet", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("quantize(Tensor x, str rule) -> (Tensor, Tensor, Tensor)", tags=_tags)
_library.define("quantize_grad(Tensor e, Tensor seeds, int index, str rule, bool transpose) -> (Tensor, Tensor, Tensor)", tags=_tags)
_library.define(
    "quantize_grad_both(Tensor e, Tensor seeds, int index, int transposed_index, str rule)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_tags,
)
_library.define(
    "requantize(Tensor codes, Tensor scales, Tensor tensor_scale, SymInt columns, Tensor seeds, int index, str rule)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)
_library.define(
    "matmul(Tensor a_codes, Tensor a_scales, Tensor a_tensor_scale, Tensor b_codes, Tensor b_scales, Tensor b_tensor_scale,"
    " Tensor? bias, float scale, ScalarType out_dtype) -> Tensor",
    tags=_tags,
)


# ---------------------------------------------------------------- checks


def check_operand(op: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"quartet.{op}: expected a matrix, got shape {tuple(x.shape)}")
    if x.dtype not in OPERAND_DTYPES:
        supported = ", ".join(str(d).removeprefix("torch.") for d in OPERAND_DTYPES)
        raise TypeError(f"quartet.{op}: cannot quantize {x.dtype}; supported are {supported}. Cast the tensor first.")


def check_rule(op: str, rule: str, valid: tuple[str, ...]) -> None:
    if rule not in valid:
        raise ValueError(f"quartet.{op}: no rule {rule!r}; valid are {', '.join(valid)}")


def check_packed_dtypes(op: str, codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> None:
    if codes.dtype != torch.uint8 or scales.dtype != torch.float8_e4m3fn or tensor_scale.dtype != torch.float32:
        raise TypeError(
            f"quartet.{op}: an NVFP4 matrix is codes uint8, scales float8_e4m3fn and tensor_scale float32,"
            f" got {codes.dtype}, {scales.dtype}, {tensor_scale.dtype}"
        )


def check_packed(op: str, codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> None:
    check_packed_dtypes(op, codes, scales, tensor_scale)
    if codes.dim() != 2 or scales.dim() != 2 or codes.shape[0] != scales.shape[0] or codes.shape[1] * 2 != scales.shape[1] * GROUP:
        raise ValueError(f"quartet.{op}: codes [M, K/2] and scales [M, K/16] do not fit: {tuple(codes.shape)} and {tuple(scales.shape)}")


def check_columns(op: str, codes: Tensor, columns: int) -> None:
    if ceil_to(columns, GROUP) != codes.shape[1] * 2:
        raise ValueError(f"quartet.{op}: {codes.shape[1] * 2} packed columns are not {columns} real ones and their padding")


def check_product(op: str, a: tuple[int, int], b: tuple[int, int], bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """a, b: shapes [M, K] and [N, K] in elements."""
    if a[1] != b[1]:
        raise ValueError(f"quartet.{op}: the operands contract over {a[1]} and {b[1]} elements")
    if bias is not None and bias.shape != (b[0],):
        raise ValueError(f"quartet.{op}: bias has shape {tuple(bias.shape)}, expected ({b[0]},)")
    if out_dtype not in OPERAND_DTYPES:
        raise TypeError(f"quartet.{op}: cannot return {out_dtype}")


def _shape(codes: Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1] * 2


# ---------------------------------------------------------------- shapes


def packed_like(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty codes, scales and tensor scale of a matrix with this many (padded) columns."""
    return (
        torch.empty((rows, columns // 2), dtype=torch.uint8, device=like.device),
        torch.empty((rows, columns // GROUP), dtype=torch.float8_e4m3fn, device=like.device),
        torch.empty((), dtype=torch.float32, device=like.device),
    )


@torch.library.register_fake("quartet::quantize", lib=_library)
def _quantize_fake(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    check_operand("quantize", x)
    check_rule("quantize", rule, FORWARD_RULES)
    return packed_like(x, x.shape[0], ceil_to(x.shape[1], GROUP))


@torch.library.register_fake("quartet::quantize_grad", lib=_library)
def _quantize_grad_fake(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_operand("quantize_grad", e)
    check_rule("quantize_grad", rule, BACKWARD_RULES)
    rows, columns = (e.shape[1], e.shape[0]) if transpose else (e.shape[0], e.shape[1])
    return packed_like(e, rows, ceil_to(columns, ROTATION))


@torch.library.register_fake("quartet::quantize_grad_both", lib=_library)
def _quantize_grad_both_fake(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str) -> tuple[Tensor, ...]:
    check_operand("quantize_grad_both", e)
    check_rule("quantize_grad_both", rule, BACKWARD_RULES)
    return *packed_like(e, e.shape[0], ceil_to(e.shape[1], ROTATION)), *packed_like(e, e.shape[1], ceil_to(e.shape[0], ROTATION))


@torch.library.register_fake("quartet::requantize", lib=_library)
def _requantize_fake(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_packed("requantize", codes, scales, tensor_scale)
    check_columns("requantize", codes, columns)
    check_rule("requantize", rule, BACKWARD_RULES)
    return packed_like(codes, columns, ceil_to(codes.shape[0], ROTATION))


@torch.library.register_fake("quartet::matmul", lib=_library)
def _matmul_fake(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    bias: Tensor | None, scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_packed("matmul", a_codes, a_scales, a_tensor_scale)
    check_packed("matmul", b_codes, b_scales, b_tensor_scale)
    check_product("matmul", _shape(a_codes), _shape(b_codes), bias, out_dtype)
    return torch.empty((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype, device=a_codes.device)


# ---------------------------------------------------------------- devices


def rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _implementation(device: str) -> ModuleType:
    """The module whose functions run on a device."""
    if device == "CPU":
        from quartet_compile.kernels import cpu

        return cpu
    return triton_kernels()


def triton_kernels() -> ModuleType:
    """The Triton kernels, imported when a CUDA tensor first arrives."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError("quartet: tensors on a GPU need Triton, which is not installed: pip install triton") from error
    from quartet_compile.kernels import triton_kernels

    return triton_kernels


ON_GPU: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""What the operators run on a CUDA device, of those that launch kernels of ours there: all but the products."""


def _register(device: str) -> None:
    def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
        check_operand("quantize", x)
        check_rule("quantize", rule, FORWARD_RULES)
        return (reference_ops if rule in WITHOUT_KERNELS else _implementation(device)).quantize(x, rule)

    def quantize_grad(e: Tensor, seeds: Tensor, index: int, rule: str, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
        check_operand("quantize_grad", e)
        check_rule("quantize_grad", rule, BACKWARD_RULES)
        return _implementation(device).quantize_grad(e, seeds, index, rule, transpose, rank())

    def quantize_grad_both(e: Tensor, seeds: Tensor, index: int, transposed_index: int, rule: str) -> tuple[Tensor, ...]:
        check_operand("quantize_grad_both", e)
        check_rule("quantize_grad_both", rule, BACKWARD_RULES)
        return _implementation(device).quantize_grad_both(e, seeds, index, transposed_index, rule, rank())

    def requantize(
        codes: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int, seeds: Tensor, index: int, rule: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_packed("requantize", codes, scales, tensor_scale)
        check_columns("requantize", codes, columns)
        check_rule("requantize", rule, BACKWARD_RULES)
        return _implementation(device).requantize(codes, scales, tensor_scale, columns, seeds, index, rule, rank())

    def matmul(
        a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
        bias: Tensor | None, scale: float, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        check_packed("matmul", a_codes, a_scales, a_tensor_scale)
        check_packed("matmul", b_codes, b_scales, b_tensor_scale)
        check_product("matmul", _shape(a_codes), _shape(b_codes), bias, out_dtype)
        run = _implementation(device).matmul
        with torch.autocast(device.lower(), enabled=False):  # which would round what torch's own product is given and returns
            return run(a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale, bias, scale, out_dtype)

    for function in (quantize, quantize_grad, quantize_grad_both, requantize, matmul):
        _library.impl(function.__name__, function, device)
        if device == "CUDA" and function is not matmul:
            ON_GPU[getattr(torch.ops.quartet, function.__name__).default] = function


_register("CPU")
_register("CUDA")
