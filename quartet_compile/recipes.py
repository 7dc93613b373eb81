"""The recipes by name. To add one, add its table here; `numerics` in the documentation defines every rule."""

from __future__ import annotations

from quartet_compile.passes.recipe import Cell, Product, Recipe

BF16 = Recipe("bf16")
"""Nothing is quantized: the linear stays in the model's own dtype."""

QUARTET2 = Recipe(
    "quartet2",
    forward=Product(Cell("four_over_six"), Cell("four_over_six")),
    dgrad=Product(Cell("ms_eden"), Cell("ms_eden", from_saved=True)),
    wgrad=Product(Cell("ms_eden"), Cell("ms_eden", from_saved=True)),
)
"""Quartet II (arXiv 2601.22813): four-over-six forward, rotated and unbiased MS-EDEN backward, packed operands saved."""

RECIPES = {recipe.name: recipe for recipe in (BF16, QUARTET2)}
"""The recipes by name, for options, decorators and contexts."""
