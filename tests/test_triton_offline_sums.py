"""The kernels that measure what was quantized compile for every GPU that we name, as those of `test_triton_offline` do."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")

from offline import SHARED_MEMORY, Case, compiled  # noqa: E402

from quartet_compile.kernels.triton_kernels import sums  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")

SIZES = dict.fromkeys(("columns", "row_stride", "groups"), "i32!") | dict.fromkeys(("index", "rank", "count", "few"), "i32")
FORMS = {
    "fresh": ("*bf16", {"SAVED": False, "VALUES": False, "ROTATED": True}),
    "fresh float32": ("*fp32", {"SAVED": False, "VALUES": False, "ROTATED": True}),
    "not rotated": ("*bf16", {"SAVED": False, "VALUES": False, "ROTATED": False}),
    "saved": ("*u8", {"SAVED": True, "VALUES": False, "ROTATED": True}),
    "saved values": ("*u8", {"SAVED": True, "VALUES": True, "ROTATED": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_sums_compile(capability: int, form: str) -> None:
    x, constants = FORMS[form]
    codes = "*bf16" if constants["VALUES"] else "*u8"
    types = SIZES | {
        "x": x, "x_scales": "*u8", "x_tensor_scale": "*fp32", "codes": codes, "scales": codes, "tensor_scale": "*fp32", "seeds": "*i64",
        "out": "*fp64", "inverse_scale": "fp32",
    }  # fmt: skip
    case = Case(sums.operand_sums_kernel, types, {**constants, "column_stride": 1, "HEIGHT": sums.HEIGHT}, sums.OPTIONS)
    binary = compiled(case, capability)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    assert ".ftz" not in binary.asm["ptx"], "subnormal numbers stay"
