"""The kernels that one linear launches on a GPU with FP4 tensor cores, forward and backward, as data for `roofline`.

To model another kernel, name its case of `offline.cases` here. Bytes are those that the algorithm moves between DRAM and the SMs, inputs
once and outputs once; what meets the L2 cache by chance is not taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from offline import Case, cases, compiled
from sass import Count, count, disassemble

from quartet_compile.kernels.triton_kernels import eden_codes, forward, gradient_tiles, rotation, saved_codes, saved_values

BF16, CODE, SCALE, PROVISIONAL = 2.0, 1 / 2, 1 / 16, 1 / 16 + 1 / 128
"""Bytes an element: its own, its code, its share of its group's E4M3 scale, and of what stands for it before alignment."""

ROTATION_FLOPS = 2 * 64
"""BF16 tensor-core operations an element: a product with a Hadamard matrix of 64, twice as many on sm_100 and sm_103 (`rotation`)."""

Constants = Mapping[str, Any]


@dataclass(frozen=True)
class Pass:
    """A launch over the elements of an operand.

    case: its name in `offline.cases`. tile: elements of a tile, from the constants; None: no kernel of ours, of which only the bytes are
    known. bytes, flops: an element. programs: how many to an SM share the tiles, in a loop; None: one program a tile. rare: device
    functions that ordinary numbers do not reach.
    """

    case: str
    tile: Callable[[Constants], int] | None
    bytes: float
    flops: float = 0.0
    programs: int | None = None
    rare: tuple[Any, ...] = ()


def _groups(constants: Constants) -> int:
    return constants["BLOCK"] * 16


def _rows(constants: Constants) -> int:
    return constants["HEIGHT"] * 128


def _columns(constants: Constants) -> int:
    return constants["COLUMNS"] * 128


def _aligned(constants: Constants) -> int:
    return 128 * 128 * eden_codes.ALIGNED_BLOCKS.value


REPAIR = (
    eden_codes._align_any, eden_codes.exact_codes, rotation.rotate, rotation.signed_hadamard, saved_values.load_block,
    gradient_tiles.load_halves,
)  # fmt: skip
"""What an aligning launch does with tiles whose scales may be subnormal numbers."""

GRADIENT = Pass("gradient", _rows, BF16 + CODE + PROVISIONAL, ROTATION_FLOPS, programs=2)
TRANSPOSED = Pass("gradient_transposed", _rows, CODE + PROVISIONAL, ROTATION_FLOPS, programs=2)
"""One launch for both orientations: what is read for the one is in the L2 cache for the other, by design (`gradient_tiles`)."""

SAVED = Pass("saved", _columns, CODE + SCALE + CODE + PROVISIONAL, ROTATION_FLOPS, programs=2)
ALIGN = Pass("align_gradient", _aligned, PROVISIONAL + SCALE, rare=REPAIR)
ALIGN_TRANSPOSED = Pass("align_gradient_transposed", _aligned, PROVISIONAL + SCALE, rare=REPAIR)
ALIGN_SAVED = Pass("align_saved", _aligned, PROVISIONAL + SCALE, rare=REPAIR)
SWIZZLE = Pass("swizzle", None, 2 * SCALE)
"""The scales of forward operands in the order that tensor cores read (`passes.native`): pointwise code by Inductor."""

FORWARD = (
    Pass("words", _groups, BF16 + CODE + SCALE),
    Pass("align", lambda c: c["CHUNK"] * 16, 2 * SCALE, programs=2, rare=(forward._quantize_again,)),
)
"""Launches of ``quantize``, for x and for w."""

QUANTIZE_GRADIENT = (GRADIENT, TRANSPOSED, ALIGN, ALIGN_TRANSPOSED)

PRODUCT = "product_swizzled_0"
"""The case of the FP4 product: a program makes a tile of the output, in a loop over K. The tile that is taken without autotuning."""


@dataclass(frozen=True)
class Compiled:
    """A case, compiled, and the instructions that one of its threads issues."""

    case: Case
    count: Count

    @property
    def threads(self) -> int:
        return 32 * self.case.options["num_warps"]


def quantizers(capability: int) -> list[tuple[str, tuple[Pass, ...]]]:
    """All but the products, in order: the operand that is read, x [tokens, in], w [out, in] or e [tokens, out], and the launches."""
    saved = replace(SAVED, programs=saved_codes.resident(capability))
    launches = [*((operand, (*FORWARD, SWIZZLE)) for operand in "xw"), ("e", QUANTIZE_GRADIENT), *((o, (saved, ALIGN_SAVED)) for o in "wx")]
    whole = 2 if capability // 10 == 10 else 1
    return [(operand, tuple(replace(launch, flops=whole * launch.flops) for launch in of_operand)) for operand, of_operand in launches]


def read(capability: int) -> dict[str, Compiled]:
    """Every kernel that is launched, compiled for a compute capability and bfloat16 operands. Case name -> counts."""
    known = cases(capability, "bf16")
    launches = [launch for _, launches in quantizers(capability) for launch in launches if launch.tile]
    rare = {launch.case: launch.rare for launch in launches} | {PRODUCT: ()}
    return {
        name: Compiled(known[name], count(disassemble(compiled(known[name], capability).asm["cubin"]), functions))
        for name, functions in rare.items()
    }
