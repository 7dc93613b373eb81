"""Train unchanged PyTorch models in NVFP4: ``torch.compile(model, backend="quartet")``.

Importing this package is needed only for what goes beyond that line: `recipe` and `set_recipe` choose recipes, `explain` tells what
would be rewritten, `observe` what it does to the numbers while a model trains.
"""

from quartet_compile.capture import explain
from quartet_compile.marks import RecipeHandle, recipe, set_recipe
from quartet_compile.observations import Observation, Observations, read_observations
from quartet_compile.observer import Observer, observe
from quartet_compile.passes.place import UnsupportedLinear
from quartet_compile.passes.recipe import Cell, Product, Recipe
from quartet_compile.recipes import RECIPES
from quartet_compile.report import Report

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Cell",
    "Observation",
    "Observations",
    "Observer",
    "Product",
    "Recipe",
    "RecipeHandle",
    "Report",
    "UnsupportedLinear",
    "explain",
    "observe",
    "read_observations",
    "recipe",
    "set_recipe",
]
