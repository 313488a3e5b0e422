"""Training: recipes, and runs that survive being killed."""

from idloss.training.engine import TrainingStoppedError
from idloss.training.recipe import FNetRecipe, Recipe, load_recipe, recipe_names
from idloss.training.runs import train, train_fnet
from idloss.training.saving import open_trained

__all__ = [
    "FNetRecipe",
    "Recipe",
    "TrainingStoppedError",
    "load_recipe",
    "open_trained",
    "recipe_names",
    "train",
    "train_fnet",
]
