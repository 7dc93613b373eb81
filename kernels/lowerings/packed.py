"""Products of packed matrices on FP4 tensor cores: a Triton template, into which scaling, bias and what follows are fused, or cuBLAS.

The template is `packed_product.accumulate` between Inductor's way of naming the operands and its way of storing the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import ExternKernelChoice, SymbolicGridFn, TritonTemplate
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quartet_compile.kernels import swizzled_ops  # noqa: F401  (registers the operators)
from quartet_compile.kernels.format import SCALE_TILE_GROUPS, SCALE_TILE_ROWS, ceil_to
from quartet_compile.kernels.lowerings.common import add_bias, aten, autotunes, best, lowering
from quartet_compile.kernels.triton_kernels.launch import device_target
from quartet_compile.kernels.triton_kernels.packed_product import BAND, product_tiles

quartet = torch.ops.quartet

SOURCE = """\
from quartet_compile.kernels.triton_kernels.packed_product import accumulate, column_slices, tile_start
{{def_kernel("A", "A_SCALES", "A_TENSOR_SCALE", "B", "B_SCALES", "B_TENSOR_SCALE")}}
    M = {{size("A", 0)}}
    N = {{size("B", 0)}}
    groups = {{size("A", 1)}} // 8
    first_m, first_n = tile_start(tl.program_id(0).to(INDEX_DTYPE), M, N, BLOCK_M, BLOCK_N, BAND)
    acc = accumulate(A, A_SCALES, B, B_SCALES, first_m, first_n, M, N, groups, BLOCK_M, BLOCK_N, BLOCK_K, SWIZZLED, NATIVE)
    parts = column_slices(acc, SLICES)
    a_tensor_scale = tl.load(A_TENSOR_SCALE)
    b_tensor_scale = tl.load(B_TENSOR_SCALE)
    idx_m = (first_m + tl.arange(0, BLOCK_M))[:, None]
    for i in tl.static_range(SLICES):
        part = parts[i] * SCALE * a_tensor_scale * b_tensor_scale
        idx_n = (first_n + i * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES))[None, :]
        mask = (idx_m < M) & (idx_n < N)
        {{store_output(("idx_m", "idx_n"), "part", "mask", indent_width=8, val_shape=("BLOCK_M", "BLOCK_N // SLICES"))}}
"""


@SymbolicGridFn
def _grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1


TEMPLATE = TritonTemplate(name="quartet_packed_product", grid=_grid, source=SOURCE)


def quartet_library_product(
    a: Tensor, a_scales: Tensor, a_tensor_scale: Tensor, b: Tensor, b_scales: Tensor, b_tensor_scale: Tensor, *, scale: float
) -> Tensor:
    """cuBLAS: packed a [M, K] times b [N, K] transposed, swizzled scales -> bfloat16 [M, N].

    It multiplies the tensor scales first: where their product leaves the range of float32, so does the result.
    """
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    recipe, order = [ScalingType.BlockWise1x16, ScalingType.TensorWise], [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    left, right = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2).t()
    scales = [a_scales, a_tensor_scale * scale], [b_scales, b_tensor_scale]
    return scaled_mm(left, right, scales[0], recipe, scales[1], recipe, order, order)


LIBRARY_PRODUCT = ExternKernelChoice(quartet_library_product, has_out_variant=False)


def is_native(device: torch.device) -> bool:
    return device.type == "cuda" and device_target(device).native


def has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and device_target(device).capability >= 90


def _is_one_number(operands: Any) -> bool:
    """Whether the product is [1, 1]: Inductor drops the mask of a template that stores a single number."""
    return all(statically_known_true(codes.get_size()[0] == 1) for codes in (operands[0], operands[3]))


@lowering(quartet.matmul.default, when=lambda *args: is_native(args[0].get_device()) and not _is_one_number(args))
def matmul(
    a_codes: Any, a_scales: Any, a_g: Any, b_codes: Any, b_scales: Any, b_g: Any, bias: Any, scale: float, dtype: torch.dtype
) -> Any:  # fmt: skip
    """Plain scales."""
    return _product([a_codes, a_scales, a_g, b_codes, b_scales, b_g], bias, scale, dtype, swizzled=False)


@lowering(quartet.matmul_swizzled.default, when=lambda *args: has_tma(args[0].get_device()) and not _is_one_number(args))
def matmul_swizzled(
    a_codes: Any, a_scales: Any, a_g: Any, b_codes: Any, b_scales: Any, b_g: Any, bias: Any, scale: float, dtype: torch.dtype
) -> Any:  # fmt: skip
    """Scales in tiles."""
    return _product([a_codes, a_scales, a_g, b_codes, b_scales, b_g], bias, scale, dtype, swizzled=True)


@lowering(quartet.swizzle.default, when=lambda scales: has_tma(scales.get_device()))
def swizzle(scales: Any) -> Any:
    """`format.swizzle_scales` in pointwise operations."""
    rows, groups = scales.get_size()
    padded_rows, padded_groups = ceil_to(rows, SCALE_TILE_ROWS), ceil_to(groups, SCALE_TILE_GROUPS)
    x = lowerings[aten.view.dtype](scales, torch.uint8)
    x = lowerings[aten.constant_pad_nd.default](x, [0, padded_groups - groups, 0, padded_rows - rows], 0)
    x = lowerings[aten.view.default](x, [padded_rows // 128, 4, 32, padded_groups // 4, 4])
    x = lowerings[aten.clone.default](lowerings[aten.permute.default](x, [0, 3, 2, 1, 4]), memory_format=torch.contiguous_format)
    return lowerings[aten.view.dtype](lowerings[aten.view.default](x, [padded_rows * padded_groups]), torch.float8_e4m3fn)


def _product(operands: list[Any], bias: Any, scale: float, out_dtype: torch.dtype, *, swizzled: bool) -> Any:
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)) for x in operands]
    device: Any = inputs[0].get_device()
    # With a bias, the template's own result is float32, of which nothing is stored once the addition is fused into it.
    layout = ir.FixedLayout(device, torch.float32 if bias is not None else out_dtype, [inputs[0].get_size()[0], inputs[3].get_size()[0]])
    target = device_target(device)
    choices: list[Any] = []
    tiles = product_tiles(target, swizzled)
    for tile in tiles if autotunes() else tiles[:1]:
        constants = {"SCALE": scale, "SWIZZLED": swizzled, "NATIVE": target.native, "BAND": BAND}
        error = TEMPLATE.maybe_append_choice(choices, input_nodes=inputs, layout=layout, **tile, **constants)
        if error is not None:
            raise error
    in_library = target.native and swizzled and bias is None and out_dtype == torch.bfloat16
    if autotunes() and in_library and statically_known_true(layout.size[1] % 16 == 0):
        LIBRARY_PRODUCT.maybe_append_choice(choices, input_nodes=inputs, layout=layout, scale=scale)
    y = best("quartet_packed_product", choices, inputs, layout)
    return y if bias is None else add_bias(y, bias, out_dtype)
