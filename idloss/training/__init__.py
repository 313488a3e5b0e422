"""Training: recipes, the engine, and the tasks it knows."""

from idloss.training.accelerator import create_accelerator
from idloss.training.engine import Engine, TrainingStoppedError
from idloss.training.fnet_recipe import FNetRecipe
from idloss.training.fnet_run import train_fnet
from idloss.training.options import RunOptions
from idloss.training.recipe import Recipe, load_recipe, recipe_names
from idloss.training.run import train
from idloss.training.task import Batch, Draw, Task

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
    "recipe_names",
    "train",
    "train_fnet",
]
