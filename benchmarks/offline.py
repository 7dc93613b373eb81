"""The Triton kernels, compiled for GPUs that are not there.

Arguments are typed and specialized as a launch with a matrix of 16-byte aligned rows would have them; tiles and options are those of the
launchers. The tests look at what the compiler made of the kernels, `roofline` counts the instructions.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quartet_compile.kernels.triton_kernels import (
    dequantize,
    forward,
    forward_groups,
    forward_words,
    gradient_codes,
    packed_product,
    saved_codes,
    saved_values,
)
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, target_for

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024}
"""Bytes that a program may have (CUDA C++ programming guide, table of technical specifications)."""

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A kernel, its typed arguments (a trailing "!" means divisible by 16), its constants and its launch options.

    exact: nothing but IEEE operations, rounded one by one. A kernel that does without argues that its results are the same.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=lambda: {"num_warps": 4})
    exact: bool = True


def cases(capability: int, dtype: str) -> dict[str, Case]:
    """The kernels behind the operators on packed matrices, for a compute capability and the operand's dtype: "bf16", "fp16" or "fp32"."""
    target = target_for(capability, processors=1)
    forms = {"NATIVE": target.native}
    found = {
        **forward_cases(capability, dtype),
        **backward_cases(capability, dtype),
        "dequantize": Case(
            dequantize.dequantize_kernel,
            {
                "codes": "*u8", "scales": "*u8", "a_scale": "*fp32", "b_scale": "*fp32",
                "scale_exponent": "i32", "out": "*bf16", "groups": "i32!",
            },
            {"SECOND": True, "BLOCK": 128},
        ),
    }
    for form, swizzled in (("plain", False), ("swizzled", True)) if capability >= 90 else ():
        tiles = packed_product.product_tiles(target, swizzled)
        for number, tile in enumerate(tiles if dtype == "bf16" else tiles[:1]):
            sizes = {k: v for k, v in tile.items() if not k.startswith("num_")}
            found[f"product_{form}_{number}"] = Case(
                packed_product.packed_product_kernel,
                {**product_types(), "bias": f"*{dtype}", "out": f"*{dtype}", "scale": "fp32", "M": "i32!", "N": "i32!", "groups": "i32!"},
                {"HAS_BIAS": True, "BAND": packed_product.BAND, "SWIZZLED": swizzled, **forms, **sizes},
                {k: v for k, v in tile.items() if k not in sizes},
            )
    return found


def product_types() -> dict[str, str]:
    """Both operands of a product."""
    packed = {"codes": "*u8", "scales": "*fp8e4nv", "tensor_scale": "*fp32"}
    return {f"{side}_{part}": kind for side in "ab" for part, kind in packed.items()}


def backward_cases(capability: int, dtype: str) -> dict[str, Case]:
    """Both launches of `gradient_codes`, in one orientation and in both, and of `saved_codes`."""
    target = target_for(capability, processors=1)
    forms = target.forms()
    packed = {"codes": "*i32", "scales": "*u8", "exponents": "*u8", "peaks": "*i32"}
    saved = {
        **packed, "saved_codes": "*i32", "saved_scales": "*u8", "seeds": "*i64", "index": "i32", "rank": "i32",
        "length": "i32!", "columns": "i32!", "groups_per_row": "i32!",
    }  # fmt: skip
    saved_forms = {**forms, "COLUMNS": saved_values.COLUMNS}
    found = {
        "saved": Case(
            saved_codes.saved_codes_kernel,
            {**saved, "tiles": "i32", "count": "i32"},
            saved_forms,
            {**saved_codes.OPTIONS, **FUSED},
            exact=False,
        ),
        "align_saved": Case(
            saved_codes.align_saved_kernel,
            {**saved, "swizzled": "*i32", "incoming": "*fp32", "out_tensor_scale": "*fp32", "programs": "i32"},
            {**saved_forms, "SWIZZLED": target.native},
            saved_codes.ALIGN_OPTIONS,
        ),
    }
    gradient = {
        **{f"{side}_{name}": kind for side in ("row", "column") for name, kind in packed.items()},
        "x": f"*{dtype}", "rotations": "*bf16", "seeds": "*i64", "row_index": "i32", "column_index": "i32", "rank": "i32",
        "rows": "i32!", "columns": "i32!", "row_stride": "i32!", "tiles": "i32",
    }  # fmt: skip
    aligned = {
        **packed, "swizzled": "*i32", "operand": f"*{dtype}", "rotations": "*bf16", "out_tensor_scale": "*fp32",
        "seeds": "*i64", "index": "i32", "rank": "i32",
        "rows": "i32!", "columns": "i32!", "row_stride": "i32!", "column_stride": "i32!", "programs": "i32",
    }  # fmt: skip
    tile = gradient_codes.tile_for(capability, TORCH_DTYPES[dtype])
    for name, row, column in (("", True, False), ("_transposed", False, True), ("_both", True, True)):
        sides = {**forms, "column_stride": 1, "ROW": row, "COLUMN": column, "HEIGHT": tile.height, "STAGES": tile.stages}
        found[f"gradient{name}"] = Case(gradient_codes.gradient_codes_kernel, gradient, sides, {**tile.options, **FUSED}, exact=False)
        if row and column:
            continue  # aligned one after the other
        stride = "column_stride" if row else "row_stride"
        found[f"align_gradient{name}"] = Case(
            gradient_codes.align_gradient_kernel,
            {name: kind for name, kind in aligned.items() if name != stride},
            {**forms, stride: 1, "TURNED": column, "SWIZZLED": target.native},
            gradient_codes.ALIGN_OPTIONS,
        )
    return found


def forward_cases(capability: int, dtype: str) -> dict[str, Case]:
    """Both passes of `forward`; with values, and values alone, where no FP4 tensor cores are, as they are used."""
    target = target_for(capability, processors=1)
    native, early = target.native, target.early
    packed = {"codes": "*u8", "scales": "*u8", "values": "*i16", "peaks": "*i32", "groups": "i32!"}
    matrix = {**packed, "x": f"*{dtype}", "columns": "i32!", "groups_per_row": "i32!"}
    second = {**matrix, "out_tensor_scale": "*fp32"}
    words = {**packed, "x": "*i32", "codes": "*i32", "values": "*i32"}
    ragged = {"columns": "i32"}
    found = {}
    for suffix, codes, values in (("", True, False), ("_and_values", True, True), ("_values", False, True)):
        forms = {"FOUR": True, "CODES": codes, "VALUES": values, "EARLY": early}
        of_any = {**forms, "NATIVE": native, "BLOCK": forward.BLOCK}
        constants = {"CEILING": 256.0, "FOURS": True, "REPAIRED": forward.REPAIRED, "CHUNK": forward.CHUNK, "WIDTH": forward.WIDTH}
        found |= {
            f"words{suffix}": Case(
                forward_words.round_words_kernel,
                words,
                {**forms, "NATIVE": native and not values, "XORSIGN": capability > 80, "BLOCK": forward.BLOCK},
                forward.WORDS_OPTIONS,
                exact=False,
            ),
            f"any{suffix}": Case(forward_groups.round_any_kernel, matrix, {**of_any, "RAGGED": False}, forward.ANY_OPTIONS),
            f"any_ragged{suffix}": Case(
                forward_groups.round_any_kernel, {**matrix, **ragged}, {**of_any, "RAGGED": True}, forward.ANY_OPTIONS
            ),
            f"align{suffix}": Case(forward.align_scales_kernel, second, {**of_any, **constants, "RAGGED": False}, forward.ALIGN_OPTIONS),
            f"align_ragged{suffix}": Case(
                forward.align_scales_kernel,
                {**second, **ragged},
                {**of_any, **constants, "RAGGED": True, "FOURS": False},
                forward.ALIGN_OPTIONS,
            ),
        }
    return {name: case for name, case in found.items() if not (native and name.endswith("values"))}


def compiled(case: Case, capability: int) -> Any:
    """What `triton.compile` makes of a case: `asm` holds the stages, "ptx" and "cubin" among them."""
    names = case.kernel.arg_names
    assert {*case.types, *case.constants} == {*names}
    signature = {name: case.types.get(name, "constexpr").removesuffix("!") for name in names}
    divisible = [i for i, name in enumerate(names) if signature[name].startswith("*") or case.types.get(name, "").endswith("!")]
    source = ASTSource(case.kernel, signature, case.constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**EXACT, **case.options})


def stack_bytes(binary: Any, folder: Path) -> int | None:
    """Local memory of a thread, or None where this Triton's cuobjdump cannot tell."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    listing = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", listing.stdout + listing.stderr)
    return int(found.group(1)) if found else None
