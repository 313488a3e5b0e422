"""`idloss train` and `train-fnet`: a recipe, with any of its fields changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[
    str, typer.Argument(help="Name of a recipe in the zoo, or a YAML file.", show_default=False)
]
Fields = Annotated[
    list[str] | None,
    typer.Argument(help="Fields to change: data=FOLDER batch_size=32 'factors=[4, 8]'."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/RECIPE]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]


def train(
    recipe: RecipeName, fields: Fields = None, out: Out = None, resume: Resume = False
) -> None:
    """Train an SRNet by a recipe; under torchrun or accelerate launch on many devices."""
    from idloss.training import load_recipe
    from idloss.training import train as run

    folder = out or Path("runs") / Path(recipe).stem
    run(load_recipe(recipe, fields or []), folder, resume=resume)
    _tell(folder)


def train_fnet(
    recipe: RecipeName, fields: Fields = None, out: Out = None, resume: Resume = False
) -> None:
    """Train an FNet on identities, or after a teacher; likewise."""
    from idloss.training import FNetRecipe, load_recipe
    from idloss.training import train_fnet as run

    folder = out or Path("runs") / Path(recipe).stem
    run(load_recipe(recipe, fields or [], FNetRecipe), folder, resume=resume)
    _tell(folder)


def _tell(folder: Path) -> None:
    typer.echo(f"the network is in {folder}/model, the log in {folder}/training.csv")
