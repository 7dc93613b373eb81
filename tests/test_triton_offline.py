"""Every Triton kernel compiles for every GPU that we name, without one at hand, into the instructions that it was written for.

Arguments are typed and specialized as a launch with a matrix of 16-byte aligned rows would have them; tiles and options are those of the
launchers. "Stack" is what ptxas reserves for a thread in local memory: spilled registers, mostly.
"""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from dataclasses import dataclass, field, replace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from quartet_compile.kernels.triton_kernels import (  # noqa: E402
    dequantize,
    forward,
    forward_groups,
    forward_words,
    gradient_codes,
    native_matmul,
    saved_codes,
)
from quartet_compile.kernels.triton_kernels.launch import EXACT, FUSED, target_for  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")

CAPABILITIES = (80, 89, 90, 100, 103, 120)
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024}
"""Bytes that a program may have (CUDA C++ programming guide, table of technical specifications)."""


@dataclass(frozen=True)
class Case:
    """A kernel, its typed arguments (a trailing "!" means divisible by 16), its constants and its launch options.

    exact: nothing but IEEE operations, rounded one by one. A kernel that does without argues that its results are the same.
    """

    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    exact: bool = True


def cases(capability: int, dtype: str) -> dict[str, Case]:
    target = target_for(capability, processors=1)
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
    if target.native:
        tile = native_matmul.product_tile(capability)
        packed = {"codes": "*u8", "scales": "*fp8e4nv", "tensor_scale": "*fp32"}
        operands = {f"{side}_{part}": kind for side in "ab" for part, kind in packed.items()}
        found["native_matmul"] = Case(
            native_matmul.native_matmul_kernel,
            {**operands, "bias": f"*{dtype}", "out": f"*{dtype}", "scale": "fp32", "M": "i32!", "N": "i32!", "groups": "i32!"},
            {"HAS_BIAS": True, "BAND": 8, **{k: v for k, v in tile.items() if k.startswith("BLOCK")}},
            {k: v for k, v in tile.items() if not k.startswith("BLOCK")},
        )
    return found


def forward_cases(capability: int, dtype: str) -> dict[str, Case]:
    """Both passes of `forward`; with values where no FP4 tensor cores are, as they are used."""
    native = target_for(capability, processors=1).native
    packed = {"codes": "*u8", "scales": "*u8", "values": "*i16", "peaks": "*i32", "groups": "i32!"}
    matrix = {**packed, "x": f"*{dtype}", "columns": "i32!", "groups_per_row": "i32!"}
    second = {**matrix, "out_tensor_scale": "*fp32"}
    words = {**packed, "x": "*i32", "codes": "*i32", "values": "*i32"}
    options = {"num_warps": 8}
    ragged = {"columns": "i32"}
    found = {}
    for suffix, values in (("", False), ("_values", True)):
        forms = {"FOUR": True, "VALUES": values}
        of_any = {**forms, "NATIVE": native, "BLOCK": forward.ANY_BLOCK}
        constants = {"CEILING": 256.0, "REPAIRED": forward.REPAIRED, "CHUNK": forward.CHUNK, "WIDTH": forward.WIDTH}
        found |= {
            f"words{suffix}": Case(
                forward_words.round_words_kernel,
                words,
                {**forms, "NATIVE": native and not values, "XORSIGN": capability > 80, "BLOCK": forward.WORDS_BLOCK},
                options,
                exact=False,
            ),
            f"any{suffix}": Case(forward_groups.round_any_kernel, matrix, {**of_any, "RAGGED": False}, options),
            f"any_ragged{suffix}": Case(forward_groups.round_any_kernel, {**matrix, **ragged}, {**of_any, "RAGGED": True}, options),
            f"align{suffix}": Case(
                forward.align_scales_kernel,
                second,
                {**of_any, **constants, "RAGGED": False, "BLOCK": forward.WORDS_BLOCK},
                options,
            ),
            f"align_ragged{suffix}": Case(
                forward.align_scales_kernel, {**second, **ragged}, {**of_any, **constants, "RAGGED": True}, options
            ),
        }
    return {name: case for name, case in found.items() if not (native and name.endswith("values"))}


def backward_cases(capability: int, dtype: str) -> dict[str, Case]:
    """Both launches of `gradient_codes`, in one orientation and in both, and of `saved_codes`."""
    target = target_for(capability, processors=1)
    forms = target.forms(TORCH_DTYPES[dtype])
    packed = {"codes": "*i32", "scales": "*u8", "exponents": "*u8", "peaks": "*i32"}
    saved = {
        **packed, "saved_codes": "*i32", "saved_scales": "*u8", "seeds": "*i64", "index": "i32", "rank": "i32",
        "length": "i32!", "columns": "i32!", "groups_per_row": "i32!",
    }  # fmt: skip
    columns, options = saved_codes.saved_tile(capability)
    saved_forms = {**forms, "COLUMNS": columns}
    found = {
        "saved": Case(saved_codes.saved_codes_kernel, saved, {**saved_forms, "CHUNK": 8}, {**options, **FUSED}, exact=False),
        "align_saved": Case(
            saved_codes.align_saved_kernel,
            {**saved, "incoming": "*fp32", "out_tensor_scale": "*fp32", "tiles": "i32", "programs": "i32"},
            {**saved_forms, "TILES": saved_codes.ALIGNED_TILES},
            saved_codes.ALIGN_OPTIONS,
        ),
    }
    gradient = {
        **{f"{side}_{name}": kind for side in ("row", "column") for name, kind in packed.items()},
        "x": f"*{dtype}", "seeds": "*i64", "row_index": "i32", "column_index": "i32", "rank": "i32",
        "rows": "i32!", "columns": "i32!", "row_stride": "i32!", "tiles": "i32",
    }  # fmt: skip
    aligned = {
        **packed, "operand": f"*{dtype}", "out_tensor_scale": "*fp32", "seeds": "*i64", "index": "i32", "rank": "i32",
        "rows": "i32!", "columns": "i32!", "row_stride": "i32!", "column_stride": "i32!", "tiles": "i32", "programs": "i32",
    }  # fmt: skip
    for name, row, column in (("", True, False), ("_transposed", False, True), ("_both", True, True)):
        if row and column and not gradient_codes.both_at_once(capability, TORCH_DTYPES[dtype]):
            continue
        tile = gradient_codes.tile_for(capability, TORCH_DTYPES[dtype], row, column)
        sides = {**forms, "column_stride": 1, "ROW": row, "COLUMN": column, "ROWS": tile.rows, "COLUMNS": tile.columns}
        found[f"gradient{name}"] = Case(
            gradient_codes.gradient_codes_kernel, gradient, {**sides, "STAGES": tile.stages}, {**tile.options, **FUSED}, exact=False
        )
        if row and column:
            continue  # aligned one after the other
        tile_rows, stride = (tile.rows, "column_stride") if row else (tile.columns, "row_stride")
        found[f"align_gradient{name}"] = Case(
            gradient_codes.align_gradient_kernel,
            {name: kind for name, kind in aligned.items() if name != stride},
            {**forms, stride: 1, "ROWS": tile_rows, "BLOCKS_FIRST": row, "TILES": gradient_codes.aligned_tiles(tile_rows)},
            gradient_codes.ALIGN_OPTIONS,
        )
    return found


def compiled(case: Case, capability: int):
    names = case.kernel.arg_names
    assert {*case.types, *case.constants} == {*names}
    signature = {name: case.types.get(name, "constexpr").removesuffix("!") for name in names}
    divisible = [i for i, name in enumerate(names) if signature[name].startswith("*") or case.types.get(name, "").endswith("!")]
    source = ASTSource(case.kernel, signature, case.constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**EXACT, **case.options})


def stack_bytes(binary, folder) -> int | None:
    """Local memory of a thread, or None where this Triton's cuobjdump cannot tell."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    listing = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", listing.stdout + listing.stderr)
    return int(found.group(1)) if found else None


ONCE = ("align_saved", "dequantize", "saved", "words", "words_values")
"""Kernels that do not depend on the dtype of the operand."""

ALL = [(c, d, name) for c in CAPABILITIES for d in TORCH_DTYPES for name in cases(c, d) if d == "bf16" or name not in ONCE]
FAST = [(c, d, name) for c, d, name in ALL if d == "bf16" and (c in (90, 100) or (c == 120 and name in ("words", "native_matmul")))]
SELECTED = [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(map(str, case))) for case in ALL]


@pytest.mark.parametrize(("capability", "dtype", "name"), SELECTED)
def test_kernel_compiles(capability, dtype, name, tmp_path):
    binary = compiled(cases(capability, dtype)[name], capability)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    stack = stack_bytes(binary, tmp_path)
    if stack is None:
        warnings.warn("cuobjdump of this Triton cannot read the binary: spills not checked", stacklevel=1)
    elif not (name.startswith("align_gradient") and dtype == "fp32"):  # whose rotation, mostly not run, is three products
        assert stack == 0, f"{stack} bytes of stack a thread"
    ptx = binary.asm["ptx"]
    # Exactness: subnormal numbers stay, divisions are IEEE ones, products and sums are rounded separately.
    assert "div.full" not in ptx
    if cases(capability, dtype)[name].exact:
        assert ".ftz" not in ptx
        assert "rcp.approx" not in ptx
        assert "fma.rn.f32" not in ptx
    native = target_for(capability, 1).native
    rotates = name.startswith(("gradient", "saved", "align_gradient", "align_saved"))
    if rotates or name in ("words", "any", "any_ragged"):
        assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == native
    if rotates:
        hopper = "mma.sync" if dtype == "fp32" and "gradient" in name else "wgmma.mma_async"
        assert {8: "mma.sync", 9: hopper, 10: "tcgen05.mma", 12: "mma.sync"}[capability // 10] in ptx
    if name in ("words", "words_values"):
        assert ptx.count("shfl.sync") <= 8  # for the maximum of a block only; newer versions of Triton need none
    if name == "native_matmul":
        product = "tcgen05.mma" if capability < 120 else "mma.sync"
        assert re.search(rf"{re.escape(product)}\S*kind::mxf4nvf4", ptx)


NOT_SPECIALIZED = ("index", "rank", "scale_exponent")
"""Arguments of which a launch makes no constants: they differ from call to call."""


def with_integers(case: Case, kind: str | int) -> Case:
    """The case with its other integers of one type, or all the constant 1, as Triton has them where an argument is 1."""
    integers = [name for name, type_ in case.types.items() if type_.startswith("i") and name not in NOT_SPECIALIZED]
    if isinstance(kind, str):
        return replace(case, types={**case.types, **dict.fromkeys(integers, kind)})
    types = {name: type_ for name, type_ in case.types.items() if name not in integers}
    return replace(case, types=types, constants={**case.constants, **dict.fromkeys(integers, kind)})


@pytest.mark.parametrize("name", cases(100, "bf16"))
@pytest.mark.parametrize("integers", [1, "i64"], ids=["a_matrix_of_one_number", "64_bit_sizes"])
def test_kernel_compiles_for_other_sizes(name, integers):
    compiled(with_integers(cases(100, "bf16")[name], integers), 100)


def test_only_blackwell_has_the_native_product():
    assert [c for c in CAPABILITIES if "native_matmul" in cases(c, "bf16")] == [100, 103, 120]
