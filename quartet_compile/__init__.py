"""Train unchanged PyTorch models in NVFP4: ``torch.compile(model, backend="quartet")``.

Importing this package is needed only for what goes beyond that line: `recipe` and `set_recipe` choose recipes, `explain` tells what
would be rewritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import_error: ImportError | OSError | None = None
"""Why nothing can be imported from here, if PyTorch is missing, broken or too old: the first use raises, `quartet doctor` tells more."""

try:
    from quartet_compile.capture import explain
    from quartet_compile.marks import RecipeHandle, recipe, set_recipe
    from quartet_compile.passes.place import UnsupportedLinear
    from quartet_compile.passes.recipe import Cell, Product, Recipe
    from quartet_compile.recipes import RECIPES
    from quartet_compile.report import Report
except (ImportError, OSError) as error:
    import_error = error

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Cell",
    "Product",
    "Recipe",
    "RecipeHandle",
    "Report",
    "UnsupportedLinear",
    "explain",
    "recipe",
    "set_recipe",
]

if not TYPE_CHECKING and import_error is not None:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"quartet_compile.{name}: PyTorch does not work (see quartet doctor): {import_error}") from import_error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
