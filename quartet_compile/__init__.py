"""Train unchanged PyTorch models in NVFP4: ``torch.compile(model, backend="quartet")``.

Importing this package is needed only for what goes beyond that line: `recipe` and `set_recipe` choose recipes, `explain` tells what
would be rewritten, `report` what was, `suggest` what is better left alone.
"""

from quartet_compile.capture import explain
from quartet_compile.marks import RecipeHandle, recipe, set_recipe
from quartet_compile.passes.place import UnsupportedLinear
from quartet_compile.passes.recipe import Cell, Product, Recipe
from quartet_compile.ranking import suggest
from quartet_compile.recipes import RECIPES
from quartet_compile.report import Report
from quartet_compile.running import report
from quartet_compile.suggestion import Suggestion

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Cell",
    "Product",
    "Recipe",
    "RecipeHandle",
    "Report",
    "Suggestion",
    "UnsupportedLinear",
    "explain",
    "recipe",
    "report",
    "set_recipe",
    "suggest",
]
