"""What the folder of a run keeps beside its checkpoints and logs: the recipe and the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from timm.models import is_model, save_for_hf
from torch import nn

from idloss.training.options import RunOptions

RECIPE = "recipe.yaml"
"""What a run's folder keeps its resolved recipe as."""

MODEL = "model"
"""What it keeps the trained network in."""


def check_folder(recipe: RunOptions, folder: Path, *, resume: bool) -> None:
    """Refuse to go on with a run by another recipe.

    Args:
        recipe: What is to be done.
        folder: Of the run.
        resume: Go on with what is there.

    Raises:
        FileExistsError: The folder holds a run and `resume` is False.
        ValueError: The run there is by another recipe; says in what it differs.
    """
    written = folder / RECIPE
    if not written.is_file():
        return
    if not resume:
        raise FileExistsError(f"{folder} holds a run: resume it, or choose another folder")
    before = yaml.safe_load(written.read_text(encoding="utf-8"))
    now = recipe.model_dump(mode="json")
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in recipe.PASSIVE and before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"the run in {folder} cannot be resumed with another recipe: {'; '.join(changed)}"
        )


def save_network(network: nn.Module, folder: Path, arguments: Mapping[str, Any]) -> None:
    """Save a network as the Hub has it, or its weights alone if timm does not know its name.

    Args:
        network: What to save.
        folder: Where.
        arguments: What it was made with, kept beside the weights: a `local-dir:` name needs no
            others.
    """
    network.to(memory_format=torch.contiguous_format)  # as safetensors wants it
    cfg: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    if is_model(str(cfg.get("architecture"))):
        save_for_hf(network, str(folder), safe_serialization=True, model_args=dict(arguments))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), folder / "model.safetensors")
