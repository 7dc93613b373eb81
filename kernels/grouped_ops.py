"""Operators for products in which each group of rows meets a weight of its own: the experts of a mixture, `torch._grouped_mm`.

Tokens stand sorted by group, and `ends` int32 [G] says where each group ends; rows behind the last end belong to nobody. The gradient of a
weight sums over the tokens of its group, in rotated blocks of 128, which must not reach into the next group. So tokens are moved to
*padded* rows, where every group begins at a multiple of 128 and zeros follow it:

``group_rows(ends, tokens)``
    -> padded_ends int32 [G], sources int32 [P], places int32 [T]. sources: which token a padded row holds, -1 for none; places: in
    which padded row a token stands, -1 for one behind the last end. P = `padded_rows(T, G)` suffices for all ends.
    ValueError on a CPU for ends that decrease or lie behind the tokens; a GPU is not waited for, so there, as in torch, nobody looks.
``take_rows(x, rows)``
    x [M, K], rows int32 [R] -> [R, K]: row ``rows[i]`` of x, zeros for -1, whatever x holds elsewhere.
``grouped_matmul(a..., b..., ends, across, scale)``
    packed a [P, K] -> bfloat16 [P, N]: row p times the transpose of its group's matrix [N, K], which is b[g*N : (g+1)*N] of a packed b
    [G*N, K], or, with `across`, b[:, g*K : (g+1)*K] of a packed b [N, G*K]. Rows behind the last end are not defined.
``grouped_outer(a..., b..., ends, scale)``
    packed a [M, P] and b [N, P] -> bfloat16 [G, M, N]: for each group, the product over its columns, zero for an empty group.

All matrices of a product are quantized as one, with one tensor scale. Products are otherwise as `ops.matmul`: accumulated in float32, times
scale and both tensor scales, rounded once, to the only dtype that `torch._grouped_mm` has. On a GPU they multiply the values
(`value_ops`), Blackwell included.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from quartet_compile.kernels import reference_ops
from quartet_compile.kernels.format import ROTATION, Quantized

_library = torch.library.Library("quartet", "FRAGMENT")
_packed = "Tensor a_codes, Tensor a_scales, Tensor a_tensor_scale, Tensor b_codes, Tensor b_scales, Tensor b_tensor_scale"
for _schema in (
    "group_rows(Tensor ends, SymInt tokens) -> (Tensor, Tensor, Tensor)",
    "take_rows(Tensor x, Tensor rows) -> Tensor",
    f"grouped_matmul({_packed}, Tensor ends, bool across, float scale) -> Tensor",
    f"grouped_outer({_packed}, Tensor ends, float scale) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def padded_rows(tokens: int, groups: int) -> int:
    """Rows that suffice for this many tokens in groups of any size, each padded to a multiple of 128."""
    return (tokens // ROTATION + groups) * ROTATION


# ---------------------------------------------------------------- checks and shapes


def _check_ends(op: str, ends: Tensor) -> None:
    if ends.dim() != 1 or ends.dtype != torch.int32 or ends.shape[0] == 0:
        raise ValueError(f"quartet.{op}: ends of groups are int32 [G], G > 0, got {ends.dtype} {tuple(ends.shape)}")


def _grouped_matmul_shape(a_codes: Tensor, b_codes: Tensor, ends: Tensor, across: bool) -> tuple[int, int]:
    """[P, N]; ValueError for operands that do not fit."""
    groups, columns = ends.shape[0], a_codes.shape[1]
    rows, wide = b_codes.shape
    parts, contracted = (wide, wide // groups) if across else (rows, wide)
    if parts % groups:
        raise ValueError(f"quartet.grouped_matmul: {tuple(b_codes.shape)} codes are not those of {groups} groups")
    if contracted != columns:
        raise ValueError(f"quartet.grouped_matmul: the operands contract over {columns * 2} and {contracted * 2} elements")
    return a_codes.shape[0], rows if across else rows // groups


def _check_outer(a_codes: Tensor, b_codes: Tensor) -> None:
    if a_codes.shape[1] != b_codes.shape[1]:
        raise ValueError(f"quartet.grouped_outer: the operands contract over {a_codes.shape[1] * 2} and {b_codes.shape[1] * 2} elements")


@torch.library.register_fake("quartet::group_rows", lib=_library)
def _group_rows_fake(ends: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_ends("group_rows", ends)
    rows = padded_rows(tokens, ends.shape[0])
    return torch.empty_like(ends), ends.new_empty(rows), ends.new_empty(tokens)


@torch.library.register_fake("quartet::take_rows", lib=_library)
def _take_rows_fake(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty((rows.shape[0], x.shape[1]))


@torch.library.register_fake("quartet::grouped_matmul", lib=_library)
def _grouped_matmul_fake(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    ends: Tensor, across: bool, scale: float,
) -> Tensor:  # fmt: skip
    _check_ends("grouped_matmul", ends)
    return a_codes.new_empty(_grouped_matmul_shape(a_codes, b_codes, ends, across), dtype=torch.bfloat16)


@torch.library.register_fake("quartet::grouped_outer", lib=_library)
def _grouped_outer_fake(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    ends: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    _check_ends("grouped_outer", ends)
    _check_outer(a_codes, b_codes)
    return a_codes.new_empty((ends.shape[0], a_codes.shape[0], b_codes.shape[0]), dtype=torch.bfloat16)


# ---------------------------------------------------------------- rows, on any device, without waiting for it


def _group_rows(ends: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_ends("group_rows", ends)
    if not ends.is_cuda and any(end < start for start, end in itertools.pairwise([0, *ends.tolist(), tokens])):  # a GPU is not waited for
        raise ValueError(f"quartet.group_rows: ends of groups must not decrease, nor lie behind the {tokens} tokens, got {ends.tolist()}")
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    sizes = ends - starts
    padded_ends = ((sizes + ROTATION - 1) // ROTATION * ROTATION).cumsum(0, dtype=torch.int32)
    padded_starts = torch.cat([ends.new_zeros(1), padded_ends[:-1]])
    last = ends.shape[0] - 1

    def move(count: int, ends_here: Tensor, starts_here: Tensor, starts_there: Tensor) -> Tensor:
        rows = torch.arange(count, dtype=torch.int32, device=ends.device)
        group = torch.searchsorted(ends_here, rows, right=True, out_int32=True).clamp(max=last)
        offset = rows - starts_here[group]
        return torch.where(offset < sizes[group], starts_there[group] + offset, -1)

    sources = move(padded_rows(tokens, ends.shape[0]), padded_ends, padded_starts, starts)
    return padded_ends, sources, move(tokens, ends, starts, padded_starts)


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((rows.shape[0], x.shape[1]))
    return torch.where(rows.unsqueeze(1) >= 0, x[rows.clamp(min=0)], 0)


# ---------------------------------------------------------------- products


def group_matrices(b: Tensor, groups: int, across: bool) -> Tensor:
    """[G, N, K], a view: the matrices of the groups in b [G*N, K], or in b [N, G*K] with `across`."""
    return b.unflatten(1, (groups, -1)).permute(1, 0, 2) if across else b.unflatten(0, (groups, -1))


def _operands(packed: tuple[Tensor, ...], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a and b of six packed tensors, as numbers, scale and tensor scales divided between them: exact, see `reference_ops.split_scale`."""
    a, b = Quantized(*packed[:3]), Quantized(*packed[3:])
    factors = reference_ops.split_scale(a.tensor_scale, b.tensor_scale, scale)
    left, right = ((q.dequantize_unscaled(torch.float32) * f).to(dtype) for q, f in zip((a, b), factors, strict=True))
    return left, right


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *ends.tolist()]))


def _grouped_matmul(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    ends: Tensor, across: bool, scale: float,
) -> Tensor:  # fmt: skip
    _check_ends("grouped_matmul", ends)
    shape = _grouped_matmul_shape(a_codes, b_codes, ends, across)
    packed = a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale
    if ends.is_cuda:
        a, b = _operands(packed, scale, torch.bfloat16)
        return torch._grouped_mm(a, group_matrices(b, ends.shape[0], across).transpose(1, 2), offs=ends)
    a, b = _operands(packed, scale, torch.float32)
    y, matrices = torch.zeros(shape), group_matrices(b, ends.shape[0], across)
    with torch.autocast("cpu", enabled=False):
        for matrix, (start, end) in zip(matrices, _spans(ends), strict=True):
            y[start:end] = a[start:end] @ matrix.t()
    return y.bfloat16()


def _grouped_outer(
    a_codes: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b_codes: Tensor, b_scales: Tensor, b_tensor_scale: Tensor,
    ends: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    _check_ends("grouped_outer", ends)
    _check_outer(a_codes, b_codes)
    packed = a_codes, a_scales, a_tensor_scale, b_codes, b_scales, b_tensor_scale
    if ends.is_cuda:
        a, b = _operands(packed, scale, torch.bfloat16)
        return torch._grouped_mm(a, b.t(), offs=ends)
    a, b = _operands(packed, scale, torch.float32)
    with torch.autocast("cpu", enabled=False):
        return torch.stack([a[:, start:end] @ b[:, start:end].t() for start, end in _spans(ends)]).bfloat16()


for _function in (_group_rows, _take_rows, _grouped_matmul, _grouped_outer):
    for _device in ("CPU", "CUDA"):
        _library.impl(_function.__name__.removeprefix("_"), _function, _device)
