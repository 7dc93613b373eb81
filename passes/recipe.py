"""A recipe is a table: three products, two operands each, six cells.

A cell names the rule by which an operand is quantized and says from what: from the tensor itself, or from the packed operand that the
forward pass saved. `rewrite` turns a matched linear into operators by reading this table and nothing else, so a new recipe is a new table.
"""

from __future__ import annotations

from dataclasses import dataclass

from quartet_compile.kernels.format import ROTATION
from quartet_compile.kernels.ops import BACKWARD_RULES, FORWARD_RULES

ROTATED_RULES = {"ms_eden": ROTATION}
"""Rules that expect a rotated operand, and the length of their rotation."""


@dataclass(frozen=True)
class Cell:
    """How one operand of one product is quantized: by which rule, and whether from the packed operand saved by the forward pass."""

    rule: str
    from_saved: bool = False

    def __str__(self) -> str:
        return self.rule + (" of the saved" if self.from_saved else "")


@dataclass(frozen=True)
class Product:
    """One matrix product: the cell of the activation or gradient operand and that of the other one."""

    left: Cell
    right: Cell

    @property
    def scale(self) -> float:
        """What undoes the rotations, which are kept in integer units: 1/d."""
        return 1.0 / ROTATED_RULES.get(self.left.rule, 1)


@dataclass(frozen=True)
class Recipe:
    """How the three products of a linear are computed; None leaves a product in the model's own dtype.

    forward: y = x w^T (left x, right w). dgrad: dx = e w (left e, right w). wgrad: dw = e^T x (left e, right x).
    """

    name: str
    forward: Product | None = None
    dgrad: Product | None = None
    wgrad: Product | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, why: str) -> None:
            if not condition:
                raise ValueError(f"recipe {self.name!r}: {why}")

        if self.forward is not None:
            for cell in (self.forward.left, self.forward.right):
                require(cell.rule in FORWARD_RULES, f"{cell.rule!r} is no forward rule; valid are {', '.join(FORWARD_RULES)}")
                require(not cell.from_saved, "the forward pass quantizes the tensors themselves; nothing is saved yet")
        for name, product in (("dgrad", self.dgrad), ("wgrad", self.wgrad)):
            if product is None:
                continue
            for cell in (product.left, product.right):
                require(cell.rule in BACKWARD_RULES, f"{cell.rule!r} is no {name} rule; valid are {', '.join(BACKWARD_RULES)}")
            require(not product.left.from_saved, f"the gradient operand of {name} is a fresh tensor; it cannot come from what was saved")
            require(product.right.from_saved, f"the second operand of {name} has to come from the packed one that the forward pass saved")
            require(self.forward is not None, f"{name} reads packed operands, so the forward product must be quantized too")
            same = ROTATED_RULES.get(product.left.rule) == ROTATED_RULES.get(product.right.rule)
            require(same, f"both operands of {name} must be rotated by the same transform")

    @property
    def is_empty(self) -> bool:
        """True for `bf16`: nothing is rewritten."""
        return self.forward is None and self.dgrad is None and self.wgrad is None
