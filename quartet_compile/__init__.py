"""Train unchanged PyTorch models in NVFP4: ``torch.compile(model, backend="quartet")``.

Importing this package is needed only for what goes beyond that line: `recipe`, `set_recipe` and `RecipeSchedule` choose recipes, `explain`
tells what would be rewritten, `report` what was.
"""

from quartet_compile.capture import explain
from quartet_compile.chains import Blocks, blocks
from quartet_compile.marks import RecipeHandle, recipe, set_recipe
from quartet_compile.passes.place import UnsupportedLinear
from quartet_compile.passes.recipe import Cell, Product, Recipe
from quartet_compile.recipes import RECIPES
from quartet_compile.report import Report
from quartet_compile.running import report
from quartet_compile.schedule import RecipeSchedule

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
    "UnsupportedLinear",
    "blocks",
    "explain",
    "recipe",
    "report",
    "set_recipe",
]
