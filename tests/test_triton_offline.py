"""Every Triton kernel compiles for every GPU that we name, without one at hand, into the instructions that it was written for.

`benchmarks/offline.py` has the kernels with their types, tiles and options. "Stack" is what ptxas reserves for a thread in local memory:
spilled registers, mostly.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from offline import SHARED_MEMORY, TORCH_DTYPES, Case, cases, compiled, stack_bytes  # noqa: E402
from triton_support import selected  # noqa: E402

from quartet_compile.kernels.triton_kernels.launch import target_for  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")

CAPABILITIES = (80, 89, 90, 100, 103, 120)

ONCE = ("align_saved", "dequantize", "saved", "words", "words_and_values", "words_values")
"""Kernels that do not depend on the dtype of the operand."""

ALL = [(c, d, name) for c in CAPABILITIES for d in TORCH_DTYPES for name in cases(c, d) if d == "bf16" or name not in ONCE]
MAIN = [(c, name) for c, d, name in ALL if d == "bf16" and not (name.endswith("_values") and name.startswith(("any", "align")))]
FAST = [(c, "bf16", name) for c, name in MAIN if c in (90, 100) or (c == 120 and name in ("words", "product_swizzled_0"))]
SELECTED = selected(ALL, FAST)


@pytest.mark.parametrize(("capability", "dtype", "name"), SELECTED)
def test_kernel_compiles(capability, dtype, name, tmp_path):
    binary = compiled(cases(capability, dtype)[name], capability)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    stack = stack_bytes(binary, tmp_path)
    if stack is None:
        warnings.warn("cuobjdump of this Triton cannot read the binary: spills not checked", stacklevel=1)
    elif not (name.startswith("align_gradient") and dtype == "fp32"):  # whose rotation, mostly not run, is three products
        # 8: ptxas of Triton 3.6 zeroes them beside each descriptor on sm_120, and never reads them.
        assert stack == 0 or (stack == 8 and capability == 120 and name.startswith("product_swizzled")), f"{stack} bytes of stack a thread"
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
        # An aligning kernel rotates 16 rows at a time, too few for the larger forms.
        whole_tiles = {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma", 12: "mma.sync"}[capability // 10]
        assert ("mma.sync" if name.startswith("align") else whole_tiles) in ptx
    if name.startswith("words"):
        # For the maximum of a block, of which newer versions of Triton need none, and five to store a group's values.
        case = cases(capability, dtype)[name]
        constants, threads = case.constants, 32 * case.options["num_warps"]
        stores = 5 * constants["BLOCK"] // threads if constants["VALUES"] else 0
        assert stores <= ptx.count("shfl.sync") <= stores + 8
    if name.startswith("product"):
        product = {9: "mma", 10: "tcgen05.mma", 12: "mma.sync"}[capability // 10]  # fewer than 64 rows are not for wgmma
        assert re.search(rf"{re.escape(product)}\S*kind::mxf4nvf4" if native else re.escape(product), ptx)
        assert ("cp.async.bulk.tensor.5d" in ptx) == ("swizzled" in name)


NOT_SPECIALIZED = ("index", "rank", "scale_exponent", "tiles", "count")
"""Arguments of which a launch makes no constants: most differ from call to call."""


def with_integers(case: Case, kind: str | int) -> Case:
    """The case with its other integers of one type, or all the constant 1, as Triton has them where an argument is 1."""
    integers = [name for name, type_ in case.types.items() if type_.startswith("i") and name not in NOT_SPECIALIZED]
    if isinstance(kind, str):
        return replace(case, types={**case.types, **dict.fromkeys(integers, kind)})
    types = {name: type_ for name, type_ in case.types.items() if name not in integers}
    return replace(case, types=types, constants={**case.constants, **dict.fromkeys(integers, kind)})


def of_sizes(name: str) -> Any:
    """Other tiles of a product, and forms of a kernel of which a wider one is compiled, ragged or for both orientations, are slow."""
    narrower = name in ("any", "gradient", "gradient_transposed")
    return pytest.param(name, marks=pytest.mark.slow if narrower or re.fullmatch(r"product_\w+_[1-9]", name) else ())


@pytest.mark.parametrize("name", [*map(of_sizes, cases(100, "bf16"))])
@pytest.mark.parametrize("integers", [1, "i64"], ids=["a_matrix_of_one_number", "64_bit_sizes"])
def test_kernel_compiles_for_other_sizes(name, integers):
    compiled(with_integers(cases(100, "bf16")[name], integers), 100)
