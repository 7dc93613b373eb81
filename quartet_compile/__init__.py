"""Train unchanged PyTorch models in NVFP4: ``torch.compile(model, backend="quartet")``.

Importing this package is needed only for what goes beyond that line: `recipe`, `set_recipe` and `RecipeSchedule` choose recipes, `explain`
tells what would be rewritten, `report` what was, `suggest` what is better left alone. Names are imported when they are first used, so that
`quartet doctor` runs where PyTorch does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartet_compile.capture import explain
    from quartet_compile.chains import Blocks, blocks
    from quartet_compile.marks import RecipeHandle, recipe, set_recipe
    from quartet_compile.passes.place import UnsupportedLinear
    from quartet_compile.passes.recipe import Cell, Product, Recipe
    from quartet_compile.ranking import suggest
    from quartet_compile.recipes import RECIPES
    from quartet_compile.reports import Report
    from quartet_compile.running import report
    from quartet_compile.schedule import RecipeSchedule
    from quartet_compile.suggestion import Suggestion

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Blocks",
    "Cell",
    "Product",
    "Recipe",
    "RecipeHandle",
    "RecipeSchedule",
    "Report",
    "Suggestion",
    "UnsupportedLinear",
    "blocks",
    "explain",
    "recipe",
    "report",
    "set_recipe",
    "suggest",
]

_MODULES = {
    "RECIPES": "recipes",
    "Blocks": "chains",
    "Cell": "passes.recipe",
    "Product": "passes.recipe",
    "Recipe": "passes.recipe",
    "RecipeHandle": "marks",
    "RecipeSchedule": "schedule",
    "Report": "reports",
    "Suggestion": "suggestion",
    "UnsupportedLinear": "passes.place",
    "blocks": "chains",
    "explain": "capture",
    "recipe": "marks",
    "report": "running",
    "set_recipe": "marks",
    "suggest": "ranking",
}
"""Where the public names are. No module may have one of these names: it would hide it."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
