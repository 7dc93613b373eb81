"""The kernels that make bfloat16 values compile for every GPU that multiplies them, without spilling, into the instructions meant."""

from __future__ import annotations

import re
import warnings

import pytest

pytest.importorskip("triton")

from offline import SHARED_MEMORY, TORCH_DTYPES, Case, compiled, stack_bytes
from test_triton_offline import pytestmark  # noqa: F401
from triton_support import selected

from quartet_compile.kernels.triton_kernels import gradient_values, rotation, saved_values
from quartet_compile.kernels.triton_kernels.eden_values import AGAIN
from quartet_compile.kernels.triton_kernels.launch import FUSED, target_for

CAPABILITIES = (80, 89, 90)
"""GPUs without FP4 tensor cores."""

def cases(capability: int, dtype: str) -> dict[str, Case]:
    early = target_for(capability, processors=1).early
    gradient = {
        "x": f"*{dtype}", "rotations": "*bf16", "row_out": "*bf16", "column_out": "*bf16", "peaks": "*i32", "exponents": "*u8",
        "seeds": "*i64", "row_index": "i32", "column_index": "i32", "rank": "i32", "scale": "fp32",
        "rows": "i32!", "columns": "i32!", "row_stride": "i32!", "tiles": "i32",
    }  # fmt: skip
    saved = {
        "codes": "*i32", "scales": "*u8", "incoming": "*fp32", "rotations": "*bf16", "out": "*bf16", "program_peaks": "*i32",
        "exponents": "*u8", "seeds": "*i64", "index": "i32", "rank": "i32", "length": "i32!", "columns": "i32!", "groups_per_row": "i32!",
        "tiles": "i32",
    }  # fmt: skip
    found = {
        "rotations": Case(rotation.rotations_kernel, {"seeds": "*i64", "rank": "i32", "out": "*bf16"}, {}, {"num_warps": 4}),
        "saved_values": Case(
            saved_values.saved_values_kernel,
            {**saved, "count": "i32"},
            {"COLUMNS": saved_values.COLUMNS, "EARLY": early},
            {**saved_values.OPTIONS, **FUSED},
        ),
        "saved_again": Case(
            saved_values.saved_again_kernel,
            {**saved, "programs": "i32"},
            {"COLUMNS": saved_values.COLUMNS, "EARLY": early},
            AGAIN,
        ),
    }
    for name, row, column in (("row", True, False), ("column", False, True), ("both", True, True)):
        tile = gradient_values.tile_for(capability, TORCH_DTYPES[dtype], row + column)
        forms = {"column_stride": 1, "ROW": row, "COLUMN": column, "HEIGHT": tile.height, "EARLY": early}
        found[f"gradient_{name}"] = Case(
            gradient_values.gradient_values_kernel, gradient, {**forms, "STAGES": tile.stages}, {**tile.options, **FUSED}
        )
        found[f"gradient_{name}_again"] = Case(
            gradient_values.gradient_again_kernel,
            {**gradient, **dict.fromkeys(("rows", "columns", "row_stride", "column_stride", "programs"), "i32")},
            {k: v for k, v in forms.items() if k != "column_stride"},
            AGAIN,
        )
    return found


ALL = [(c, d, name) for c in CAPABILITIES for d in TORCH_DTYPES for name in cases(c, d) if d == "bf16" or name.startswith("gradient")]
FAST = [case for case in ALL if case[:2] == (90, "bf16")]
SELECTED = selected(ALL, FAST)


@pytest.mark.parametrize(("capability", "dtype", "name"), SELECTED)
def test_kernel_compiles(capability, dtype, name, tmp_path):
    case = cases(capability, dtype)[name]
    binary = compiled(case, capability)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    stack = stack_bytes(binary, tmp_path)
    if stack is None:
        warnings.warn("cuobjdump of this Triton cannot read the binary: spills not checked", stacklevel=1)
    else:
        assert stack == 0, f"{stack} bytes of stack a thread"
    ptx = binary.asm["ptx"]
    if name.endswith("again"):
        assert ".ftz" not in ptx
        assert "fma.rn.f32" not in ptx
    if name != "rotations":
        wide = capability == 90 and not name.endswith("again")  # wgmma takes 64 rows
        assert ("wgmma.mma_async" if wide else "mma.sync") in ptx
        # Values are stored 16 bytes at a time from where they were computed.
        assert re.search(r"st\.global\.v4\.b32", ptx)


def test_values_stay_in_their_threads():
    """Between the tensor cores and the store nothing passes through shared memory: it holds the tile and the rotation alone.

    The eight numbers of a store are of one thread: [128, 16], one of eight each, may change how they are named, but not owner.
    """
    binary = compiled(cases(90, "bf16")["gradient_row"], 90)
    ttgir = binary.asm["ttgir"]
    assert not re.search(r"convert_layout.*tensor<128x(?!16xf32)", ttgir[ttgir.index("warp_group_dot") :])
    assert "st.shared" not in binary.asm["ptx"][binary.asm["ptx"].index("wgmma.mma_async") :].split("st.global.v4")[0]
