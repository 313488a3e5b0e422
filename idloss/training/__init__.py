"""Training: recipes, the engine, and the tasks it knows."""

from idloss.training.batches import Batch, Draw, Task
from idloss.training.engine import Engine, TrainingStoppedError, create_accelerator
from idloss.training.recipe import FNetRecipe, Recipe, RunOptions, load_recipe, recipe_names
from idloss.training.runs import train, train_fnet
from idloss.training.saving import open_trained

__all__ = [
    "Batch",
    "Draw",
    "Engine",
    "FNetRecipe",
    "Recipe",
    "RunOptions",
    "Task",
    "TrainingStoppedError",
    "create_accelerator",
    "load_recipe",
    "open_trained",
    "recipe_names",
    "train",
    "train_fnet",
]
